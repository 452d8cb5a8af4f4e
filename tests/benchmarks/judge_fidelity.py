"""How well the judge ranks the candidates of a group, against true layers: does stage 2 pay?

    python tests/benchmarks/judge_fidelity.py --output tests/benchmarks/results/judge_fidelity.json

Candidates are rollouts of a model on procedural designs, as training samples them. Every row is a
judge: the precise embedded one, and its VLM-like mode at several levels of noise. Reported is the
Spearman correlation within groups of stage 1, of stage 2 and of the final reward, with the
precise judge's stage 1, with −L1 to the true layers (index-wise and order-free) and with the
negative LayerD cost; means over groups with bootstrap intervals.
"""

import argparse
import asyncio
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data.procedural import make_design
from sl_jax.eval.bootstrap import interval
from sl_jax.eval.layerd import layerd_scores
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.flow.sampler import window_starts
from sl_jax.grpo.config import RolloutConfig
from sl_jax.grpo.rollout import Pictures, Rollout
from sl_jax.imaging import recompose
from sl_jax.inference.prompts import DEFAULT_PROMPT, encode_prompts
from sl_jax.models.lora import LoRAConfig, init_adapter
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.scoring import EmbeddedConfig, EmbeddedJudge, Group, GroupScores, TwoStageJudge
from sl_jax.scoring.stats import rank_correlation, spread

_NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)  # points of 10; of the grid, four times as many of 100
FIRST_SEED = 5_000_000  # of the designs
_BATCH = 8
_FILES = ("output", "candidates", "plot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--family", default="B")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--window-size", type=int, default=4)
    parser.add_argument("--candidates", type=Path, help="file that keeps the candidates")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG file; needs matplotlib")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.groups)
    designs = [
        make_design(arguments.family, seed, arguments.size, arguments.layers).layers
        for seed in seeds
    ]
    kept = arguments.candidates
    if kept and kept.exists():
        candidates = np.load(kept)
    else:
        candidates = _rolled_out(arguments, np.stack([recompose(d) for d in designs]))
        if kept:
            np.save(kept, candidates)
    groups = [
        Group(f"{arguments.family}-{seed}", recompose(design), tuple(made))
        for seed, design, made in zip(seeds, designs, candidates, strict=True)
    ]
    results = _rows(groups, _truths(groups, designs))
    for name, row in results.items():
        print(f"{name:12}", "  ".join(f"{k} {v['mean']:.3f}" for k, v in row.items()), flush=True)
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k not in _FILES}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": settings, "rows": results}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        _plot(results, arguments.plot)


def _rolled_out(arguments: argparse.Namespace, pictures: np.ndarray) -> np.ndarray:
    """uint8 [groups, G, L, H, W, 4]: rollouts, with the window at every place in turn."""
    folder = resolve_model(arguments.model)
    layout = Layout(make_mesh(MeshConfig()))
    pipeline = load_pipeline(folder, ComputeConfig("float32", remat="none"), layout)
    text = encode_prompts(folder, [DEFAULT_PROMPT], dtype=np.float32).hidden
    adapter = init_adapter(jax.random.key(0), pipeline.params, LoRAConfig(rank=4, alpha=4.0))
    config = RolloutConfig(
        group_size=arguments.group_size,
        window_size=arguments.window_size,
        window_range=(0, arguments.window_size + 2),
    )
    rollout, side = Rollout(pipeline, config, layout), arguments.size // PACKED_PIXELS
    grid = LatentGrid(arguments.layers, side, side)
    starts = window_starts(config.window_range, config.window_size)
    made = []
    for start in range(0, len(pictures), _BATCH):
        batch = pictures[start : start + _BATCH]
        full = np.concatenate([batch, np.repeat(batch[-1:], _BATCH - len(batch), axis=0)])
        keys = jax.vmap(jax.random.key)(jnp.arange(start, start + _BATCH))
        words = jnp.repeat(jnp.asarray(text), _BATCH, axis=0)
        window = starts[(start // _BATCH) % len(starts)]
        latents = rollout(adapter, Pictures(jnp.asarray(full), words, None, keys), window, grid)
        layers = np.asarray(rollout.decode(latents.latents, grid).layers)
        made.append(layers.reshape(_BATCH, arguments.group_size, *layers.shape[1:])[: len(batch)])
    return np.concatenate(made)


def _truths(groups: list[Group], designs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Per group and candidate [groups, G], higher is better."""
    columns: dict[str, list[list[float]]] = {"l1": [], "order_free_l1": [], "layerd": []}
    for group, design in zip(groups, designs, strict=True):
        l1 = [layer_l1(layers, design) for layers in group.candidates]
        columns["l1"].append([-x.mean for x in l1])
        columns["order_free_l1"].append([-x.order_free for x in l1])
        columns["layerd"].append([-layerd_scores(x, design, 0)[0].cost for x in group.candidates])
    return {name: np.array(values) for name, values in columns.items()}


def _rows(groups: list[Group], truths: dict[str, np.ndarray]) -> dict[str, dict[str, dict]]:
    precise = asyncio.run(_judged(EmbeddedConfig(), groups))
    truths = {"precise": np.stack([scores.stage1 for scores in precise]), **truths}
    rows = {"precise": _row(precise, truths)}
    for noise in _NOISE_LEVELS:
        config = EmbeddedConfig(mode="vlm", noise=noise, grid_noise=4 * noise)
        rows[f"vlm {noise:g}"] = _row(asyncio.run(_judged(config, groups)), truths)
    return rows


async def _judged(config: EmbeddedConfig, groups: list[Group]) -> list[GroupScores]:
    judge = TwoStageJudge(EmbeddedJudge(config))
    return [await judge.judge(group) for group in groups]


def _row(judged: list[GroupScores], truths: dict[str, np.ndarray]) -> dict[str, dict]:
    row = {}
    for stage in ("stage1", "stage2", "reward"):
        scores = [getattr(group, stage) for group in judged]
        row[f"{stage}_spread"] = interval([spread(s) for s in scores])._asdict()
        for name, truth in truths.items():
            ranks = [rank_correlation(s, t) for s, t in zip(scores, truth, strict=True)]
            # candidates that all get one score are ranked no better than by chance
            row[f"{stage}_{name}"] = interval(np.nan_to_num(ranks))._asdict()
    return row


def _plot(results: dict[str, dict[str, dict]], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), sharex=True, layout="constrained")
    panels[0].set_title("with the uncompressed judge")
    panels[1].set_title("with −L1 to the true layers, order-free")
    rows = [results[f"vlm {noise:g}"] for noise in _NOISE_LEVELS]
    for panel, truth in zip(panels, ("precise", "order_free_l1"), strict=True):
        for stage, label in (("stage1", "stage 1 alone"), ("reward", "final reward")):
            values = [row[f"{stage}_{truth}"] for row in rows]
            line = panel.plot(_NOISE_LEVELS, [v["mean"] for v in values], "o-", label=label)[0]
            low, high = ([v[end] for v in values] for end in ("low", "high"))
            panel.fill_between(_NOISE_LEVELS, low, high, color=line.get_color(), alpha=0.15)
        precise = results["precise"][f"stage1_{truth}"]["mean"]
        panel.axhline(precise, color="grey", linestyle=":", label="uncompressed judge")
        panel.set_xlabel("noise of a criterion, points of 10")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("Spearman within groups")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
