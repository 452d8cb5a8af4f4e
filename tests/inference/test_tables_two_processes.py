"""Two real processes, each with half of the weights on its host, make one table."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline
from sl_jax.inference.modulation import ModulationTables
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

SIGMAS = np.array([1.0, 0.75, 0.4, 0.0], np.float32)
_SCRIPT = """
import json, sys
folder, port, index, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from test_tables_two_processes import table_and_bytes
table, kept = table_and_bytes(folder)
np.savez(out, *map(np.asarray, table.rows))
# A program of both takes the table as it is.
total = jax.jit(lambda t: sum(x.sum() for x in jax.tree.leaves(t)))(table)
print(json.dumps({"kept": kept, "devices": jax.device_count(), "total": float(total)}))
"""


def table_and_bytes(folder):
    """The table, and bytes of the blocks' modulation that this process keeps."""
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    pipeline = load_pipeline(folder, ComputeConfig("float32"), layout, [])
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.time_params["modulation"]))
    return ModulationTables(pipeline)(SIGMAS), kept


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(random_checkpoint, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)]),
    }
    files = [tmp_path / f"{index}.npz" for index in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(random_checkpoint), port, str(index), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, file in enumerate(files)
    ]
    told = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    found = [json.loads(output.splitlines()[-1]) for output, _ in told]
    wanted, kept = table_and_bytes(random_checkpoint)
    tables = [list(np.load(file).values()) for file in files]
    for first, other, right in zip(*tables, wanted.rows, strict=True):
        assert np.array_equal(first, other)
        np.testing.assert_allclose(first, right, rtol=0, atol=1e-6)
    assert [process["kept"] for process in found] == [kept // 2] * 2
    assert [process["devices"] for process in found] == [8, 8]
