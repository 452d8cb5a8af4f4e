"""Flags of the commands that a configuration file configures; mistakes in them take one line."""

import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

import sl_jax

_FILE = re.compile(r"--?config=([^:]*)(?::(.*))?")
_FIELD = re.compile(r"--?(?:no)?(config(?:\.\w+)+)(?:=.*)?", re.DOTALL)


def parse_config_flags(argv: Sequence[str]) -> list[str]:
    """A `flags_parser` for `app.run`: `--config=FILE[:VARIANT]` and `--config.field=value`.

    A bare name, as in `--config=grpo:tiny`, means a packaged configuration. Ends the program, with
    a line for each, where there is no such file or variant, a field is unknown, or a value cannot
    be read.
    """
    argv = [_located(arg) for arg in argv]
    problems = list(config_problems(argv))
    if problems:
        sys.exit("ConfigError: this configuration cannot run:\n  " + "\n  ".join(problems))
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"{error}\nPlease see what there is by --help, and for fields by --explain.")


def packaged(name: str, variant: str) -> ConfigDict:
    """A packaged configuration, such as ("grpo", "tiny")."""
    return read_config(packaged_file(name), variant)


def read_config(file: Path | str, variant: str | None = None) -> ConfigDict:
    """What a configuration file gives, before the command line changes it.

    Raises:
        ValueError: the file is no configuration, or has no such variant.
    """
    found = runpy.run_path(str(file))
    if "get_config" not in found:
        raise ValueError(f"{file} defines no get_config; please give a configuration file")
    return found["get_config"](*([] if variant is None else [variant]))


def packaged_file(name: str) -> Path:
    """The file of a packaged configuration; where there is none, the bare name."""
    package = Path(sl_jax.__file__).parent
    places = (package / "configs", package.parent / "configs")  # installed, or a checkout
    files = (place / f"{name}.py" for place in places)
    return next((file for file in files if file.is_file()), Path(name))


def config_problems(argv: Sequence[str]) -> Iterator[str]:
    """What is wrong with `--config=…` and with the names in each `--config.FIELD=…`."""
    files = [match for arg in argv if (match := _FILE.fullmatch(arg))]
    if not files:
        return
    file, variant = files[-1].groups()
    if not Path(file).is_file():
        yield (
            f"{files[-1][0]}: there is no file {file}; please give a configuration file, such as "
            "configs/grpo.py, or the name of a packaged one, such as grpo:tiny"
        )
        return
    try:
        config = read_config(file, variant)
    except ValueError as error:
        yield f"{files[-1][0]}: {error}"
        return
    for arg in argv:
        if match := _FIELD.fullmatch(arg):
            yield from _unknown(match[1].split("."), arg, config)


def _unknown(path: Sequence[str], arg: str, here: Any) -> Iterator[str]:
    for depth, name in enumerate(path[1:], 1):
        known = sorted(here) if isinstance(here, ConfigDict) else []
        if name not in known:
            parent = ".".join(path[:depth])
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {parent}.{close[0]}? " if close else ""
            fields = f"known fields are {', '.join(known)}" if known else f"{parent} has no fields"
            yield f"{parent}.{name} is unknown (given as {arg}); {hint}{fields}"
            return
        here = here[name]


def _located(arg: str) -> str:
    """`--config=NAME[:VARIANT]` with the file of a packaged configuration of that name."""
    match = _FILE.fullmatch(arg)
    if not match or not match[1].isidentifier():
        return arg
    return f"--config={packaged_file(match[1])}" + (f":{match[2]}" if match[2] else "")
