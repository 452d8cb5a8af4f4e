"""The paper's claims in miniature: arms trained and measured, one JSON file each.

    bash launch/reproduce.sh [--arm NAME …] [--seed N …]

Tiny base (family A) → Flow-GRPO on flattened designs of family B with the embedded judge → held-out
designs of B and, without further training, of C, with true layers that neither policy nor judge has
ever seen. An arm that is finished is not run again; one that was stopped goes on where it was.
Tables, curves and pictures are made from the files by `tables.py`.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import artwork
import jax
import numpy as np
from arms import ARMS, PAIRS, RECIPE, Arm
from held_out import changes, module
from measuring import (
    LAYERS,
    PRIMARY,
    SANITY,
    SIZE,
    Setting,
    Sizes,
    Trained,
    base_digest,
    best,
    developed,
    records_of,
    sampled,
)

from sl_jax.checkpoints.disk import write_whole
from sl_jax.data import write_designs
from sl_jax.eval.results import file_name
from sl_jax.eval.systems import System, ready_made
from sl_jax.training.metrics import read_metrics

RESULTS = Path(__file__).parents[1] / "results" / "reproduction"
_SAMPLES = 8  # of "best_of"
_BASE = Trained("base", None)
_PROTOCOLS = ("stable_layers", "layerd", "reference_free", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--wheels", type=Path, help="of family C's artwork; see artwork.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--arm", action="append", choices=[arm.name for arm in ARMS])
    parser.add_argument("--seed", action="append", type=int)
    given = parser.parse_args()
    bench = Bench(given.work, given.wheels or given.work / "wheels", given.results)
    for arm in ARMS:
        if given.arm is None or arm.name in given.arm:
            for seed in arm.seeds if given.seed is None else given.seed:
                bench.run(arm, seed)


class Bench:
    """Where the arms are trained and measured.

    Attributes:
        work: pictures, runs and evaluations.
        results: one JSON file per arm and seed.
        sizes: of the sets.
    """

    def __init__(self, work: Path, wheels: Path, results: Path, sizes: Sizes | None = None):
        self.work, self.results = work.resolve(), results.resolve()
        self.sizes = sizes or Sizes()
        self._wheels = wheels

    def run(self, arm: Arm, seed: int) -> None:
        """Trains and measures an arm, unless its result is there.

        Raises:
            ValueError: a result is there, of another base, other settings, or other designs.
        """
        path, digest = self.results / f"{arm.name}_{seed}.json", base_digest()
        made_from = {
            "settings": dict(settings_of(arm)),
            "base_sha256": digest,
            "sets": self.sizes.sets_of(arm.part),
        }
        if path.exists():
            found = json.loads(path.read_text())
            differing = [name for name, value in made_from.items() if found.get(name) != value]
            if differing:
                told = " and ".join(differing)
                raise ValueError(f"{path} was made from other {told}; please move it away")
            return
        print(f"--- {arm.name}, seed {seed}: {arm.what}", flush=True)
        spent = self._folder(arm, seed) / "spent.json"
        with _adding_up(spent):
            trained = self._trained(arm, seed)
            measured = self._measured(arm, seed, trained)
        result = {
            "arm": arm.name,
            "seed": seed,
            "what": arm.what,
            "command": f"bash launch/reproduce.sh --arm {arm.name} --seed {seed}",
            **made_from,
            **measured,
            **{name: round(value) for name, value in json.loads(spent.read_text()).items()},
            "machine": _machine(),
        }
        if base_digest() != digest:
            raise RuntimeError("the base's checkpoint has changed meanwhile")
        self.results.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=1) + "\n")

    def _trained(self, arm: Arm, seed: int) -> Trained:
        """The arm's adapter; the base where it has none."""
        if arm.kind in ("base", "best_of"):
            return _BASE
        run = self._folder(arm, seed) / "run"
        config, data = ("sft", self._pairs()) if arm.kind == "pairs" else ("grpo", self._flat())
        door = {"sft": "sft", "grpo": "train"}[config]
        settings = {"data.path": data, "workdir": run, "seed": seed, **settings_of(arm)}
        module(
            door,
            f"--config=configs/{config}.py:tiny",
            *(f"--config.{name}={value}" for name, value in settings.items()),
        )
        return Trained(arm.name, run / "adapter")

    def _measured(self, arm: Arm, seed: int, trained: Trained) -> dict:
        folder = self._folder(arm, seed)
        if arm.kind == "best_of":
            return self._best_of(arm, folder)
        found = {"training": _training(folder / "run")} if arm.kind == "rl" else {}
        if arm.part == "ratios":
            return found
        data = self.sizes.development_set
        if arm.part == "ablations":
            systems = [sampled(part, self._base_setting()) for part in (_BASE, trained)]
            records = records_of(data, folder / "against_base", systems, _PROTOCOLS)
            return found | {"against_base": changes(records, arm.name, PRIMARY | SANITY)}
        development = developed(trained, data, folder / "development")
        chosen = best(development)
        found |= {"development": development, "chosen": str(chosen)}
        if arm.kind == "rl":
            found["curve"] = self._curve(folder, chosen)
        systems = [] if trained.adapter is None else [sampled(trained, chosen)]
        return found | {"held_out": self._held_out(arm, folder, systems)}

    def _held_out(self, arm: Arm, folder: Path, systems: Sequence[System]) -> dict:
        """By set, the base's measures at its own best, or how a system's differ from them."""
        base = sampled(_BASE, self._base_setting())
        found = {}
        for name, (data, groups) in self._sets(arm.part).items():
            records = records_of(data, folder / f"held_out_{name}", [base, *systems], _PROTOCOLS)
            if systems:
                found[name] = changes(records, systems[-1].name, PRIMARY | SANITY, groups)
            else:
                found[name] = {m: _mean(r[m] for r in records) for m in PRIMARY | SANITY}
        return found

    def _base_setting(self) -> Setting:
        """The base's best, from its result."""
        path = self.results / "base_0.json"
        if not path.exists():
            data = self.sizes.development_set
            return best(developed(_BASE, data, self.work / "base_0" / "development"))
        return best(json.loads(path.read_text())["development"])

    def _best_of(self, arm: Arm, folder: Path) -> dict:
        """Of several samples of the base the one that the judge likes best, picture by picture."""
        setting, found = self._base_setting(), {}
        for name, (data, groups) in self._sets(arm.part).items():
            samples = folder / f"samples_{name}"
            systems = [
                sampled(Trained(f"sample {k}", None), setting, 42 + 10_000 * k)
                for k in range(_SAMPLES)
            ]
            records = records_of(data, samples, systems, ("judge",))
            chosen = folder / f"chosen_{name}"
            for picture, model in _liked(records).items():
                kept = samples / "layers" / file_name(model) / picture
                shutil.copytree(kept, chosen / picture, dirs_exist_ok=True)
            base = sampled(_BASE, setting)
            systems = [base, ready_made("best_of", str(chosen))]
            records = records_of(data, folder / f"held_out_{name}", systems, _PROTOCOLS)
            found[name] = changes(records, "best_of", PRIMARY | SANITY, groups)
        return {"chosen": str(setting), "samples": _SAMPLES, "held_out": found}

    def _curve(self, folder: Path, chosen: Setting) -> list[dict]:
        """Judge's score and order-free L1 on the development set along the training."""
        steps = sorted(
            int(p.name) for p in (folder / "run" / "checkpoints").iterdir() if p.name.isdigit()
        )
        systems = [sampled(_BASE._replace(name="0"), chosen)] + [
            sampled(Trained(str(step), folder / "run" / "checkpoints" / str(step)), chosen)
            for step in steps
        ]
        protocols = ("stable_layers", "reference_free", "judge")
        records = records_of(self.sizes.development_set, folder / "curve", systems, protocols)
        measures = ("reward", "layer_l1_order_free", "psnr")
        return [
            {"epoch": int(system.name)}
            | {m: _mean(r[m] for r in records if r["model"] == system.name) for m in measures}
            for system in systems
        ]

    def _sets(self, part: str) -> dict[str, tuple[str, dict[str, int] | None]]:
        """The held-out sets of a part, and by picture what resampling keeps together."""
        found = {"B": (self.sizes.held_out_set, None), "C": self._artwork()}
        if part == "headline":
            found["B2"] = (self.sizes.two_layers_set, None)
        return found

    def _folder(self, arm: Arm, seed: int) -> Path:
        return self.work / f"{arm.name}_{seed}"

    def _flat(self) -> Path:
        return self._designs("pictures", with_layers=False)

    def _pairs(self) -> Path:
        return self._designs("pairs", with_layers=True)

    def _designs(self, name: str, *, with_layers: bool) -> Path:
        folder = self.work / name
        if not folder.exists():
            partial = self.work / f"{name}.part"
            shutil.rmtree(partial, ignore_errors=True)
            seeds = self.sizes.training_seeds
            write_designs(partial, "B", seeds, SIZE, LAYERS, with_layers=with_layers)
            partial.rename(folder)
        return folder

    def _artwork(self) -> tuple[str, dict[str, int]]:
        """The designs of C, and the photograph behind each: they are few, and cropped often."""
        seeds, read = self.sizes.held_out_seeds, artwork.read_artwork(self._wheels)
        folder = self.work / f"artwork_{seeds.start}_{len(seeds)}"
        if not folder.exists():
            partial = folder.with_suffix(".part")
            shutil.rmtree(partial, ignore_errors=True)
            artwork.write_designs(read, partial, seeds, SIZE, LAYERS)
            partial.rename(folder)
        photographs = {
            artwork.name_of(seed): artwork.compose(read, seed, SIZE, LAYERS).photograph
            for seed in seeds
        }
        return str(folder), photographs


def settings_of(arm: Arm) -> Mapping[str, str]:
    """What an arm is trained with, beyond its configuration file."""
    common = {"rl": RECIPE, "pairs": PAIRS}.get(arm.kind, {})
    return {**common, **arm.settings}


@contextmanager
def _adding_up(path: Path) -> Iterator[None]:
    """Adds what the block takes to what earlier starts took, those killed outright excepted."""
    earlier = json.loads(path.read_text()) if path.exists() else {"seconds": 0, "cpu_seconds": 0}
    began, cpu = time.monotonic(), sum(os.times()[:4])
    try:
        yield
    finally:
        spent = {
            "seconds": earlier["seconds"] + time.monotonic() - began,
            "cpu_seconds": earlier["cpu_seconds"] + sum(os.times()[:4]) - cpu,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(spent))


def _liked(records: Sequence[dict]) -> dict[str, str]:
    """By picture, the system that the judge scored highest."""
    scored = [record for record in records if record["reward"] is not None]
    scored.sort(key=lambda record: record["reward"])
    return {record["picture"]: record["model"] for record in scored}


def _training(run: Path) -> dict:
    """What the training's own log says of its beginning, its end and all of it; its seconds.

    Epochs in which no group's rewards differ have no update, and tell nothing of one.
    """
    log = [record for record in read_metrics(run) if "judge/reward_mean" in record]
    eighth = len(log) // 8 + 1
    parts = {"first": log[:eighth], "last": log[-eighth:], "all": log}
    watched = (
        "judge/reward_mean",
        "judge/stage1_mean",
        "judge/reward_spread",
        "learner/clipped_low/all",
        "learner/clipped_high/all",
        "learner/ratio_std/all",
    )
    return {
        "epochs": len(log),
        "epochs_with_an_update": sum(watched[-1] in record for record in log),
        "spread_per_movement": _spread_per_movement(log),
        "seconds": round(sum(record.get("seconds/all", 0.0) for record in log)),
    } | {
        when: {name: _mean(record.get(name) for record in part) for name in watched}
        for when, part in parts.items()
    }


def _spread_per_movement(log: Sequence[Mapping[str, float]]) -> float | None:
    """The ratio's spread for a policy that moves by a standard deviation of its noise.

    The KL per element is half the square of that movement. Geometric mean over epochs and steps;
    None if the policy was never seen to have moved.
    """
    found = []
    for record in log:
        for name, spread in record.items():
            head, _, step = name.rpartition("/")
            if head == "learner/ratio_std" and step != "all" and spread:
                found.append(spread / math.sqrt(2 * record[f"learner/kl_old/{step}"]))
    return statistics.geometric_mean(found) if found else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _machine() -> dict[str, str]:
    packages = {name: version(name) for name in ("jax", "flax", "optax")}
    return {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        **packages,
    }


if __name__ == "__main__":
    main()
