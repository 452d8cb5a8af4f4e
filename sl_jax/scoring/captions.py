"""Captions from the judge pool: what a vision-language model sees in each picture of a run.

Every picture is asked about once. Through a `CachedEndpoint` the answers are kept with those of the
judge, so that a run that starts again asks nothing twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.resources
import logging
import pathlib
import string
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import pydantic
from jaxtyping import UInt8
from PIL import Image

from sl_jax.imaging.words import counted
from sl_jax.scoring.rubric import parse_object
from sl_jax.scoring.types import (
    Endpoint,
    JudgeRequest,
    NoJudgeError,
    PermanentJudgeError,
    TransientJudgeError,
)

_log = logging.getLogger(__name__)

Rgb = UInt8[np.ndarray, "height width 3"]

CAPTION_STAGE = 0
_LONGEST = 4000  # letters
_NAMED = 10


class CaptionError(RuntimeError):
    """No endpoint can describe pictures; the message says why."""


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """How captions are asked for.

    Attributes:
      words: longest caption that is asked for; a prompt keeps 512 tokens by default.
      picture_size: longest side in pixels of the picture that is shown; None shrinks nothing.
      prompts: folder with caption.md; None for the packaged one.
      concurrency: pictures asked about at the same time.
    """

    words: int = 80
    picture_size: int | None = 768
    prompts: str | None = None
    concurrency: int = 16

    def __post_init__(self) -> None:
        for name, least in (("words", 1), ("picture_size", 16), ("concurrency", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: please choose at least {least}")


class _Caption(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)

    caption: Annotated[str, pydantic.Field(min_length=1, max_length=_LONGEST)]


def caption_schema() -> dict[str, Any]:
    """The JSON schema of an answer: {"caption": text}."""
    text = {"type": "string", "minLength": 1, "maxLength": _LONGEST}
    return {
        "type": "object",
        "properties": {"caption": text},
        "required": ["caption"],
        "additionalProperties": False,
    }


def parse_caption(text: str) -> str:
    """The caption of an answer, on one line.

    Raises:
      BrokenAnswerError: it is not JSON under the schema, or the caption is empty or too long.
    """
    return " ".join(parse_object(_Caption, text).caption.split())


def load_template(folder: str | None = None) -> string.Template:
    """`caption.md` of a folder; None takes the packaged one.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it names a placeholder other than $words.
    """
    packaged = importlib.resources.files("sl_jax.scoring") / "prompts"
    path = (packaged if folder is None else pathlib.Path(folder)) / "caption.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: please write it, or name no folder of prompts")
    template = string.Template(path.read_text(encoding="utf-8"))
    if not template.is_valid() or not set(template.get_identifiers()) <= {"words"}:
        raise ValueError(
            f"{path}: placeholders {template.get_identifiers()}; please use $words at most, and "
            "write $$ for a dollar"
        )
    return template


def caption_request(picture: Rgb, template: string.Template, config: CaptionConfig) -> JudgeRequest:
    """The request that shows one picture."""
    shown, longest = picture, max(picture.shape[:2])
    if config.picture_size is not None and longest > config.picture_size:
        size = [max(1, round(n * config.picture_size / longest)) for n in picture.shape[1::-1]]
        shown = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    text = template.substitute(words=config.words)
    return JudgeRequest(CAPTION_STAGE, (text, shown), caption_schema())


async def captions_of(
    endpoint: Endpoint,
    pictures: Mapping[str, Callable[[], Rgb]],
    config: CaptionConfig | None = None,
) -> dict[str, str]:
    """Asks for a caption of every picture.

    A picture that the model refuses, of which no try gives a proper answer, or that cannot be
    opened (its opener raises ValueError) gets none and is named in the log: the run uses the
    default prompt for it. While nobody answers at all, no picture is to blame.

    Args:
      endpoint: a pool of servers, or what remembers its answers.
      pictures: name → what opens the picture, uint8 [H, W, 3]; called on a thread, when it is its
        turn.
      config: how they are asked for.

    Returns:
      name → caption, without the pictures that have none.

    Raises:
      CaptionError: no endpoint is up any more, or none can see pictures.
      BudgetError: the run has spent what it was allowed to.
    """
    config = config or CaptionConfig()
    template = load_template(config.prompts)
    slots = asyncio.Semaphore(config.concurrency)
    refused: dict[str, str] = {}

    async def one(name: str) -> str:
        async with slots:
            try:
                picture = await asyncio.to_thread(pictures[name])
                request = await asyncio.to_thread(caption_request, picture, template, config)
                return parse_caption(await endpoint.answer(request))
            except NoJudgeError:
                raise
            except (PermanentJudgeError, TransientJudgeError, ValueError) as error:
                refused[name] = str(error)
                return ""

    tasks = {name: asyncio.ensure_future(one(name)) for name in pictures}
    try:
        await asyncio.gather(*tasks.values())
    except NoJudgeError as error:
        raise CaptionError(_complaint(error)) from None
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    captions = {name: task.result() for name, task in tasks.items() if task.result()}
    if pictures and not captions:
        raise CaptionError(_complaint(next(iter(refused.values()))))
    if refused:
        named = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:_NAMED])
        asked = counted(len(pictures), "picture")
        _log.warning("%d of %s got no caption: %s", len(refused), asked, named)
    return captions


def _complaint(reason: object) -> str:
    return (
        f"no caption could be had: {reason}; please let a vision-language model caption (the "
        "embedded judge describes nothing), or take captions from files or the default prompt"
    )
