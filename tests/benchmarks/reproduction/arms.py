"""The arms of the miniature reproduction: what each is trained with, and why it is there."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Settings = Mapping[str, str]


class Arm(NamedTuple):
    """One line of the reproduction's tables.

    Attributes:
        name: as files and tables call it.
        what: one line for people.
        kind: "rl" trains by reward, "pairs" on true layers, "best_of" chooses among samples of the
            base, "base" is the base.
        part: the table that it stands in, which decides what is measured: "headline" and "controls"
            on the held-out sets; "ablations", which defaults may follow, on the development set
            alone, sampled as suits the base; "ratios" nothing but the training's own log.
        settings: fields of the configuration, beyond those of its kind.
        seeds: of the training.
    """

    name: str
    what: str
    kind: Literal["rl", "pairs", "best_of", "base"]
    part: Literal["headline", "controls", "ablations", "ratios"]
    settings: Settings = MappingProxyType({})
    seeds: tuple[int, ...] = (0,)


def _schedule(epochs: int) -> Settings:
    """The learning rate falls to nothing over the epochs."""
    return {
        "epochs": str(epochs),
        "optimizer.decay_steps": str(epochs),
        "checkpoint.every": str(min(epochs // 3, 10)),
        "checkpoint.keep": "10",
        "evaluation.every": str(epochs),
    }


def _groups(size: int, candidates: int, at_once: int = 128) -> Settings:
    """Groups of a size, as many as make so many candidates an epoch, and how many at a time."""
    return {
        "rollout.group_size": str(size),
        "rollout.groups": str(candidates // size),
        "rollout.batch_groups": str(at_once // size),
    }


def _steps(steps: int) -> Settings:
    """All steps but the last are stochastic, and trained."""
    return {
        "rollout.steps": str(steps),
        "rollout.window_size": str(steps - 1),
        "rollout.window_range": f"(0, {steps - 1})",
    }


# What training by reward takes beyond configs/grpo.py:tiny, and supervised training beyond
# configs/sft.py:tiny; chosen on the development set.
RECIPE: Settings = {
    **_schedule(40),
    **_groups(8, 512),
    **_steps(2),
    "optimizer.learning_rate": "5e-4",
    "learner.updates": "1",
    "learner.micro_batch": "128",
    "learner.ema": "0.97",
    # The precise judge says in a grid what it says of each alone.
    "judge.two_stage": "False",
    # One device is faster on one core than two.
    "distributed.cpu_devices": "1",
}
PAIRS: Settings = {"steps": "3000", "eval_every": "500", "checkpoint_every": "500"}
# Ablations vary a smaller recipe, in which there is more to vary: three of four steps.
_SMALL: Settings = {**_groups(8, 128), **_steps(4), "optimizer.learning_rate": "1e-3"}
_VLM: Settings = {"judge.endpoint": "embedded-vlm"}
# One clip range per ratio: about its spread at 64 px in a first epoch's second update. A frame is
# four tokens at 32 px, 16 at 64 px, 64 at 128 px.
_CLIPS = {"plain": 1.3e-4, "guard": 1.4e-4, "velocity": 2.8e-2}
_SIDES = (32, 64, 128)


def _ablation(name: str, what: str, settings: Settings) -> Arm:
    return Arm(name, what, "rl", "ablations", {**_SMALL, **_schedule(30), **settings})


def _ratio(ratio: str, side: int) -> Arm:
    clip = str(_CLIPS[ratio])
    settings = {
        **_SMALL,
        **_schedule(6),
        "optimizer.decay_steps": "0",
        "rollout.groups": "4",
        "rollout.batch_groups": "2",
        "learner.updates": "2",
        "learner.micro_batch": "16",
        "objective.ratio": ratio,
        "objective.clip_low": clip,
        "objective.clip_high": clip,
        "data.buckets": f"(({side}, {side}),)",
    }
    return Arm(f"{ratio}_{side}", f"ratio {ratio} at {side} px", "rl", "ratios", settings)


ARMS = (
    Arm("base", "the base at its own best settings", "base", "headline"),
    Arm("tuned", "Flow-GRPO by the judge's scores", "rl", "headline", seeds=(0, 1, 2)),
    Arm(
        "shuffled",
        "the same with rewards shuffled within groups",
        "rl",
        "controls",
        {"rewards": '(("controls.shuffled", 1.0),)'},
    ),
    Arm("best_of", "best of 8 samples of the base by the judge's score", "best_of", "controls"),
    Arm("pairs", "supervised training on the same designs with their layers", "pairs", "controls"),
    _ablation("small", "three of four steps stochastic and trained, G = 8, rank 16", {}),
    _ablation(
        "vlm_one_stage", "VLM-like judge, stage 1 alone", {**_VLM, "judge.two_stage": "False"}
    ),
    _ablation("vlm_two_stages", "VLM-like judge, both stages", {**_VLM, "judge.two_stage": "True"}),
    _ablation("group_4", "G = 4, as many candidates", _groups(4, 128)),
    _ablation("group_16", "G = 16, as many candidates", _groups(16, 128)),
    _ablation(
        "independent",
        "each candidate its own initial noise",
        {"rollout.group_noise": "independent"},
    ),
    _ablation("window", "one of those three steps", {"rollout.window_size": "1"}),
    _ablation(
        "all_steps",
        "all four steps",
        {"rollout.window_size": "4", "rollout.window_range": "(0, 4)"},
    ),
    _ablation(
        "truth",
        "rewarded by the true layers' order-free L1 in the judge's place",
        {
            "rewards": '(("controls.truth", 1.0), ("recomposition_veto", 1.0),'
            ' ("all_blank_veto", 1.0))',
            "advantage.std_floor": "0.001",  # errors lie closer together than scores
        },
    ),
    _ablation("rank_4", "LoRA rank 4", {"lora.rank": "4", "lora.alpha": "8"}),
    _ablation("rank_64", "LoRA rank 64", {"lora.rank": "64", "lora.alpha": "128"}),
    *(_ratio(ratio, side) for ratio in _CLIPS for side in _SIDES),
)
