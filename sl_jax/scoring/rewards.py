"""What training maximises: a weighted list of rewards and vetoes over a judged group.

A reward is anything with the signature of `Reward`; a user's own is named by its dotted path.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from sl_jax import imaging
from sl_jax.scoring.types import Group, GroupScores

Spec = tuple[str, float] | tuple[str, float, Mapping[str, Any]]


class Reward(Protocol):
    """Point-wise or group-wise: sees all candidates of a group and their judgement.

    An object whose attribute `caps` is True is a veto: it returns upper bounds of the reward
    (inf where it has no objection) instead of scores.
    """

    def __call__(self, group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
        """One number per candidate: a score, by convention in 0…1, or a bound."""
        ...


@dataclasses.dataclass(frozen=True)
class JudgeReward:
    """The judge's reward as it stands; nan where a candidate was not judged."""

    caps = False

    def __call__(self, group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
        return scores.reward


@dataclasses.dataclass(frozen=True)
class RecompositionVeto:
    """Caps candidates whose layers do not give the source back.

    The bound falls from 1 at `bound` to `cap` at twice `bound`, so that candidates beyond it are
    still told apart.

    Attributes:
      bound: mean |recomposition − source| in 0…1 from which on the reward is bounded.
      cap: the lowest bound.
    """

    bound: float = 0.08
    cap: float = 0.1
    caps = True

    def __call__(self, group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
        errors = np.array(
            [imaging.l1(imaging.recompose(layers), group.source) for layers in group.candidates]
        )
        bounds = 1 - (1 - self.cap) * np.clip(errors / self.bound - 1, 0, 1)
        return np.where(errors > self.bound, bounds, np.inf)


@dataclasses.dataclass(frozen=True)
class AllBlankVeto:
    """Caps candidates in which every layer above the background is blank.

    Stacks of one layer have none to be blank.

    Attributes:
      cap: their bound.
    """

    cap: float = 0.05
    caps = True

    def __call__(self, group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
        blank = [
            len(layers) > 1 and bool(imaging.is_blank(layers[1:, ..., 3]).all())
            for layers in group.candidates
        ]
        return np.where(blank, self.cap, np.inf)


BUILT_IN = {
    "judge": JudgeReward,
    "recomposition_veto": RecompositionVeto,
    "all_blank_veto": AllBlankVeto,
}
DEFAULT: tuple[Spec, ...] = (("judge", 1.0), ("recomposition_veto", 1.0), ("all_blank_veto", 1.0))


class Rewards:
    """A list of rewards, applied to judged groups.

    With scores r_k, their weights a_k, and vetoes with bounds b_m and weights c_m in 0…1:
    reward = Σ a_k·r_k, then, veto by veto, reward −= c_m·max(0, reward − b_m): at weight 1 a veto
    is a hard cap, at 0 it is off.

    Args:
      specs: (name or dotted path, weight) or (name or dotted path, weight, options). Names are
        those of `BUILT_IN`; a path "package.module.name" leads to a function with the signature
        of `Reward`, or to a class that is called with the options.

    Raises:
      ValueError: a name that leads nowhere, options for a function, or a veto's weight beyond 1.
    """

    def __init__(self, specs: Sequence[Spec] = DEFAULT):
        self._scores: list[tuple[Reward, float]] = []
        self._vetoes: list[tuple[Reward, float]] = []
        for name, weight, *options in specs:
            reward = _build(name, options[0] if options else {})
            if not getattr(reward, "caps", False):
                self._scores.append((reward, weight))
            elif 0 <= weight <= 1:
                self._vetoes.append((reward, weight))
            else:
                raise ValueError(f"weight {weight} of the veto {name}: please choose it in 0…1")
        if not self._scores:
            raise ValueError(
                'rewards: please list at least one that scores, such as ("judge", 1.0)'
            )

    def __call__(self, group: Group, scores: GroupScores) -> GroupScores:
        """The judgement with `reward` replaced and `capped` set.

        Candidates for which a reward is not finite, or a veto is nan, become invalid, never
        guessed. A veto of infinity is no objection.
        """
        reward = sum(
            weight * _checked(term(group, scores), group, term) for term, weight in self._scores
        )
        capped = np.zeros(len(group.candidates), bool)
        for veto, weight in self._vetoes:
            excess = np.maximum(0, reward - _checked(veto(group, scores), group, veto))
            capped |= weight * excess > 0
            reward = reward - weight * excess
        valid = scores.valid & np.isfinite(reward)
        return dataclasses.replace(
            scores, reward=np.where(valid, reward, np.nan), valid=valid, capped=capped & valid
        )


def _checked(values: Any, group: Group, reward: Reward) -> Float[np.ndarray, " g"]:
    array = np.asarray(values, np.float64)
    if array.shape != (len(group.candidates),):
        raise ValueError(
            f"reward {reward!r} returned shape {array.shape} for a group of "
            f"{len(group.candidates)}: please return one number per candidate"
        )
    return array


def _build(name: str, options: Mapping[str, Any]) -> Reward:
    if name in BUILT_IN:
        return BUILT_IN[name](**options)
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward {name!r} was not found ({error}): please use one of {sorted(BUILT_IN)} or "
            "the dotted path of an importable function or class"
        ) from error
    if isinstance(found, type):
        return found(**options)
    if options:
        raise ValueError(f"reward {name!r} is a function: please make it a class to pass options")
    return found
