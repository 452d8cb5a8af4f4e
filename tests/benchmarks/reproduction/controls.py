"""Rewards of the reproduction's controls."""

import hashlib
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from measuring import LAYERS, SIZE, Sizes

from sl_jax.data.procedural import Design, make_design
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.scoring import Group, GroupScores
from sl_jax.scoring.rewards import Rewards

_DEFAULT = Rewards()
_BLOCK = 8  # pixels of what a picture is recognised by
_ALIKE = 3.0  # levels of 255, on the mean: JPEG changes less, another design more


def shuffled(group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
    """The default's rewards, dealt out anew among those of a group that have one: no information.

    The order follows from the group's name, so that a run that goes on repeats it. What training
    with these still improves, the judge is not the cause of.
    """
    digest = hashlib.sha256(group.group_id.encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, "<u8"))
    rewards = _DEFAULT(group, scores).reward.copy()
    known = np.isfinite(rewards)
    rewards[known] = generator.permutation(rewards[known])
    return rewards


def truth(group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
    """One minus the order-free L1 to the true layers, which no judge can see.

    Beside what a judge's rewards teach, it tells the algorithm's part from the judge's.

    Raises:
        ValueError: the picture is none of the training designs of family B.
    """
    kept, prints = _training_designs()
    distances = np.abs(prints - _print(group.source)).mean(axis=1)
    nearest = int(distances.argmin())
    if distances[nearest] > _ALIKE:
        raise ValueError(f"group {group.group_id}: its picture is no training design of B")
    true = kept[nearest].layers
    return np.array([1 - layer_l1(layers, true).order_free for layers in group.candidates])


@cache
def _training_designs() -> tuple[list[Design], Float[np.ndarray, "designs values"]]:
    designs = [make_design("B", seed, SIZE, LAYERS) for seed in Sizes().training_seeds]
    return designs, np.stack([_print(design.flat) for design in designs])


def _print(picture: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, " values"]:
    """Means of blocks: what PNG and JPEG of one design share."""
    blocks = picture.reshape(SIZE // _BLOCK, _BLOCK, SIZE // _BLOCK, _BLOCK, 3)
    return blocks.mean(axis=(1, 3)).ravel()
