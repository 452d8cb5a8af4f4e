"""The benchmark against PyTorch computes the same on both sides, and says all that it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_BENCHMARK = Path(__file__).with_name("against_pytorch.py")


@pytest.mark.slow
def test_all_rows_at_the_smallest_sizes(tmp_path):
    done = subprocess.run(
        [sys.executable, str(_BENCHMARK), "--small", "--repeats=1", "--output=rows.json"],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr  # sides that differ end it
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [json.loads(line) for line in done.stdout.splitlines() if line[0] == "{"] == rows
    names = [row["row"] for row in rows]
    assert names == [
        name for name in ("forward", "lora", "vae_encode", "vae_decode", "epoch") for _ in "12"
    ]
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        assert ours["side"] == "sl_jax" and peer["side"].startswith("diffusers")
        assert ours["relative_error_between_sides"] < 1e-3
        assert peer["ratio_to_peer"] == pytest.approx(
            peer["median_seconds"] / ours["median_seconds"]
        )
        assert ours["flops_per_second"] > 0 and ours["shapes"] and ours["versions"]["diffusers"]
