"""A judge without a network: the five criteria computed from the pixels of a request.

Its only input is the rendered request, so it gives equal scores in process and behind a server,
and it never sees true layers. The penalties of `_features` enter each criterion as
1 / (1 + Σ k·penalty), which stays sensitive both near a perfect candidate and far from one. The k
are settings of the judge, not of a run. They were calibrated on perturbed designs of the procedural
family A, so that the mean criterion ranks candidates of a group like their L1 error; then, with
`mixed`, `varied` and `astray`, on rollouts of the tiny base on A and, with true layers, on B, where
training had found out what the judge did not see.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from typing import Literal

import numpy as np
from jaxtyping import Float

from sl_jax.scoring import request as rendering
from sl_jax.scoring._features import Penalties, penalties, shrunk
from sl_jax.scoring.types import CRITERIA, Answer, JudgeRequest, PermanentJudgeError

_STRENGTHS: dict[str, dict[str, float]] = {
    "semantic_separation": {
        "smear": 4.0,
        "mixed": 0.5,
        "varied": 2.5,
        "astray": 8.0,
        "duplicate": 1.5,
        "scattered": 1.5,
        "truncated": 0.4,
        "unlifted": 0.3,
        "lumped": 0.6,
        "idle": 5.0,
        "unlike": 8.0,
        "buried": 1.0,
    },
    "alpha_quality": {
        "partial": 6.0,
        "misaligned": 1.2,
        "unmatted": 1.5,
        "idle": 2.5,
        "mixed": 0.5,
        "varied": 3.0,
        "astray": 8.0,
    },
    "background_inpainting": {
        "hole": 6.0,
        "ghost": 0.3,
        "fill": 2.0,
        "unlifted": 0.5,
        "idle": 0.5,
        "stained": 20.0,
    },
    "content_distribution": {
        "mixed": 0.5,
        "varied": 3.0,
        "astray": 8.0,
        "sheet": 5.5,
        "duplicate": 3.0,
        "cut": 4.0,
        "truncated": 1.2,
        "lumped": 3.2,
        "unlifted": 0.6,
        "idle": 4.0,
        "unlike": 8.0,
        "buried": 3.0,
    },
    "validity": {"recomposition": 24.0, "missing": 80.0, "noise": 12.0},
}


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """How faithfully the embedded judge says what it computes.

    Attributes:
      mode: "precise", fractional scores without noise; "vlm", the compressed, noisy integers of a
        vision-language model, for which the attributes below are the levels.
      center: the score (0…10) about which stage 1 is squeezed.
      squeeze: factor of the squeeze; 1 for none.
      picture_offset: std, in points of 10 before the squeeze, of an offset that all candidates of a
        picture share.
      noise: std, in points of 10 before the squeeze, of each criterion's noise.
      grid_shrink: whole factor by which the grid is shrunk before it is looked at.
      grid_spread: factor by which stage 2 spreads scores about the mean of the grid.
      grid_noise: std, in points of 100, of the noise of stage 2.
      position_bias: points of 100 by which the first place of a grid is favoured over the last.
    """

    mode: Literal["precise", "vlm"] = "precise"
    center: float = 7.0
    squeeze: float = 0.3
    picture_offset: float = 1.5
    noise: float = 1.0
    grid_shrink: int = 2
    grid_spread: float = 2.0
    grid_noise: float = 4.0
    position_bias: float = 4.0

    def __post_init__(self) -> None:
        if self.mode not in ("precise", "vlm"):
            raise ValueError(f'mode {self.mode!r}: please choose "precise" or "vlm"')
        if self.grid_shrink < 1:
            raise ValueError(
                f"grid_shrink {self.grid_shrink}: please choose a factor of at least 1"
            )


class EmbeddedJudge:
    """An endpoint that computes its answers; equal requests get equal answers."""

    def __init__(self, config: EmbeddedConfig | None = None):
        self.config = config or EmbeddedConfig()
        self.name = f"embedded:{self.config.mode}"

    async def answer(self, request: JudgeRequest) -> Answer:
        """JSON under the request's schema.

        Raises:
          PermanentJudgeError: the pictures are not laid out as `scoring.request` does it, or the
            request is about something else (stage 0), such as a caption.
        """
        if request.stage == 0:
            raise PermanentJudgeError(
                "the embedded judge scores layers and grids as sl_jax shows them; it describes no "
                "pictures and answers nothing else"
            )
        try:
            said = await asyncio.to_thread(
                self._candidate if request.stage == 1 else self._grid, request
            )
        except rendering.UnreadableRequestError as error:
            raise PermanentJudgeError(f"the embedded judge cannot read this: {error}") from error
        return Answer(json.dumps(said), endpoint=self.name)

    def _candidate(self, request: JudgeRequest) -> dict[str, dict[str, str | float]]:
        seen = rendering.read_candidate(request)
        found = penalties(seen)
        scores = 10 * criteria_of(found)
        if self.config.mode == "vlm":
            scores = self._squeezed(scores, seen, request)
        return {
            name: {"reason": _reason(name, found), "score": float(score)}
            for name, score in zip(CRITERIA, scores, strict=True)
        }

    def _squeezed(
        self, scores: Float[np.ndarray, " 5"], seen: rendering.Seen, request: JudgeRequest
    ) -> Float[np.ndarray, " 5"]:
        """round(squeeze(score + offset of the picture + noise)), within 0…10."""
        config = self.config
        picture = np.rint(seen.source * 255).astype(np.uint8)
        offset = config.picture_offset * _generator(picture.tobytes()).standard_normal()
        noise = config.noise * _generator(request.digest().encode()).standard_normal(len(scores))
        said = scores + offset + noise
        squeezed = config.center + config.squeeze * (said - config.center)
        return np.clip(np.rint(squeezed), 0, 10)

    def _grid(self, request: JudgeRequest) -> dict[str, dict[str, float]]:
        labels, cells = rendering.read_grid(request)
        vlm = self.config.mode == "vlm"
        looked_at = [shrunk(cell, self.config.grid_shrink) if vlm else cell for cell in cells]
        scores = np.array([100 * criteria_of(penalties(cell)).mean() for cell in looked_at])
        if vlm:
            scores = self._compared(scores, request)
        return {"scores": {label: float(s) for label, s in zip(labels, scores, strict=True)}}

    def _compared(
        self, scores: Float[np.ndarray, " g"], request: JudgeRequest
    ) -> Float[np.ndarray, " g"]:
        config = self.config
        noise = _generator(request.digest().encode()).standard_normal(len(scores))
        places = np.linspace(0.5, -0.5, len(scores)) if len(scores) > 1 else np.zeros(1)
        spread = scores.mean() + config.grid_spread * (scores - scores.mean())
        told = spread + config.grid_noise * noise + config.position_bias * places
        return np.clip(np.rint(told), 0, 100)


def criteria_of(found: Penalties) -> Float[np.ndarray, " 5"]:
    """The five criteria in 0…1, in the order of `CRITERIA`: 1 / (1 + Σ k·penalty)."""
    return np.array([1 / (1 + sum(_parts(name, found).values())) for name in CRITERIA])


def _parts(criterion: str, found: Penalties) -> dict[str, float]:
    return {name: k * getattr(found, name) for name, k in _STRENGTHS[criterion].items()}


def _reason(criterion: str, found: Penalties) -> str:
    parts = _parts(criterion, found)
    worst = max(parts, key=parts.__getitem__)
    if parts[worst] < 0.05:
        return "nothing to object to"
    return f"mostly {worst}: {getattr(found, worst):.3f}"


def _generator(content: bytes) -> np.random.Generator:
    digest = hashlib.sha256(content).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4").astype(np.uint64))
