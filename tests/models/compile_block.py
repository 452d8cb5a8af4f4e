"""Compiles one block of the production size for TPUs that are not there; prints memory as JSON.

`python compile_block.py FOLDER FSDP TENSOR SEQUENCE ATTENTION`: forward and backward pass of the
transformer that FOLDER describes, on the four chips of a v5e:2x2, four samples in bfloat16.
"""

import json
import sys

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies

from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_params, make_model
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.planning.compiled import compile_program

GRID, TEXT = LatentGrid(4, 40, 40), 512
BATCH = 4


def main(folder: str, fsdp: str, tensor: str, sequence: str, attention: str) -> None:
    """Compiles for the mesh, and prints a line."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(MeshConfig(1, int(fsdp), int(tensor), int(sequence)), chips)
    layout = Layout(mesh)
    model = make_model(folder, ComputeConfig(attention=attention), layout)

    def array(shape, dtype=jnp.bfloat16):
        axes = ("batch", *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(shape, axes))

    def square(params, latents, condition, text, lengths, t):
        def run(module):
            return module(latents, condition, text, lengths, module.modulate(t), GRID)

        return jnp.square(nn.apply(run, model)({"params": params}).astype(jnp.float32)).sum()

    channels, generated = model.config.in_channels, GRID.generated_tokens
    arguments = (
        layout.abstract(abstract_params(model)),
        array((BATCH, generated, channels)),
        array((BATCH, GRID.frame_tokens, channels)),
        array((BATCH, TEXT, model.config.joint_attention_dim)),
        array((BATCH,), jnp.int32),
        array((BATCH,), jnp.float32),
    )
    compiled = compile_program(jax.jit(jax.grad(square, (1, 2, 3))).trace(*arguments), quick=True)
    memory = compiled.memory_analysis()
    print(
        json.dumps(
            {
                "attention": model.attention.implementation,
                "tokens": generated + GRID.frame_tokens + TEXT,
                "temporaries": memory.temp_size_in_bytes,
                "kernels": compiled.as_text().count("splash_mha"),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
