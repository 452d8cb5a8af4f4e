"""How many samples the learner takes at a time, derived from the memory of the devices.

A larger micro-batch gathers weights less often; of the result it changes no more than rounding. The
backward pass decides what fits: beside everything else on a device it needs what a forward pass
keeps for it, and what it computes inside one block. `learning_bytes` estimates that without
compiling; `sl_jax.plan` compiles, and says what is really needed.
"""

import dataclasses
import logging
from typing import NamedTuple

import jax
from etils import epath

from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.programs import Programs
from sl_jax.parallel.mesh import Layout, batch_shards
from sl_jax.planning.phases import bytes_per_chip

_log = logging.getLogger(__name__)

_SHARE = 0.92  # of a device's memory; the rest is for what the estimate does not know
# Inside a block: so many values as channels for every token, and so many copies of a block's whole
# weights. XLA needs as much as 18 values for one sample on each v5e, 23 to 28 for two on each v6e,
# 34 for four there, and 23 for eight on each v5p. With these no plan of
# tests/benchmarks/results/plan_table.json needs more than the estimate, which is up to a fifth
# above, the most where `tensor` splits what lies in a block.
_VALUES = 35
_WEIGHTS = 4
_SCORE_BYTES = 12  # of every pair of tokens and head, where attention keeps their scores
_MOST_TOKENS = 16_384  # on a device whose memory is unknown: more are no faster


class MicroBatch(NamedTuple):
    """A number of samples, over all devices, and the bytes that it takes on each of them.

    Attributes:
        samples: a divisor of a rollout batch that data × fsdp divides.
        needed: the estimate.
        available: memory of a device; None where it is unknown.
    """

    samples: int
    needed: float
    available: float | None

    @property
    def fits(self) -> bool:
        """Whether there is room, as far as that is known."""
        return self.available is None or self.needed <= _SHARE * self.available


def with_micro_batch(
    config: GrpoConfig, folder: epath.Path, layout: Layout, memory: float | None
) -> GrpoConfig:
    """The configuration with a micro-batch; logged where it leaves that open.

    The same in all processes that give the same arguments.

    Args:
        config: of the run.
        folder: the checkpoint, of which only configuration files are read.
        layout: of the devices.
        memory: bytes of a device that programs may use; None where they are unknown (CPUs).
    """
    if config.learner.micro_batch is not None:
        return config
    found = derived(Programs(config, folder, layout), config, layout, memory)
    told = f"about {found.needed / 2**30:.1f} GiB on each device"
    if memory is not None:
        told += f" of {memory / 2**30:.1f}"
    if found.fits:
        _log.info("Micro-batch: %d samples, %s.", found.samples, told)
    else:
        _log.warning(
            "Micro-batch: %d samples, the fewest, and %s may be too much: sl_jax.plan tells.",
            *(found.samples, told),
        )
    learner = dataclasses.replace(config.learner, micro_batch=found.samples)
    return dataclasses.replace(config, learner=learner)


def derived(
    programs: Programs, config: GrpoConfig, layout: Layout, memory: float | None
) -> MicroBatch:
    """The largest micro-batch that fits; the smallest if none does."""
    shards = batch_shards(layout.mesh)
    whole = config.rollout.batch_groups * config.rollout.group_size
    sizes = [size for size in range(shards, whole + 1, shards) if whole % size == 0]
    estimate = _Estimate(programs, layout)
    if memory is None:
        tokens = estimate.tokens / shards
        sizes = [size for size in sizes if size * tokens <= _MOST_TOKENS] or sizes[:1]
        return MicroBatch(sizes[-1], estimate(sizes[-1]), None)
    found = [MicroBatch(size, estimate(size), memory) for size in sizes]
    return next((entry for entry in reversed(found) if entry.fits), found[0])


class _Estimate:
    """Bytes of a device while the learner works, by samples of a micro-batch.

    always + gradient + kept · samples + weights of a block + (values + scores in a block) · samples

    What is always there, and what a forward pass keeps, are counted from the programs' own shapes,
    whatever `compute.remat` says; what lies inside a block is calibrated.
    """

    def __init__(self, programs: Programs, layout: Layout):
        model, sizes = programs.pipeline.model, layout.mesh.shape
        config, width = model.config, model.config.width
        shards, split = batch_shards(layout.mesh), sizes["sequence"]
        self.tokens = programs.tokens
        one, two = (programs.kept_bytes(shards * count) for count in (1, 2))
        each = (two - one) / shards  # of a sample; the rest is laid out like the adapter
        self._kept = each / (shards * split)
        once = (one - (two - one)) / (sizes["fsdp"] * sizes["tensor"])
        blocks = sum(leaf.size for leaf in jax.tree.leaves(programs.pipeline.params["blocks"]))
        weights = _WEIGHTS * blocks / config.num_layers / sizes["tensor"] * model.dtype.itemsize
        self._fixed = bytes_per_chip(programs.learning()) + once + weights
        working = _VALUES * self.tokens * width * model.dtype.itemsize
        if model.attention.implementation == "xla":
            heads = config.num_attention_heads / sizes["tensor"]
            working += _SCORE_BYTES * heads * self.tokens**2
        self._working = working / (shards * split)

    def __call__(self, samples: int) -> float:
        return self._fixed + samples * (self._kept + self._working)
