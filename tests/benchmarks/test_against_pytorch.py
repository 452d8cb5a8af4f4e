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


_ON_A_CARD = """
import dataclasses
from absl import flags
import jax, jax.numpy as jnp
import against_pytorch as benchmark
from sl_jax.checkpoints.huggingface import read_config
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.checkpoints.source import release_shapes
from sl_jax.models.attention import choose_implementation
from sl_jax.models.flops import velocity_flops
from sl_jax.models.mmdit import MMDiT, MMDiTConfig

flags.FLAGS(["benchmark", "--rows=forward", "--blocks=3"])
benchmark.on_gpu = lambda: True
config, grid, words, dtype = benchmark._sizes()
release = MMDiTConfig.from_dict(read_config(release_shapes() / "transformer"))
assert dataclasses.replace(config, num_layers=60) == release and config.num_layers == 3
assert choose_implementation("auto", "gpu", dtype, config.attention_head_dim) == ("cudnn", "")

model = MMDiT(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
params = benchmark.nn.unbox(abstract_params(model))
sizes = {"latents": (grid.generated_tokens, 64), "condition": (grid.frame_tokens, 64)}
sizes["text"] = (words, config.joint_attention_dim)
arrays = {name: jax.ShapeDtypeStruct((1, *size), jnp.float32) for name, size in sizes.items()}
arrays["t"] = jax.ShapeDtypeStruct((1,), jnp.float32)
forward = jax.jit(lambda v, a: benchmark._velocity(model, grid, v, a))
traced = forward.trace({"params": params}, arrays)
assert traced.out_info.shape == (1, grid.generated_tokens, 64)
counted = benchmark.count_work(traced).flops
assert abs(counted / velocity_flops(config, grid, words) - 1) < 0.05, counted
problem = benchmark.Problem(model, None, None, {"text": jnp.zeros((1, words, 1))}, grid, dtype)
assert problem.shapes()["image_tokens"] == 9600
assert problem.extrapolation() == {"blocks_of_the_model": 60}
"""


@pytest.mark.slow
def test_what_a_card_would_be_asked_for():
    """Production's shapes, traced and not computed; the card itself is what is missing."""
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_CARD],
        cwd=_BENCHMARK.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
