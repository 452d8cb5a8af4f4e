"""What the command is told, as values; mistakes are said in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sl_jax.flow.sampler import OdeMethod

REFERENCE_BASED = ("stable_layers", "layerd")
WIN_RATE = "win_rate"
JUDGED = ("judge", WIN_RATE)
PROTOCOLS = (*REFERENCE_BASED, "reference_free", *JUDGED)
SAMPLERS: tuple[OdeMethod, ...] = ("heun", "euler")
_UNTOLD = frozenset({"adapter", "checkpoints", "layers", "outputs"})  # names that say nothing


class EvaluationError(ValueError):
    """An evaluation that cannot be done as it was asked for; the message says what to change."""


class Named(NamedTuple):
    """A name for tables, and where what it stands for is."""

    name: str
    where: str


class SamplerChoice(NamedTuple):
    """An ODE sampler and its steps."""

    method: OdeMethod
    steps: int

    def __str__(self) -> str:
        return f"{self.method} {self.steps}"


class Shard(NamedTuple):
    """The share of the pictures that a process evaluates: those whose index is `part` mod `of`."""

    part: int = 0
    of: int = 1


def parse_protocols(text: str) -> tuple[str, ...]:
    """Protocols from a comma-separated list; empty if nothing is named.

    Raises:
      EvaluationError: one is unknown.
    """
    names = _words(text)
    for name in names:
        if name not in PROTOCOLS:
            raise EvaluationError(f"protocol {_unknown(name, PROTOCOLS)}")
    return tuple(name for name in PROTOCOLS if name in names)


def allowed_protocols(
    asked: Sequence[str], *, references: bool, judge: bool, others: bool
) -> tuple[str, ...]:
    """The protocols to run: those asked for, or without any all that are possible.

    Args:
      asked: from `parse_protocols`.
      references: true layers are known.
      judge: a judge is named.
      others: there is something to compare with the base.

    Raises:
      EvaluationError: what was asked for is not possible.
    """
    lacking = {
        **dict.fromkeys(() if references else REFERENCE_BASED, "true layers; please name designs"),
        **dict.fromkeys(() if judge else JUDGED, "a judge; please pass --judge"),
        **({} if others else {"win_rate": "two systems; please name an adapter or layers"}),
    }
    for name in asked:
        if name in lacking:
            raise EvaluationError(f"protocol {name} needs {lacking[name]}, or leave it out")
    return tuple(asked) or tuple(name for name in PROTOCOLS if name not in lacking)


def parse_samplers(text: str, steps: int) -> tuple[SamplerChoice, ...]:
    """Samplers from `heun`, `euler:20` or `heun:50,euler:20`; `steps` where none are given.

    Raises:
      EvaluationError: a sampler is unknown or its steps are no positive number.
    """
    found = []
    for word in _words(text):
        method, _, count = word.partition(":")
        if method not in SAMPLERS:
            raise EvaluationError(f"sampler {_unknown(method, SAMPLERS)}")
        if count and not (count.isascii() and count.isdigit() and int(count)):
            raise EvaluationError(f"sampler {word!r}: please give steps as in {method}:20")
        found.append(SamplerChoice(method, int(count) if count else steps))
    if not found:
        raise EvaluationError(f"no sampler; please name one of {', '.join(SAMPLERS)}")
    return tuple(dict.fromkeys(found))


def parse_named(values: Iterable[str], taken: Iterable[str] = ()) -> tuple[Named, ...]:
    """Adapters or folders from `WHERE` or `NAME=WHERE`; without a name the path gives one.

    Args:
      values: as given.
      taken: names that others have.

    Raises:
      EvaluationError: two have one name, or a name is empty or begins with a dot.
    """
    names = set(taken)
    found = []
    for value in values:
        name, sign, where = value.partition("=")
        if not sign or "/" in name:
            name, where = _told(value), value
        if not name or name.startswith("."):
            raise EvaluationError(f"{value!r} names no system; please name it, as in tuned={where}")
        if name in names:
            raise EvaluationError(
                f"two systems are called {name!r}; please name them, as in tuned={where}"
            )
        names.add(name)
        found.append(Named(name, where))
    return tuple(found)


def check_apart(output: str, sources: Iterable[str]) -> None:
    """The output lies in no folder that is read, where its files would be taken for designs.

    Raises:
      EvaluationError: it does.
    """
    if not output:
        raise EvaluationError("output is ''; please name a folder for the results")
    target = Path(output).resolve()
    for source in sources:
        if source and Path(source).is_dir() and target.is_relative_to(Path(source).resolve()):
            raise EvaluationError(
                f"output {output} lies in {source}, which is read; please choose another folder"
            )


def parse_shard(text: str) -> Shard:
    """`2/8` is the third of eight processes; "" all pictures.

    Raises:
      EvaluationError: it is no such thing.
    """
    if not text:
        return Shard()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise EvaluationError(f"shard {text!r}; please count from 0, as in 0/8 to 7/8")
    return Shard(int(match[1]), int(match[2]))


def _told(where: str) -> str:
    parts = [part for part in PurePosixPath(where).parts if part not in ("/", "..", ".")]
    telling = [part for part in parts if part not in _UNTOLD and not part.isdigit()]
    return (telling or parts or [where])[-1].removesuffix(".safetensors")


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def _unknown(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{name!r} is unknown; {hint}known are {', '.join(known)}"
