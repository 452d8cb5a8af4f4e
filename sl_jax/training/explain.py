"""What a configuration holds, for people: each field's value, meaning, origin, and who set it.

A field's meaning stands in one place, the `Attributes` of its dataclass; where a default comes from
in one other, a comment in the configuration file.
"""

import ast
import dataclasses
import inspect
import io
import re
import shutil
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sl_jax.training.configuration import wanted, without_secrets
from sl_jax.training.flags import packaged, packaged_file, read_config

ORIGINS = ("paper", "release", "peer", "ours", "unmeasured", "yours")

_WIDTH = 100  # at most, and where there is no terminal
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)", re.DOTALL)


class Meaning(NamedTuple):
    """What a field is: in words, and what values it takes."""

    text: str
    values: str


def meanings(kind: type, path: str = "") -> dict[str, Meaning]:
    """By dotted name, of every field of a dataclass and of those that it holds; "" where unsaid."""
    told, types_of = _attributes(kind), typing.get_type_hints(kind)
    found = {}
    for entry in dataclasses.fields(kind):
        name, of = f"{path}{entry.name}", types_of[entry.name]
        if dataclasses.is_dataclass(of):
            found |= meanings(of, f"{name}.")
        else:
            found[name] = Meaning(told.get(entry.name, ""), wanted(of))
    return found


def _attributes(kind: type) -> dict[str, str]:
    """The entries of a docstring's section `Attributes`; one may be of several names."""
    _, _, rest = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    section = re.split(r"\n(?=\S)", rest)[0]  # up to the next section
    found = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section)):
        if match := _ENTRY.fullmatch(entry.strip()):
            text = " ".join(match[2].split())
            found |= dict.fromkeys(match[1].split(", "), text)
    return found


def origins(file: Path, variant: str | None = None) -> dict[str, str]:
    """Where the values of a configuration file come from, by dotted name; the comments there.

    Of an assignment such as `rollout.steps = 10` it is the comment behind it, else the one above,
    which holds up to the next blank line. `rollout = config.rollout = ConfigDict()` says what
    `rollout` is.

    Args:
        file: defines `get_config`, and for each variant a function `_VARIANT`, which may begin with
            another one's result, as in `config = _production()`.
        variant: None for what `get_config` gives without one.
    """
    text = file.read_text(encoding="utf-8")
    functions = {
        node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
    }
    comments = _comments(text)

    def of(name: str) -> dict[str, str]:
        found: dict[str, str] = {}
        names = {"config": ""}
        for statement in functions[name].body:
            if isinstance(statement, ast.Assign):
                value = statement.value
                if isinstance(value, ast.Call) and ast.unparse(value.func) in functions:
                    found |= of(ast.unparse(value.func))
                for field in _fields(statement, names):
                    found[field] = comments(statement)
        return found

    chosen = f"_{variant or 'production'}"
    return of(chosen if chosen in functions else "get_config")


def _fields(statement: ast.Assign, names: dict[str, str]) -> Iterator[str]:
    """Dotted names that a statement assigns to; `names` learns what it calls parts of them."""
    targets = [ast.unparse(target) for target in statement.targets]
    for target in targets:
        first, _, rest = target.partition(".")
        if rest and first in names:
            field = f"{names[first]}.{rest}".lstrip(".")
            names |= dict.fromkeys((other for other in targets if "." not in other), field)
            yield field


def _comments(text: str) -> typing.Callable[[ast.Assign], str]:
    """What gives the comment of a statement in `text`."""
    lines = text.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    of_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}

    def alone(number: int) -> bool:
        return lines[number - 1].lstrip().startswith("#")

    def above(number: int) -> str:
        while number > 0 and lines[number - 1].strip() and not alone(number):
            number -= 1
        block: list[str] = []
        while number > 0 and alone(number):
            block.insert(0, of_line[number])
            number -= 1
        return " ".join(block)

    def comment(statement: ast.Assign) -> str:
        return of_line.get(statement.end_lineno) or above(statement.lineno - 1)

    return comment


def explained(
    kind: type, config: Mapping[str, Any], given: Mapping[str, Any], source: str, base: str
) -> str:
    """Every field of a configuration, in the order of its dataclass.

    Args:
        kind: the dataclass.
        config: its values, nested.
        given: those that the command line gave, by dotted name.
        source: FILE[:VARIANT], which gives the others.
        base: name of the packaged configuration, such as "grpo", that FILE may have built on.
    """
    file, _, variant = source.partition(":")
    before = read_config(file, variant or None).to_dict()
    told = _inherited(before, base) | origins(Path(file), variant or None)
    lines, found = [source, ""], meanings(kind)
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
    for name, meaning in found.items():
        origin, mark = told.get(name) or f"{Path(file).name} does not say", ""
        if any(name == path or name.startswith(f"{path}.") for path in given):
            origin = f"your command line; in the file {_shown(before, name)}, {origin}"
            mark = "  (overridden)"
        head = f"config.{name} = {_shown(config, name)}{mark}"
        lines += textwrap.wrap(head, width, subsequent_indent=" " * 8, break_on_hyphens=False)
        for said in (meaning.text, f"Takes {meaning.values}.", f"Origin: {origin}"):
            lines += textwrap.wrap(said, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, "", f"{len(found)} fields, {len(given)} overridden."])


def _inherited(config: Mapping[str, Any], base: str) -> dict[str, str]:
    """Origins of the values that are those of a packaged configuration."""
    packed = packaged(base, "production").to_dict()
    found = origins(packaged_file(base))
    return {name: said for name, said in found.items() if _at(packed, name) == _at(config, name)}


def _shown(config: Mapping[str, Any], name: str) -> str:
    return repr(without_secrets(_at(config, name)))


def _at(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part] if isinstance(value, Mapping) and part in value else None
    return value
