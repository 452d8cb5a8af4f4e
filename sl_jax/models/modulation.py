"""What time does to the MMDiT, alone and as the table of a sampling grid.

Time enters the network through AdaLN modulation alone, and the modulation depends on nothing else.
For the times of a sampling grid it is therefore a table, and the third of the parameters that it is
made from (`TIME_PARAMS`) is not needed beside the table.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

# Submodules of `models.mmdit.MMDiT` that `modulate` alone uses, and that use nothing but time.
TIME_PARAMS = ("modulation", "norm_out", "time_text_embed")


class Modulation(NamedTuple):
    """What time does to the network; B is the batch, or 1 to serve a whole batch.

    Attributes:
        image, text: [layers, B, 6, width]: shift, scale, gate of attention, then of the MLP.
        output: [B, 2, width]: scale and shift before the last projection.
    """

    image: Float[Array, "n b 6 d"]
    text: Float[Array, "n b 6 d"]
    output: Float[Array, "b 2 d"]

    def at(self, index: Int[Array, ""]) -> "Modulation":
        """Row `index` of several times, as a modulation of batch 1; nan where there is none."""
        return Modulation(
            _row(self.image, index, 1), _row(self.text, index, 1), _row(self.output, index, 0)
        )


class ModulationTable(NamedTuple):
    """The times of a sampling grid, and what they do to the network.

    Rows and times go together: who samples by a table takes its grid from it too, and asks for a
    position in it, never for a time, so that there is none that it does not hold. A position beyond
    the grid gives nan, and what is not finite is neither judged nor trained on.

    Attributes:
        sigmas: the grid, descending; its final 0, where no velocity is evaluated, has no row.
        rows: a modulation of batch `steps`; None where the parameters that go with the table hold
            the time's, from which the program that needs rows computes them.
    """

    sigmas: Float[np.ndarray, " steps_1"]
    rows: Modulation | None

    def only(self, index: Int[Array, ""]) -> "ModulationTable":
        """The part for the step from σ_index to σ_{index + 1}."""
        sigmas = jnp.stack([_row(self.sigmas, index + i, 0)[0] for i in range(2)])
        return ModulationTable(sigmas, None if self.rows is None else self.rows.at(index))


def _row(table: Array, index: Int[Array, ""], axis: int) -> Array:
    """One row, its axis kept; nan where `index` is outside, which slices would move inside."""
    row = jax.lax.dynamic_slice_in_dim(jnp.asarray(table), index, 1, axis)
    return jnp.where((index >= 0) & (index < table.shape[axis]), row, jnp.nan)


def split_time(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The MMDiT's parameters (arrays or shapes) without those that only time passes, and those."""
    time = {name: params[name] for name in TIME_PARAMS}
    return {name: part for name, part in params.items() if name not in time}, time


def time_modules(lora: Mapping[str, Any]) -> list[str]:
    """Which modules that only time passes are adapted by this `lora` collection, sorted."""
    return sorted(
        {"/".join(path[:-1]) for path in traverse_util.flatten_dict(lora) if path[0] in TIME_PARAMS}
    )
