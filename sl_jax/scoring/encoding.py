"""Requests as chat messages: texts, and pictures as data URLs."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sl_jax.scoring.types import JudgeRequest

Content = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class RequestConfig:
    """How a request is put to a server.

    Attributes:
      temperature, top_p: how answers are sampled; None leaves the server's own. At temperature 0
        asking again draws the same answer, unless another server gives it.
      max_tokens: longest answer.
      tokens_field: what the server calls that limit; hosted reasoning models want
        "max_completion_tokens".
      seed: what sampling follows from, moved on for every repeat and sample; None sends none.
      picture_format: "png" is exact; "jpeg" is smaller.
      jpeg_quality: 1…95, of JPEGs; more is larger and closer.
      detail: how closely a hosted model looks, "low", "high" or "auto"; None leaves it out.
      structured: how JSON is asked for: "schema", by JSON schema; "object", as any JSON; "text",
        by the prompt alone; "auto" finds out once per endpoint.
      timeout: seconds for an answer, however it arrives.
      extra: further fields of the request body.
    """

    temperature: float | None = 0.0
    top_p: float | None = None
    max_tokens: int = 1024
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed: int | None = 0
    picture_format: Literal["png", "jpeg"] = "png"
    jpeg_quality: int = 90
    detail: Literal["low", "high", "auto"] | None = None
    structured: Literal["auto", "schema", "object", "text"] = "auto"
    timeout: float = 120.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = {
            "picture_format": ("png", "jpeg"),
            "detail": ("low", "high", "auto", None),
            "structured": ("auto", "schema", "object", "text"),
            "tokens_field": ("max_tokens", "max_completion_tokens"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: please choose one of {allowed}")
        ranges = {
            "temperature": (self.temperature is None or self.temperature >= 0, "0 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "a share above 0, up to 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 95, "1 to 95"),
            "timeout": (self.timeout > 0, "a number of seconds above 0"),
        }
        for name, (fine, wanted) in ranges.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}: please choose {wanted}")

    def determinants(self) -> dict[str, Any]:
        """All of it that can change an answer."""
        kept = dataclasses.asdict(self)
        idle = {"timeout", "tokens_field"}
        if self.picture_format != "jpeg":
            idle.add("jpeg_quality")
        return {name: value for name, value in kept.items() if name not in idle}


def content_of(request: JudgeRequest, config: RequestConfig) -> Content:
    """The parts of a user message, in the request's order."""
    content: Content = []
    for part in request.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        shown = {"url": data_url(part, config)}
        if config.detail is not None:
            shown["detail"] = config.detail
        content.append({"type": "image_url", "image_url": shown})
    return content


def data_url(picture: UInt8[np.ndarray, "height width 3"], config: RequestConfig) -> str:
    """The picture as `data:image/…;base64,…`."""
    buffer = io.BytesIO()
    if config.picture_format == "png":
        Image.fromarray(picture).save(buffer, "PNG", compress_level=4)
    else:
        Image.fromarray(picture).save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    encoded = base64.b64encode(buffer.getbuffer()).decode("ascii")
    return f"data:image/{config.picture_format};base64,{encoded}"


def seed_of(request: JudgeRequest, config: RequestConfig) -> int | None:
    """The sampling seed: repeats and samples each get one of their own, below 2^31."""
    if config.seed is None:
        return None
    return (config.seed + 7919 * request.repeat + 104_729 * request.sample) % 2**31
