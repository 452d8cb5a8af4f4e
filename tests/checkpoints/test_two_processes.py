"""Two real processes load one checkpoint over a mesh of both, and gather it again."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from sl_jax.checkpoints.huggingface import named_tensors, save_params
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(2, 16, 2, 12, axes_dims_rope=(4, 6, 6))
# Prints the bytes that this process read of linear layers, and whether all of its shards are right,
# as well as what it gathers from both.
_SCRIPT = """
import json, sys
from functools import partial
from pathlib import Path
folder, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import jax, numpy as np, pytest
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from bucket import Bucket
from flax import traverse_util
from safetensors.numpy import load_file
from sl_jax.checkpoints.huggingface import load_params, named_tensors
from sl_jax.checkpoints.naming import MMDIT, to_parameter
from sl_jax.parallel.processes import to_everywhere
from test_two_processes import layout_and_shapes

bucket = Bucket.install(folder, pytest.MonkeyPatch())
layout, abstract = layout_and_shapes()
params = load_params("gs://bucket/model", MMDIT, abstract)
tensors = load_file(folder / "bucket/model/diffusion_pytorch_model.safetensors")
right = True
for path, leaf in traverse_util.flatten_dict(params).items():
    source = MMDIT.source(path, leaf.shape)
    rows = [to_parameter(tensors[name], source.layout) for name in source.names]
    whole = np.stack(rows).reshape(leaf.shape)
    for shard in leaf.addressable_shards:
        right &= np.array_equal(shard.data, whole[shard.index])
read = sum(end - begin for name, begin, end in bucket.asked if name.endswith(".safetensors"))
gathered = dict(named_tensors(MMDIT, params, whole=partial(to_everywhere, mesh=layout.mesh)))
right &= gathered.keys() == tensors.keys()
right &= all(np.array_equal(tensors[name], tensor) for name, tensor in gathered.items())
print(json.dumps({"read": read, "right": bool(right), "devices": jax.device_count()}))
"""


def layout_and_shapes():
    from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    return layout, layout.abstract(abstract_params(MMDiT(CONFIG)))


@pytest.mark.slow
def test_each_reads_half_and_holds_its_own_shards(tmp_path):
    draw = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(MMDiT(CONFIG)))
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
    folder = tmp_path / "bucket" / "model"
    save_params(folder, named_tensors(MMDIT, params), CONFIG.to_dict())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent, here))),
    }
    command = (sys.executable, "-c", _SCRIPT, str(tmp_path), port)
    running = [
        subprocess.Popen(
            [*command, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    found = [json.loads(output.splitlines()[-1]) for output, _ in told]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.ndim < 3)
    for process in found:
        assert process["right"] and process["devices"] == 8
        # Vectors, which all devices hold whole, are read by both; so are headers.
        assert 0.5 * (size - small) < process["read"] < 0.5 * size + small + 40_000
