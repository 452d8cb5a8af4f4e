"""Chat messages as requests: what a judge server reads from the bodies that clients send."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sl_jax.imaging.decoding import DECODER_ERRORS, check_scans
from sl_jax.scoring.request import UnreadableRequestError, request_of
from sl_jax.scoring.types import JudgeRequest


class BadRequestError(ValueError):
    """A body that cannot be judged; the message is for the client."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
      body: bytes of a request's body.
      pictures: pictures in a request.
      pixels: pixels of all its pictures together.
      waiting: requests that may wait for a free thread before clients are told to come back.
      held: bytes of the bodies of all requests that wait or are judged.
      seconds: for a request to arrive.
    """

    body: int = 32 * 2**20
    pictures: int = 64
    pixels: int = 32 * 2**20
    waiting: int = 64
    held: int = 256 * 2**20
    seconds: float = 60.0


def request_from(body: object, limits: Limits) -> JudgeRequest:
    """The request in a chat-completions body: the parts of its user messages, in order.

    Raises:
      BadRequestError: not such a body, pictures beyond the limits, or none of a known layout.
    """
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
        raise BadRequestError("please send a JSON object with a list of messages")
    if body.get("stream"):
        raise BadRequestError("answers are not streamed here: please send no stream, or false")
    parts: list[str | UInt8[np.ndarray, "h w 3"]] = []
    pictures = pixels = 0
    for item in _items(body["messages"]):
        if isinstance(item, str):
            parts.append(item)
            continue
        pictures += 1
        if pictures > limits.pictures:
            raise BadRequestError(f"more than {limits.pictures} pictures in a request")
        picture = _open(item)
        pixels += picture.width * picture.height
        if pixels > limits.pixels:  # known from the header, before anything is decompressed
            raise BadRequestError(f"more than {limits.pixels} pixels in a request")
        parts.append(_pixels(picture))
    try:
        return request_of(parts)
    except UnreadableRequestError as error:
        raise BadRequestError(str(error)) from error


def _items(messages: list[Any]) -> Iterator[str | bytes]:
    """Texts, and pictures as the bytes of their files."""
    for message in messages:
        if not isinstance(message, Mapping):
            raise BadRequestError("every message is an object with role and content")
        if message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from map(_item, content)
        else:
            raise BadRequestError("content is a text or a list of parts")


def _item(item: object) -> str | bytes:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"]
    shown = item.get("image_url") if kind == "image_url" else None
    url = shown.get("url") if isinstance(shown, Mapping) else None
    if not isinstance(url, str):
        raise BadRequestError('content is a list of "text" and "image_url" parts')
    head, _, encoded = url.partition(";base64,")
    if not head.startswith("data:image/") or not encoded:
        raise BadRequestError("pictures are taken as data:image/…;base64 URLs only")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise BadRequestError(f"a picture is no base64: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except DECODER_ERRORS as error:
        raise BadRequestError("a picture is neither PNG nor JPEG") from error


def _pixels(picture: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    try:
        check_scans(picture)
        picture.load()
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except DECODER_ERRORS as error:
        raise BadRequestError("a picture is damaged") from error
