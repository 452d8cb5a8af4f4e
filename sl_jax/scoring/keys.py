"""Secret keys: read from the environment, and kept out of everything that is written."""

from __future__ import annotations

import json
import os
import re

_SHORTEST = 8
_HIDDEN = "[key]"
_OTHER_FORMS = {"/": (r"\/",), " ": ("+",)}  # of JSON, and of forms in URLs


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
    """The text with the key hidden, wherever it came from.

    Every letter of it may stand as it is, or as JSON or URLs have it; JSON remains JSON.
    """
    return re.sub("".join(map(_forms, key)), _HIDDEN, text) if key else text


def _forms(letter: str) -> str:
    """The pattern of a letter in any form."""
    units = letter.encode("utf-16-be", "surrogatepass").hex(" ", 2).split()
    octets = letter.encode("utf-8", "surrogateescape").hex(" ").split()
    escaped = "".join(rf"\\u{unit}" for unit in units)
    quoted = "".join(f"%{octet}" for octet in octets)
    plain = {json.dumps(letter)[1:-1], letter, *_OTHER_FORMS.get(letter, ())}
    told = "|".join(re.escape(form) for form in sorted(plain, key=len, reverse=True))
    return f"(?:(?i:{escaped}|{quoted})|{told})"
