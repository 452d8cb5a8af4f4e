"""Secret keys: read from the environment, and kept out of everything that is written."""

from __future__ import annotations

import json
import os
from urllib.parse import quote, quote_plus

_SHORTEST = 8
_HIDDEN = "[key]"


class KeyMissingError(ValueError):
    """The environment variable that should hold a key does not, or holds no usable one."""


def read_key(variable: str) -> str:
    """The key in the environment variable of this name; "" if no variable is named.

    Raises:
      KeyMissingError: it is unset, or too short to be recognised in texts that must not show it.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if len(key) < _SHORTEST:
        raise KeyMissingError(
            f"the environment variable {variable} should hold the judge's key, but is "
            f"{'too short' if key else 'empty or unset'}: please export a key of at least "
            f"{_SHORTEST} characters, or name no variable for a server without one"
        )
    return key


def redacted(text: str, key: str) -> str:
    """The text with the key hidden, wherever it came from, as it is or as JSON and URLs have it."""
    if not key:
        return text
    told = (json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1])
    for form in (key, *told, quote(key), quote_plus(key)):
        text = text.replace(form, _HIDDEN)
    return text


def redacted_json(text: str, key: str) -> str:
    """A JSON text with the key hidden, however it is escaped there."""
    hidden = redacted(text, key)
    if not key or "\\" not in hidden:
        return hidden
    plain = json.dumps(json.loads(hidden), ensure_ascii=False)
    told = json.dumps(key, ensure_ascii=False)[1:-1]
    return plain.replace(told, _HIDDEN) if told in plain else hidden
