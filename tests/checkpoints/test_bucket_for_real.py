"""Checkpoints in a bucket, by the clients of Google Cloud Storage, against an emulator of it.

`tests/bucket.py` stands in for gcsfs elsewhere; arrays, though, go through a client of TensorStore.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.system

PROGRAM = """
import jax.numpy as jnp
import numpy as np
from etils import epath
from sl_jax.checkpoints.orbax import RunCheckpoints, find_step, read_entry

folder = epath.Path("gs://bucket/steps/checkpoints")

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
"""


def test_checkpoints_live_in_a_bucket(bucket, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | bucket | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "all is well" in done.stdout, done.stdout[-1000:] + done.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []  # nothing went to the disk instead
