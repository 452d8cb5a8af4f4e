"""What travels between the judge, its endpoints, the rewards and the training loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sl_jax.imaging.words import printable

CRITERIA = (
    "semantic_separation",
    "alpha_quality",
    "background_inpainting",
    "content_distribution",
    "validity",
)


class JudgeError(Exception):
    """A judgement that was not given.

    A server's own words may stand in the message: what no terminal should get is escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, keep="\n"))


class TransientJudgeError(JudgeError):
    """Another try may succeed: time-out, overload (5xx, 429), broken connection.

    Attributes:
      retry_after: seconds that the server asked to wait, or None.
      tokens: what was spent all the same.
      tries: how often the request was sent.
    """

    def __init__(
        self, message: str, retry_after: float | None = None, tokens: int = 0, tries: int = 1
    ):
        super().__init__(message)
        self.retry_after = retry_after
        self.tokens = tokens
        self.tries = tries


class BrokenAnswerError(TransientJudgeError):
    """An answer that does not parse, is incomplete, or has a score out of range."""


class EndpointError(TransientJudgeError):
    """The endpoint itself is set up wrongly (key, model, address): others may still answer."""


class NoJudgeError(TransientJudgeError):
    """No endpoint was up for as long as a request waits: it is not the fault of a picture."""


class PermanentJudgeError(JudgeError):
    """No other try will succeed with this picture: refusal, content filter, 4xx about it.

    Attributes:
      tokens: what was spent all the same.
    """

    def __init__(self, message: str, tokens: int = 0):
        super().__init__(message)
        self.tokens = tokens


class BudgetError(JudgeError):
    """The run has spent what it was allowed to: it stops, with a checkpoint.

    Neither transient nor permanent, so it ends the judgement instead of marking candidates.
    """


class PreflightError(RuntimeError):
    """No endpoint can judge; the message says for each why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One picture and the candidate decompositions of it that are compared.

    Attributes:
      group_id: names the group; with the seed it determines the shuffles of stage 2.
      source: the picture, uint8 [H, W, 3], already flattened over white.
      candidates: G stacks of straight-alpha layers, uint8 [L, H, W, 4], back to front.
      caption: what the picture shows, if known; may be shown to the judge.

    Raises:
      ValueError: pictures of another dtype or shape than these.
    """

    group_id: str
    source: UInt8[np.ndarray, "height width 3"]
    candidates: tuple[UInt8[np.ndarray, "layers height width 4"], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        source = self.source
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise ValueError(
                f"group {self.group_id}: source is {source.dtype} {source.shape}; please pass "
                "uint8 [H, W, 3], flattened over white"
            )
        if not self.candidates:
            raise ValueError(f"group {self.group_id}: please pass at least one candidate")
        wanted = (self.candidates[0].shape[0], *source.shape[:2], 4)
        for index, layers in enumerate(self.candidates):
            if layers.dtype != np.uint8 or layers.shape != wanted:
                raise ValueError(
                    f"group {self.group_id}: candidate {index} is {layers.dtype} {layers.shape}; "
                    f"please pass uint8 {wanted}, the source's size and one number of layers"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeRequest:
    """Exactly what a vision-language model gets to see.

    Attributes:
      stage: 0, a picture to describe; 1, one candidate alone; 2, the grid of a group.
      parts: texts and uint8 [h, w, 3] pictures in reading order.
      schema: the JSON schema that the answer must satisfy.
      repeat: counts how often the request was asked again after broken answers; not shown, but
        part of the sampling seed, so that the same broken answer is not drawn again.
      sample: which of several independent answers to the same question is wanted (repeated
        grids, test–retest); not shown, part of the sampling seed and of a cache's key.
    """

    stage: Literal[0, 1, 2]
    parts: tuple[str | UInt8[np.ndarray, "h w 3"], ...]
    schema: Mapping[str, Any]
    repeat: int = 0
    sample: int = 0

    def digest(self) -> str:
        """SHA-256 (hex) of all that is shown: texts, pictures, schema; no `repeat`, `sample`."""
        digest = hashlib.sha256(json.dumps(self.schema, sort_keys=True).encode())
        for part in self.parts:
            if isinstance(part, str):
                digest.update(b"text" + len(part.encode()).to_bytes(8, "big") + part.encode())
            else:
                digest.update(b"picture" + repr(part.shape).encode() + part.tobytes())
        return digest.hexdigest()


class Answer(str):
    """An answer's JSON text that knows where it came from.

    Attributes:
      endpoint: name of the endpoint that gave it.
      tokens: tokens that it cost, prompt and completion.
      seconds: from sending the request to the end of the answer; 0 if it was computed here.
      cached: whether it was remembered, and cost nothing now.
      tries: how often its request was sent; 1 also if it was remembered.
    """

    endpoint: str
    tokens: int
    seconds: float
    cached: bool
    tries: int

    def __new__(
        cls,
        text: str,
        endpoint: str = "",
        tokens: int = 0,
        seconds: float = 0.0,
        cached: bool = False,
        tries: int = 1,
    ) -> Answer:
        answer = super().__new__(cls, text)
        answer.endpoint, answer.tokens = endpoint, tokens
        answer.seconds, answer.cached, answer.tries = seconds, cached, tries
        return answer


class Endpoint(Protocol):
    """Something that answers requests: the embedded judge, a server, a pool of servers."""

    async def answer(self, request: JudgeRequest) -> str:
        """JSON text under the request's schema; an `Answer` if it has more to tell.

        Raises:
          TransientJudgeError: another try may succeed.
          PermanentJudgeError: none will.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a candidate or a grid has no score.

    Attributes:
      permanent: whether the picture is to be quarantined (a refusal) rather than asked again.
      reason: the last error's message.
    """

    permanent: bool
    reason: str


class Call(NamedTuple):
    """One request of a judgement that was answered.

    Attributes:
      stage: 1 or 2.
      index: the candidate (stage 1) or the grid (stage 2).
      endpoint: who answered.
      seconds, tokens, cached: see `Answer`.
    """

    stage: int
    index: int
    endpoint: str
    seconds: float
    tokens: int
    cached: bool


@dataclasses.dataclass(frozen=True, eq=False)
class GroupScores:
    """The judgement of a group of G candidates; no number in it is invented.

    Attributes:
      group_id: the group's.
      criteria: [G, 5] in 0…1 in the order of `CRITERIA`; nan where invalid.
      stage1: [G] weighted mean of the criteria, 0…1; nan where invalid.
      stage2: [G] score within the grid, 0…1; nan where there is none.
      reward: [G] what training maximises; nan where invalid.
      valid: [G] whether the candidate was judged; others carry weight 0.
      two_stage: whether `reward` uses stage 2. Groups that fell back to stage 1 never share a
        batch-level std with the others.
      reasons: per candidate the judge's reason for each criterion; empty where invalid.
      failures: per candidate why it is invalid; None where it is valid.
      grid_failure: why stage 2 is missing though it was asked for; None if it is not.
      capped: [G] whether a veto lowered the reward.
      grid_scores: [grids, G] in 0…1 per shuffle, nan where not given.
      permutations: [grids, G] the place of every candidate in each shuffled grid, −1 for
        candidates that it did not show.
      endpoints: names of the endpoints that answered, sorted.
      asks: requests sent, asking again included.
      tokens: tokens of all answers, 0 where endpoints do not count.
      seconds: wall-clock time of the judgement.
      calls: the answers that it is made of, by stage and index.
    """

    group_id: str
    criteria: Float[np.ndarray, "g 5"]
    stage1: Float[np.ndarray, " g"]
    stage2: Float[np.ndarray, " g"]
    reward: Float[np.ndarray, " g"]
    valid: Bool[np.ndarray, " g"]
    two_stage: bool
    reasons: tuple[tuple[str, ...], ...]
    failures: tuple[Failure | None, ...]
    grid_failure: Failure | None
    capped: Bool[np.ndarray, " g"]
    grid_scores: Float[np.ndarray, "grids g"]
    permutations: Int[np.ndarray, "grids g"]
    endpoints: tuple[str, ...] = ()
    asks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    calls: tuple[Call, ...] = ()

    @property
    def refusal(self) -> str | None:
        """Why the picture must be quarantined; None if nothing was refused for good."""
        failures = [f for f in (*self.failures, self.grid_failure) if f is not None]
        return next((f.reason for f in failures if f.permanent), None)
