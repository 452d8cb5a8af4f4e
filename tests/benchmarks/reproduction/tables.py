"""Tables, curves and pictures of the reproduction, from its JSON files.

    python tests/benchmarks/reproduction/tables.py

Prints the README's tables, and writes beside the JSON files `curve.svg`, reward and error along the
training; and, where the work folder still holds the layers, `layers.png`: the first held-out
designs, picture, true layers, layers of the base, layers after training.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from arms import ARMS, Arm
from measuring import LAYERS, PRIMARY, SANITY, SIZE, Sizes
from PIL import Image

from sl_jax.data.procedural import make_design
from sl_jax.imaging import on_checkerboard, recompose

RESULTS = Path(__file__).parents[1] / "results" / "reproduction"
_WORDS = {
    "layer_l1_order_free": "order-free L1",
    "layer_l1_mean": "per-layer L1",
    "layer_l1_background": "L1 of the background (Pred 0)",
    "layerd_cost_0": "LayerD cost, no edits",
    "layerd_cost_2": "LayerD cost, up to two edits",
    "layerd_rgb_l1_0": "LayerD RGB-L1",
    "layerd_alpha_iou_0": "LayerD alpha IoU",
    "reward": "judge's score",
    "psnr": "PSNR of the recomposition, dB",
    "blank_rate": "blank layers",
    "duplicate_rate": "duplicate layers",
    "fragment_rate": "layers with fragments",
    "bleed": "bleed",
}
_SETS = {"B": "Held-out B", "C": "Held-out C", "B2": "Held-out B with two layers"}
_SHOWN, _GAP, _MAGNIFIED = 8, 6, 2

Result = Mapping[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given, _ = parser.parse_known_args()
    results = read_results(given.results)
    for part in (headline(results), controls(results), ablations(results), ratios(results)):
        print("\n".join(part) + "\n")
    tuned = _of(results, "tuned")
    if tuned:
        _curve(tuned, given.results / "curve.svg")
    layers = given.work / "tuned_0" / "held_out_B" / "layers"
    if layers.is_dir():
        picture = _picture(layers, Sizes().held_out_seeds[:_SHOWN])
        picture.save(given.results / "layers.png", optimize=True)


def read_results(folder: Path) -> list[Result]:
    """All results, in the order of the arms and their seeds."""
    order = {arm.name: place for place, arm in enumerate(ARMS)}
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: (order[result["arm"]], result["seed"]))


def headline(results: Sequence[Result]) -> list[str]:
    """Base and tuned on the held-out sets: one table per set, a column per seed."""
    tuned, lines = _of(results, "tuned"), []
    for name, what in _SETS.items() if tuned else ():
        seeds = " | ".join(f"seed {result['seed']}" for result in tuned)
        lines += [f"{what}:", "", f"| | base | {seeds} |", _rule(2 + len(tuned))]
        for measure in PRIMARY | SANITY:
            cells = [result["held_out"][name][measure] for result in tuned]
            row = [_WORDS[measure], _number(measure, cells[0]["before"])]
            lines.append(_row(row + [_change(measure, cell) for cell in cells]))
        lines.append("")
    return lines


def controls(results: Sequence[Result]) -> list[str]:
    """What the tuned adapters are beside: changes from the base on held-out B."""
    rows = [r for r in results if r["arm"] in _names("controls") or r["arm"] == "tuned"]
    if not rows:
        return []
    measures = ("layer_l1_order_free", "layerd_cost_0", "layerd_cost_2", "reward", "psnr")
    lines = [_row(["arm", *(_WORDS[m] for m in measures), "minutes"]), _rule(2 + len(measures))]
    for result in rows:
        cells = [_change(m, result["held_out"]["B"][m]) for m in measures]
        name = f"{_arm(result).what}, seed {result['seed']}"
        lines.append(_row([name, *cells, f"{result['seconds'] / 60:.0f}"]))
    return lines


def ablations(results: Sequence[Result]) -> list[str]:
    """Changes from the base on the development set, sampled as suits the base."""
    rows = [r for r in results if r["arm"] in _names("ablations")]
    if not rows:
        return []
    measures = ("layer_l1_order_free", "layerd_cost_0", "layerd_cost_2", "reward", "blank_rate")
    head = ["arm", *(_WORDS[m] for m in measures), "training reward, first to last eighth"]
    lines = [_row(head), _rule(len(head))]
    for result in rows:
        cells = [_change(m, result["against_base"][m]) for m in measures]
        lines.append(_row([_arm(result).what, *cells, _gain(result)]))
    return lines


def ratios(results: Sequence[Result]) -> list[str]:
    """Does one clip range mean the same at every size? Share clipped at each.

    Of policies that have moved as far it clips as much where the last column is 1.
    """
    rows = [r for r in results if r["arm"] in _names("ratios")]
    if not rows:
        return []
    by_arm = {result["arm"]: result for result in rows}
    head = ["arm", "clip range", "clipped", "spread of the ratio", "per movement, 64 px: 1"]
    lines = [_row(head), _rule(len(head))]
    for result in rows:
        log, clip = result["training"]["all"], result["settings"]["objective.clip_low"]
        clipped = log["learner/clipped_low/all"] + log["learner/clipped_high/all"]
        spread = log["learner/ratio_std/all"]
        middle = f"{result['settings']['objective.ratio']}_{SIZE}"
        moved = ""
        if middle in by_arm:
            per, of = (r["training"]["spread_per_movement"] for r in (result, by_arm[middle]))
            moved = f"{per / of:.2f}"
        cells = [_arm(result).what, clip, f"{100 * clipped:.1f} %", f"{spread:.2e}", moved]
        lines.append(_row(cells))
    return lines


def _of(results: Sequence[Result], arm: str) -> list[Result]:
    return [result for result in results if result["arm"] == arm]


def _names(part: str) -> set[str]:
    return {arm.name for arm in ARMS if arm.part == part}


def _arm(result: Result) -> Arm:
    return next(arm for arm in ARMS if arm.name == result["arm"])


def _gain(result: Result) -> str:
    if "training" not in result:
        return ""
    first, last = (result["training"][when]["judge/reward_mean"] for when in ("first", "last"))
    return f"{first:.3f} → {last:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return _row(["---"] * columns)


def _digits(measure: str) -> int:
    return {"psnr": 2, "reward": 4}.get(measure, 4)


def _number(measure: str, value: float) -> str:
    return f"{value:.{_digits(measure)}f}"


def _change(measure: str, cell: Mapping[str, float]) -> str:
    """The change with its interval, and as a share of what was before for errors."""
    digits = _digits(measure)
    told = f"{cell['change']:+.{digits}f} ({cell['low']:+.{digits}f} … {cell['high']:+.{digits}f})"
    if (PRIMARY | SANITY)[measure] < 0 and cell["before"]:
        told += f", {100 * cell['change'] / cell['before']:+.0f} %"
    return told.replace("-", "−")


def _curve(tuned: Sequence[Result], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = ("judge's score", "order-free L1 to the true layers", "recomposition PSNR, dB")
    names = ("reward", "layer_l1_order_free", "psnr")
    for panel, title, name in zip(panels, titles, names, strict=True):
        for result in tuned:
            epochs = [point["epoch"] for point in result["curve"]]
            values = [point[name] for point in result["curve"]]
            panel.plot(epochs, values, "o-", label=f"seed {result['seed']}")
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})


def _picture(layers: Path, seeds: Sequence[int]) -> Image.Image:
    """[picture | true layers | layers of the base | tuned], a design per row."""
    rows = []
    for seed in seeds:
        true = make_design("B", seed, SIZE, LAYERS).layers
        folders = [layers / name / f"B-{seed:06d}" for name in ("base", "tuned")]
        made = [[np.asarray(Image.open(p)) for p in sorted(f.glob("*.png"))] for f in folders]
        parts = [np.asarray(recompose(true))]
        for stack in (true, *made):
            parts += [np.full((SIZE, _GAP, 3), 255, np.uint8), *map(on_checkerboard, stack)]
        rows.append(np.concatenate(parts, axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * _MAGNIFIED, sheet.height * _MAGNIFIED), Image.NEAREST)


if __name__ == "__main__":
    main()
