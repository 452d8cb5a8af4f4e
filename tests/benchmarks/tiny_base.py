"""Quality of a base model on held-out procedural designs, beside the baselines.

    python tests/benchmarks/tiny_base.py --output tests/benchmarks/results/tiny_base.json

Designs of seeds 0 … N − 1, which `sft` never trains on. Rows: the autoencoder alone (the floor
under every other row), each sampler and number of steps, and three baselines. All with bootstrap
intervals over designs.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sl_jax.checkpoints.pipeline import ComputeConfig, Pipeline, load_pipeline
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data.procedural import make_design
from sl_jax.eval.baselines import BASELINES
from sl_jax.eval.bootstrap import interval
from sl_jax.eval.layerd import layerd_scores
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.imaging import recompose
from sl_jax.inference.decomposer import Decomposer
from sl_jax.inference.prompts import DEFAULT_PROMPT, encode_prompts
from sl_jax.models.codec import decode_frames, encode_frames
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--family", default="A")
    parser.add_argument("--designs", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 20, 30, 50])
    parser.add_argument("--methods", nargs="*", default=["euler", "heun"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    designs = np.stack(
        [
            make_design(arguments.family, seed, arguments.size, arguments.layers).layers
            for seed in range(arguments.designs)
        ]
    )
    pictures = np.stack([recompose(design) for design in designs])
    folder = resolve_model(arguments.model)
    layout = Layout(make_mesh(MeshConfig()))
    pipeline = load_pipeline(folder, ComputeConfig("float32", remat="none"), layout)
    rows = {"autoencoder": _batched(partial(_reconstructed, pipeline), designs)}
    for name, baseline in BASELINES.items():
        rows[name] = np.stack([baseline(picture, arguments.layers) for picture in pictures])
    text = encode_prompts(folder, [DEFAULT_PROMPT], dtype=np.float32).hidden
    decomposer = Decomposer(pipeline)
    for method in arguments.methods:
        for steps in arguments.steps:
            sample = partial(_sampled, decomposer, text, arguments.layers, steps, method)
            rows[f"{method}, {steps} steps"] = _batched(sample, pictures)
    results = {name: _scores(predicted, designs, pictures) for name, predicted in rows.items()}
    for name, scores in results.items():
        line = (f"{key} {value['mean']:.4f}" for key, value in scores.items())
        print(f"{name:20}", "  ".join(line), flush=True)
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k != "output"}
        content = {
            "settings": settings,
            "device": platform.machine(),
            "jax": jax.__version__,
            "rows": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def _batched(function: Callable[[np.ndarray, int], jax.Array], values: np.ndarray) -> np.ndarray:
    """Applies `function` to batches of one size, the last one filled up."""
    parts = []
    for start in range(0, len(values), _BATCH):
        batch = values[start : start + _BATCH]
        fill = np.repeat(batch[-1:], _BATCH - len(batch), axis=0)
        parts.append(np.asarray(function(np.concatenate([batch, fill]), start))[: len(batch)])
    return np.concatenate(parts)


def _reconstructed(pipeline: Pipeline, designs: np.ndarray, start: int) -> jax.Array:
    del start
    frames = designs.reshape(-1, *designs.shape[2:])
    codec = jax.jit(
        lambda x: decode_frames(
            pipeline.vae, pipeline.vae_params, encode_frames(pipeline.vae, pipeline.vae_params, x)
        )
    )
    return codec(frames).reshape(designs.shape)


def _sampled(
    decomposer: Decomposer,
    text: np.ndarray,
    layers: int,
    steps: int,
    method: str,
    pictures: np.ndarray,
    start: int,
) -> jax.Array:
    keys = jax.vmap(jax.random.key)(jnp.arange(start, start + len(pictures)))
    words = jnp.repeat(text, len(pictures), axis=0)
    settings = {"layers": layers, "steps": steps, "method": method}
    return decomposer(jnp.asarray(pictures), words, None, keys, **settings).layers


def _scores(predicted: np.ndarray, designs: np.ndarray, pictures: np.ndarray) -> dict:
    columns: dict[str, list[float]] = {}
    for made, true, picture in zip(predicted, designs, pictures, strict=True):
        layerd, l1 = layerd_scores(made, true, 0)[0], layer_l1(made, true)
        row = {
            "layerd_cost": layerd.cost,
            "layerd_rgb_l1": layerd.rgb_l1,
            "layerd_alpha_iou": layerd.alpha_iou,
            "layer_l1": l1.mean,
            "layer_l1_order_free": l1.order_free,
            "background_l1": l1.background,
            "psnr": reference_free(made, picture).psnr,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(float(value))
    summary = {name: interval(values) for name, values in columns.items()}
    return {name: value._asdict() for name, value in summary.items()}


if __name__ == "__main__":
    main()
