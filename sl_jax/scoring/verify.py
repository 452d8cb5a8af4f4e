"""Whether an answer is one to its request: what a pool needs to know before it lets it pass."""

from __future__ import annotations

from sl_jax.scoring import captions, rubric
from sl_jax.scoring.types import JudgeRequest


def verify(request: JudgeRequest, text: str) -> None:
    """Checks that the answer parses, and judges exactly the candidates of the request.

    Raises:
      BrokenAnswerError: it does not.
    """
    if request.stage == captions.CAPTION_STAGE:
        captions.parse_caption(text)
    elif request.stage == 1:
        rubric.parse_candidate(text)
    else:
        rubric.parse_grid(text, tuple(request.schema["properties"]["scores"]["required"]))
