"""How messages count, and how they show what others wrote, for all rooms."""

import json
import re
from typing import Any


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 picture", "0 pictures", "12 epochs".

    Args:
        number: how many.
        noun: one of them; its plural ends in an s.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def time_span(seconds: float) -> str:
    """A length of time in a unit that suits it: "3.1 s", "42 s", "12 min", "5.5 h", "2.1 d"."""
    for unit, size, digits in (("d", 86_400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def printable(text: str, keep: str = "") -> str:
    r"""A text of others as a terminal may show it.

    Control characters, which can move the cursor or recolour, and those that turn the direction of
    writing come out as escapes: `\x1b`, `\u202e`.

    Args:
        text: any.
        keep: characters that stay as they are, such as "\n".
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def readable_json(value: Any, **options: Any) -> str:
    """JSON whose letters stand as they are, and in which what `printable` escapes is escaped.

    Args:
        value: as for `json.dumps`, as are the options.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return re.sub(r"[^\n -~]+", lambda found: "".join(map(_in_json, found[0])), text)


def _in_json(letter: str) -> str:
    return letter if letter.isprintable() else json.dumps(letter)[1:-1]
