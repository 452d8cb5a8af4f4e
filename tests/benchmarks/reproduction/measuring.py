"""Development and held-out sets, and what base and adapters do on them.

Sampler, steps and guidance of every system are chosen on the development set, by the order-free L1;
the held-out sets are then measured once, each system with its own choice and from the same noise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sl_jax.eval.judging import JudgeChoice
from sl_jax.eval.options import SamplerChoice
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.systems import Model, ModelConfig, System
from sl_jax.inference.fingerprints import checkpoint_digest
from sl_jax.inference.prompts import DEFAULT_PROMPT

SIZE, LAYERS = 64, 3
CHOSEN_BY = "layer_l1_order_free"
PRIMARY = {
    "layer_l1_order_free": -1,
    "layer_l1_mean": -1,
    "layer_l1_background": -1,
    "layerd_cost_0": -1,
    "layerd_cost_2": -1,  # three layers know no third edit
    "layerd_rgb_l1_0": -1,
    "layerd_alpha_iou_0": +1,
}
SANITY = {
    "reward": +1,
    "psnr": +1,
    "blank_rate": -1,
    "duplicate_rate": -1,
    "fragment_rate": -1,
    "bleed": -1,
}
_BATCH, _SEED = 32, 42


class Setting(NamedTuple):
    """How a system is sampled."""

    sampler: SamplerChoice
    guidance: float = 1.0

    def __str__(self) -> str:
        return f"{self.sampler}, guidance {self.guidance:g}"


SETTINGS = tuple(
    Setting(SamplerChoice(method, steps), guidance)
    for guidance, choices in {
        1.0: {"euler": (1, 2, 3, 4, 6, 10, 20), "heun": (4, 10)},
        1.5: {"euler": (2, 4, 10)},
        4.0: {"euler": (2, 4, 10)},  # the base model's README
    }.items()
    for method, counts in choices.items()
    for steps in counts
)


@dataclass(frozen=True)
class Sizes:
    """How many designs there are of each set; their seeds are far from each other's.

    Attributes:
        training: of family B, flattened; with layers for supervised training.
        development: of B.
        held_out: of B, and of C.
    """

    training: int = 1024
    development: int = 128
    held_out: int = 256

    @property
    def training_seeds(self) -> range:
        """From 100,000, as the quickstart's."""
        return range(100_000, 100_000 + self.training)

    def sets_of(self, part: str) -> dict[str, str]:
        """What an arm of a part is measured on, so that its result is not taken for another's."""
        if part == "ratios":
            return {}
        seeds = self.held_out_seeds
        sets = {"development": self.development_set}
        if part != "ablations":
            sets |= {"B": self.held_out_set, "C": f"artwork:{len(seeds)}:{seeds.start}"}
        if part == "headline":
            sets["B2"] = self.two_layers_set
        return sets

    @property
    def development_set(self) -> str:
        """As `sl_jax.evaluate` takes it."""
        return f"procedural:B:{self.development}:{LAYERS}:{SIZE}:2000000"

    @property
    def held_out_seeds(self) -> range:
        """Of B and of C. The first designs, from 0, were looked at while the judge was made."""
        return range(3_000_000, 3_000_000 + self.held_out)

    @property
    def held_out_set(self) -> str:
        """As `sl_jax.evaluate` takes it."""
        return self._held_out(LAYERS)

    @property
    def two_layers_set(self) -> str:
        """Likewise, of a backdrop and one object, which no training by reward has seen."""
        return self._held_out(2)

    def _held_out(self, layers: int) -> str:
        seeds = self.held_out_seeds
        return f"procedural:B:{len(seeds)}:{layers}:{SIZE}:{seeds.start}"


class Trained(NamedTuple):
    """A system by name: the base with an adapter, or alone where that is None."""

    name: str
    adapter: Path | None


def base_digest() -> str:
    """Of the base's checkpoint, which no arm may change."""
    return checkpoint_digest("tiny")


def developed(trained: Trained, data: str, folder: Path) -> dict[str, float]:
    """The mean order-free L1 on the development set, by setting."""
    systems = [_system(trained, setting, str(setting)) for setting in SETTINGS]
    records = records_of(data, folder, systems, ("stable_layers",))
    found: dict[str, list[float]] = {str(setting): [] for setting in SETTINGS}
    for record in records:
        found[record["model"]].append(record[CHOSEN_BY])
    return {name: sum(values) / len(values) for name, values in found.items()}


def best(development: dict[str, float]) -> Setting:
    """The setting with the least L1."""
    name = min(development, key=development.__getitem__)
    return next(setting for setting in SETTINGS if str(setting) == name)


def sampled(trained: Trained, setting: Setting, seed: int = _SEED) -> System:
    """A system as it is measured."""
    return _system(trained, setting, trained.name, seed)


def records_of(
    data: str, folder: Path, systems: Sequence[System], protocols: tuple[str, ...]
) -> list[dict]:
    """One record per system and picture; what the folder has already is not made again."""
    judged = "judge" in protocols
    config = EvaluationConfig(
        data=data,
        output=str(folder),
        protocols=protocols,
        judge=JudgeChoice(("embedded",)) if judged else None,
        base=systems[0].name,
        baselines=False,
        shown=24,
    )
    evaluate(config, systems)
    records = json.loads((folder / "report.json").read_text())["records"]
    return [_carried(record) for record in records] if "layerd" in protocols else records


def _carried(record: dict) -> dict:
    """The LayerD protocol: a design that knows no further edit keeps its score."""
    once = record.get("layerd_cost_1", record["layerd_cost_0"])
    return {"layerd_cost_2": once} | record


def _system(trained: Trained, setting: Setting, name: str, seed: int = _SEED) -> System:
    model = _model(trained, setting.guidance, seed)
    return model.system(name, trained.name if trained.adapter else None, setting.sampler)


@cache
def _model(trained: Trained, guidance: float, seed: int) -> Model:
    config = ModelConfig(
        "tiny",
        DEFAULT_PROMPT,
        guidance=guidance,
        dtype="float32",
        seed=seed,
        batch=_BATCH,
    )
    return Model(config, {trained.name: str(trained.adapter)} if trained.adapter else {})
