"""Does the quickstart's training make layers better, on more than one seed?

    python tests/benchmarks/training_moves.py --work runs/moves \
        --output tests/benchmarks/results/training_moves.json \
        --figure tests/benchmarks/results/training_moves.png

Trains with the quickstart's own settings and pictures, once per seed, and evaluates base and
adapters on held-out designs of family B with their true layers: same pictures, same noise, the
averaged adapter, the evaluation sampler of the training. Stopped and started again, it goes on.

The judge's score is what was trained; the other measures know the true layers, which neither policy
nor judge ever saw. Errors are of the bootstrap over pictures, paired. The figure has the first
designs: picture, true layers, layers of the base, layers of the first seed's adapter.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from held_out import changes, module, read_records
from PIL import Image

from sl_jax.data import write_designs
from sl_jax.data.procedural import make_design
from sl_jax.imaging import on_checkerboard, recompose
from sl_jax.training.metrics import read_metrics

_PICTURES = range(100_000, 100_256)  # as launch/quickstart.sh draws them
_SIZE, _LAYERS = 64, 3
_MEASURES = {
    "reward": +1,
    "layer_l1_order_free": -1,
    "layer_l1_mean": -1,
    "layerd_cost_0": -1,
    "psnr": +1,
}
_GAP, _MAGNIFIED = 6, 2  # pixels between parts of the figure; size of a picture's pixel in it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/moves"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--designs", type=int, default=256, help="held-out designs of family B")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--shown", type=int, default=8, help="designs in the figure")
    arguments, settings = parser.parse_known_args()  # the rest are --config.field=value
    pictures = arguments.work / "pictures"
    if not pictures.exists():
        write_designs(pictures, "B", _PICTURES, _SIZE, _LAYERS)
    runs = [arguments.work / f"seed_{seed}" for seed in arguments.seeds]
    for seed, run in zip(arguments.seeds, runs, strict=True):
        module("train", *_training(pictures, run, seed), *settings)
    evaluation = arguments.work / "evaluation"
    module("evaluate", *_evaluation(runs, arguments.designs, evaluation))
    records = read_records(evaluation)
    result = {
        "pictures": arguments.designs,
        "settings": settings,
        "seeds": {run.name: _moves(run, records) for run in runs},
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        _figure(evaluation, runs[0].name, arguments.shown).save(arguments.figure, optimize=True)


def _training(pictures: Path, run: Path, seed: int) -> list[str]:
    return [
        "--config=configs/grpo.py:tiny",
        f"--config.data.path={pictures}",
        f"--config.workdir={run}",
        f"--config.seed={seed}",
    ]


def _evaluation(runs: Sequence[Path], designs: int, output: Path) -> list[str]:
    return [
        "--model=tiny",
        *(f"--adapter={run.name}={run / 'adapter'}" for run in runs),
        f"--data=procedural:B:{designs}:{_LAYERS}:{_SIZE}",
        "--judge=embedded",
        "--protocols=stable_layers,layerd,reference_free,judge",
        "--sampler=heun:20",
        f"--output={output}",
    ]


def _moves(run: Path, records: Sequence[dict]) -> dict:
    """What one training changed: in its own evaluations, and on the held-out designs."""
    own = [r for r in read_metrics(run) if r.get("evaluation/reward") is not None]
    ends = {"before": own[0], "after": own[-1]}
    return {
        "training_evaluation": {
            when: {k.removeprefix("evaluation/"): v for k, v in r.items() if "evaluation/" in k}
            for when, r in ends.items()
        },
        "held_out": changes(records, run.name, _MEASURES),
    }


def _figure(evaluation: Path, tuned: str, shown: int) -> Image.Image:
    """[picture | true layers | layers of the base | tuned], a design per row."""
    rows = []
    for seed in range(shown):
        true = make_design("B", seed, _SIZE, _LAYERS).layers
        folders = [evaluation / "layers" / model / f"B-{seed:06d}" for model in ("base", tuned)]
        made = [[np.asarray(Image.open(p)) for p in sorted(f.glob("*.png"))] for f in folders]
        parts = [np.asarray(recompose(true))]
        for layers in (true, *made):
            parts += [np.full((_SIZE, _GAP, 3), 255, np.uint8), *map(on_checkerboard, layers)]
        rows.append(np.concatenate(parts, axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * _MAGNIFIED, sheet.height * _MAGNIFIED), Image.NEAREST)


if __name__ == "__main__":
    main()
