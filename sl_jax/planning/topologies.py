"""TPU slices by name, and clients that compile for them with no TPU attached."""

import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from sl_jax.parallel.peaks import PEAK_FLOPS


class PlanError(ValueError):
    """What was asked for cannot be planned; the message says what to do."""


class Chip(NamedTuple):
    """The rates of one accelerator.

    Attributes:
        name: of the generation.
        hbm: bytes that the compiler gives a program, measured with programs that are too large.
        flops: peak bfloat16 FLOP/s.
        bandwidth: of the HBM, bytes/s.
        link: of one link between chips, bytes/s in one direction.
        dimensions: of the torus.
        cores: that a chip's accelerator type counts.
        accelerator: prefix of the accelerator type.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    link: float
    dimensions: int
    cores: int
    accelerator: str


_GIB = 2**30

# HBM bandwidth: Google's system architecture pages of each generation
# (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Links: the same pages give the sum over a chip's
# links and both directions; per link and direction as in "How to scale your model", table of TPU
# specs (jax-ml.github.io/scaling-book). `hbm` is what libtpu's compiler says is available.
CHIPS = {
    "v4": Chip("v4", 30.75 * _GIB, PEAK_FLOPS["TPU v4"], 1228e9, 45e9, 3, 2, "v4"),
    "v5e": Chip("v5e", 15.75 * _GIB, PEAK_FLOPS["TPU v5 lite"], 819e9, 45e9, 2, 1, "v5litepod"),
    "v5p": Chip("v5p", 95.73 * _GIB, PEAK_FLOPS["TPU v5"], 2765e9, 90e9, 3, 2, "v5p"),
    "v6e": Chip("v6e", 31.24 * _GIB, PEAK_FLOPS["TPU v6 lite"], 1640e9, 90e9, 2, 1, "v6e"),
}
_MOST_CHIPS = 256


class Topology(NamedTuple):
    """A slice of TPU chips.

    Attributes:
        name: as libtpu calls it, such as "v5e:2x4".
        chip: the rates of each.
        sides: chips along each axis.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        count = 1
        for side in self.sides:
            count *= side
        return count

    @property
    def accelerator_type(self) -> str:
        """The name of the slice in Google's cloud; v4 and v5p count cores."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.cores}"

    @property
    def ici(self) -> float:
        """Bytes/s that a chip takes in by a ring along one axis of the slice, in both directions.

        Two chips have one link between them. Rings along several axes at a time can be faster: this
        is the rate that a collective over one mesh axis may count on.
        """
        return self.chip.link * (2 if self.chips > 2 else 1)


def topology(name: str, hbm_gib: float | None = None) -> Topology:
    """The slice of a name: a generation and the chips along each axis, "v5e:2x4".

    Args:
        name: of the slice.
        hbm_gib: memory of a chip to count with in place of its own.

    Raises:
        PlanError: there is no such slice, or no such memory.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise PlanError(
            f"topology {name!r} is unknown; please give one of {', '.join(CHIPS)} and the chips "
            "along each axis, such as v5e:2x4 (eight v5e chips) or v5p:2x2x1 (four v5p chips)"
        )
    chip, sides = CHIPS[match[1]], tuple(int(side) for side in match[2].split("x"))
    if hbm_gib is not None:
        if not 0 < hbm_gib * _GIB <= chip.hbm:
            raise PlanError(
                f"--hbm_gib is {hbm_gib:g}; please give more than 0, and at most what the compiler "
                f"gives a program on {chip.name}: {chip.hbm / _GIB:.2f}"
            )
        chip = chip._replace(hbm=hbm_gib * _GIB)
    found = Topology(name, chip, sides)
    if len(sides) != chip.dimensions:
        example = "x".join(["2"] * chip.dimensions)
        raise PlanError(
            f"topology {name!r}: {chip.name} slices have {chip.dimensions} axes; please give them "
            f"as in {chip.name}:{example}"
        )
    if not 1 <= found.chips <= _MOST_CHIPS:
        raise PlanError(f"topology {name!r} has {found.chips} chips; please give 1 to 256")
    return found


def prepare_environment(slice_: Topology) -> None:
    """Sets what libtpu needs to compile without a TPU; before JAX looks for devices.

    It must ask no metadata server, look for no chips and for no other process that uses them, and
    this process computes on the CPU alone.
    """
    os.environ.update(
        {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "TPU_ACCELERATOR_TYPE": slice_.accelerator_type,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    )
    jax.config.update("jax_platforms", "cpu")


def devices(slice_: Topology) -> list[Any]:
    """The chips of a slice, for which programs can be compiled but not run.

    Raises:
        PlanError: libtpu is not installed, or knows no such slice.
    """
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_.name, **_details(slice_)
        )
    except (RuntimeError, NotImplementedError) as error:
        if "libtpu" in str(error) and "not" in str(error):
            raise PlanError(
                f"TPU programs are compiled by libtpu, which is not here ({error}); please "
                "install it, from the repository: pip install '.[tpu]' (Linux on x86-64)"
            ) from error
        raise PlanError(f"topology {slice_.name!r} was refused by libtpu: {error}") from error
    return list(described.devices)


def _details(slice_: Topology) -> dict[str, Any]:
    """What the name leaves open: hosts smaller than the usual one, a v4's cores as one device."""
    found: dict[str, Any] = {}
    if slice_.chips < 4:
        found["chips_per_host_bounds"] = [*slice_.sides, *(1,) * (3 - len(slice_.sides))]
    if slice_.chip.name == "v4":
        found["chip_config_name"] = "megacore"
    return found
