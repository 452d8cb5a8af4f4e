"""Modulation tables: one for each sampling grid, made by a program of their own.

Rollout, learner, evaluation and `decompose` sample at the times of few grids, one for each bucket
and sampler. With a table for each they need none of the weights that make modulation of time.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from sl_jax.checkpoints.pipeline import Pipeline
from sl_jax.models.mmdit import MMDiT
from sl_jax.models.modulation import Modulation, ModulationTable
from sl_jax.parallel.host_array import HostArray
from sl_jax.parallel.mesh import Layout, replicated
from sl_jax.parallel.processes import from_everywhere

_KEPT = 16  # tables


class ModulationTables:
    """Makes the table of a σ grid, and keeps it for the next call.

    Where the pipeline keeps the weights in the hosts' memory, they visit the accelerators block by
    block: those multiply in their own arithmetic, as a program with all weights would, and each
    process moves only its devices' share, which takes about as long as loading it did. A host
    would round differently, would need all weights in every process, and is slow in bfloat16.

    The rows are the same on every device. Beside the weights they are kept on the hosts (220 MB
    for 50 steps of the 20 B model), those of the grids that were used last, and are on the devices
    while somebody holds a table. All processes call together.
    """

    def __init__(self, pipeline: Pipeline):
        self._time_params = pipeline.time_params
        self._known: dict[bytes, Modulation] = {}
        if self._time_params is not None:
            self._whole = replicated(_any_leaf(self._time_params).sharding.mesh)
            block = pipeline.model.clone(
                config=dataclasses.replace(pipeline.model.config, num_layers=1)
            )
            self._block = jax.jit(
                partial(block.apply, method="modulate"), out_shardings=self._whole
            )

    def __call__(self, sigmas: Float[np.ndarray, " steps_1"]) -> ModulationTable:
        """The table of a grid; without rows where the pipeline's `params` hold what makes them."""
        if self._time_params is None:
            return ModulationTable(sigmas, None)
        key = sigmas.tobytes()
        rows = self._known.pop(key, None) or self._made(sigmas[:-1])
        self._known[key] = rows  # at the end: in front are those that were used longest ago
        if len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]
        place = partial(from_everywhere, sharding=self._whole)
        return ModulationTable(sigmas, jax.tree.map(place, rows))

    def _made(self, times: Float[np.ndarray, " steps"]) -> Modulation:
        constant = jax.tree.map(
            HostArray.whole, {k: v for k, v in self._time_params.items() if k != "modulation"}
        )
        stacked = self._time_params["modulation"]
        blocks = []
        for layer in range(_any_leaf(stacked).shape[0]):
            weights = jax.tree.map(lambda leaf, i=layer: leaf.rows(i, i + 1), stacked)
            variables = {"params": {**constant, "modulation": weights}}
            # Waits for the result, so that not all blocks' weights are on their way at once.
            blocks.append(jax.device_get(self._block(variables, times)))
        return Modulation(
            np.concatenate([block.image for block in blocks]),
            np.concatenate([block.text for block in blocks]),
            blocks[0].output,
        )


def _any_leaf(tree: Any) -> HostArray:
    return jax.tree.leaves(tree)[0]


def abstract_table(model: MMDiT, steps: int, layout: Layout) -> ModulationTable:
    """Shapes and shardings of the table of a grid of so many steps."""
    config, whole = model.config, replicated(layout.mesh)

    def shape(*sizes: int, dtype: Any = model.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

    blocks = shape(config.num_layers, steps, 6, config.width)
    rows = Modulation(blocks, blocks, shape(steps, 2, config.width))
    return ModulationTable(shape(steps + 1, dtype=np.float32), rows)
