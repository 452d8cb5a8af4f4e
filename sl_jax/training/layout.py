"""How the arrays of a run lie on its devices."""

from collections.abc import Sequence

import jax
from etils import epath

from sl_jax.checkpoints.pipeline import transformer_config
from sl_jax.parallel.mesh import Layout, MeshConfig, make_layout
from sl_jax.training.configuration import ConfigError


def run_layout(
    config: MeshConfig, folder: epath.PathLike, devices: Sequence[jax.Device] | None = None
) -> Layout:
    """The layout that a configuration asks for, of the model in a checkpoint folder.

    Args:
        config: sizes of the mesh, and the rules.
        folder: the checkpoint; of the transformer only config.json is read.
        devices: those of all processes by default.

    Raises:
        ConfigError: attention cannot be split by heads as the mesh would have it. Left whole it
            would give the same numbers, computed on every device.
        CheckpointError: `folder` describes no model that is implemented.
    """
    layout = make_layout(config, devices)
    heads, parts = transformer_config(folder).num_attention_heads, layout.parts("heads")
    if heads % parts:
        axes = " × ".join(config.rules.heads)
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise ConfigError(
            f"config.mesh.{axes} is {parts}, which does not divide the {heads} heads of the "
            f"model's attention, so that each device would compute all; please use one of {sizes}"
        )
    return layout
