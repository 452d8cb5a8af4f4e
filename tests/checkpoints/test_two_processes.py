"""Two real processes load and gather a checkpoint over a mesh of both, and go on from their own."""

import contextlib
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
from jax.sharding import NamedSharding, PartitionSpec

from sl_jax.checkpoints.huggingface import named_tensors, save_params
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(2, 16, 2, 12, axes_dims_rope=(4, 6, 6))
# Prints the bytes that this process read of linear layers, whether all of its shards are right and
# what it gathers of them, and from which of its checkpoints it goes on where process 1 cannot read
# the newest one.
_SCRIPT = """
import json, sys
from functools import partial
from pathlib import Path
folder, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import jax, numpy as np, pytest
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from bucket import Bucket
from flax import traverse_util
from safetensors.numpy import load_file
from sl_jax.checkpoints.huggingface import load_params, named_tensors
from sl_jax.checkpoints.naming import MMDIT, to_parameter
from sl_jax.parallel.joining import DistributedConfig, joined
from sl_jax.parallel.processes import to_everywhere
from test_two_processes import gone_on_from, layout_and_shapes

def loaded():
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
    gathered = dict(named_tensors(MMDIT, params, whole=partial(to_everywhere, mesh=layout.mesh)))
    right &= gathered.keys() == tensors.keys()
    right &= all(np.array_equal(tensors[name], tensor) for name, tensor in gathered.items())
    return bool(right)

bucket = Bucket.install(folder, pytest.MonkeyPatch())
with joined(DistributedConfig("on", f"127.0.0.1:{port}", 2, index)) as processes:
    told = {"right": loaded(), "devices": jax.device_count()}
    told["read"] = sum(b - a for name, a, b in bucket.asked if name.endswith(".safetensors"))
    told["step"], told["restored"] = gone_on_from(folder / "checkpoints", processes)
    print(json.dumps(told))
"""


def layout_and_shapes():
    from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    return layout, layout.abstract(abstract_params(MMDiT(CONFIG)))


def gone_on_from(folder, processes):
    """The step, and whether its shards are right, where what process 1 alone reads is damaged."""
    from sl_jax.checkpoints.orbax import RunCheckpoints

    layout, _ = layout_and_shapes()
    rows = np.random.default_rng(1).normal(size=(4, 5000)).astype(np.float32)  # not compressible
    sharding = NamedSharding(layout.mesh, PartitionSpec("fsdp"))

    def tree(step):
        return {
            "rows": jax.make_array_from_callback(rows.shape, sharding, lambda at: step * rows[at])
        }

    with contextlib.closing(RunCheckpoints(folder, processes=processes)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
        if processes.is_main:
            # One file or more, as TensorStore got to writing.
            for part in (folder / "2" / "tree" / "ocdbt.process_1" / "d").iterdir():
                part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        processes.barrier("damaging a file")
        step, restored, _ = checkpoints.restore(tree(0))
    shards = restored["rows"].addressable_shards
    return step, all(np.array_equal(shard.data, step * rows[shard.index]) for shard in shards)


@pytest.mark.slow
def test_each_reads_half_and_what_one_cannot_read_both_pass_over(tmp_path):
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
        # On a busy machine devices wait for each other longer than XLA's 40 s.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
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
    try:
        told = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], told
    found = [json.loads(output.splitlines()[-1]) for output, _ in told]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.ndim < 3)
    for process in found:
        assert process["right"] and process["devices"] == 8
        assert process["step"] == 1 and process["restored"]
        # Vectors, which all devices hold whole, are read by both; so are headers.
        assert 0.5 * (size - small) < process["read"] < 0.5 * size + small + 40_000
