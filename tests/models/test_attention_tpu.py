"""The attention of one block at production size, compiled for TPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sl_jax.models.mmdit import MMDiTConfig

TOKENS = 6 * 40 * 40 + 512
# Compile only: libtpu must look for no chips, and for no other process that uses them.
FOR_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@pytest.fixture(scope="module")
def compile_block(tmp_path_factory):
    """Mesh sizes (fsdp, tensor, sequence) and attention → what compiling for v5e:2x2 found."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = MMDiTConfig(1, 128, 24, 3584).to_dict()
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def run(*arguments):
        script = Path(__file__).with_name("compile_block.py")
        done = subprocess.run(
            [sys.executable, str(script), str(folder), *map(str, arguments)],
            env=os.environ | FOR_TPU,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_a_block_keeps_no_scores(compile_block):
    """A sample a chip; the scores of its 24 heads alone are 9.8 GB in float32."""
    found = compile_block(4, 1, 1, "auto")
    assert (found["attention"], found["tokens"]) == ("splash", TOKENS)
    assert found["kernels"] > 0
    scores = 24 * TOKENS**2 * 4
    assert found["temporaries"] < scores / 3
    plain = compile_block(4, 1, 1, "xla")
    assert plain["kernels"] == 0
    assert found["temporaries"] < plain["temporaries"] / 3


@pytest.mark.slow
def test_heads_and_queries_are_split_over_chips(compile_block):
    """Four samples, of each half the heads and half the queries a chip."""
    found = compile_block(1, 2, 2, "auto")
    assert found["attention"] == "splash" and found["kernels"] > 0
    assert found["temporaries"] < 24 * TOKENS**2 * 4 / 2
