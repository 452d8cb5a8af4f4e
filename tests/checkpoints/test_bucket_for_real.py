"""Checkpoints in a bucket, by the clients of Google Cloud Storage, against an emulator of it.

`tests/bucket.py` stands in for gcsfs elsewhere; arrays, though, go through a client of TensorStore.
"""

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.system

PROGRAM = """
import sys
sys.path.append(sys.argv[1])  # after what is installed here
from gcp_storage_emulator.server import create_server
create_server("localhost", int(sys.argv[2]), in_memory=True, default_bucket="bucket").start()

import jax.numpy as jnp
import numpy as np
from etils import epath
from sl_jax.checkpoints.orbax import RunCheckpoints, find_step, read_entry

folder = epath.Path("gs://bucket/run/checkpoints")

def tree(value):
    return {"a": jnp.full((40, 30), value, jnp.float32), "n": jnp.int32(value)}

def steps():
    return sorted(path.name for path in folder.iterdir())

checkpoints = RunCheckpoints(folder, keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, tree(step), {"position": 10 * step}, reward=1.0 / step)
checkpoints.wait()
assert steps() == ["1", "2", "3"] and checkpoints.best == (1, 1.0), steps()  # two, and the best
checkpoints.close()

(folder / "3" / "commit_success.txt").copy(folder / "kept")
(folder / "3" / "commit_success.txt").unlink()  # as a kill leaves it
assert find_step(folder.parent) == folder / "2"
checkpoints = RunCheckpoints(folder, keep=2)
assert checkpoints.latest == 2 and "3" not in steps(), steps()
checkpoints.save(3, tree(33), {"position": 33})
checkpoints.wait()
step, found, record = checkpoints.restore(tree(0))
assert (step, int(found["n"]), record) == (3, 33, {"position": 33})
assert np.array_equal(read_entry(find_step(folder), ["a"]), tree(33)["a"])
checkpoints.close()

for path in (folder / "3" / "tree").iterdir():
    if path.is_file():
        path.write_bytes(path.read_bytes()[:5])
checkpoints = RunCheckpoints(folder, keep=2)
step, found, record = checkpoints.restore(tree(0))
assert (step, int(found["n"]), record) == (2, 2, {"position": 20})
assert "damaged-3" in steps() and "3" not in steps(), steps()
checkpoints.save(3, tree(333), {})
checkpoints.close()
assert RunCheckpoints(folder).restore(tree(0))[0] == 3
print("all is well", flush=True)
import os
os._exit(0)  # without waiting for the emulator
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the client and the emulator."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*command, "gcsfs", "gcp-storage-emulator==2026.7.19"], check=True)
    return folder


def test_checkpoints_live_in_a_bucket(packages, tmp_path):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    address = f"http://localhost:{port}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "STORAGE_EMULATOR_HOST": address,  # of gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the emulator does not know
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(packages), str(port)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "all is well" in done.stdout, done.stdout[-1000:] + done.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []  # nothing went to the disk instead
