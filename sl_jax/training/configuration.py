"""Typed configurations from nested mappings; everything wrong with one is said together."""

import collections.abc
import dataclasses
import importlib.util
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from sl_jax.parallel.joining import DistributedConfig
from sl_jax.parallel.mesh import MeshConfig

_MOST = 2**31 - 1  # devices count with 32 bits
_LARGEST_WHOLE = 2**53  # up to there JSON's readers agree
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32
_SECRET = re.compile(r"key|secret|password|authorization|bearer|^token$", re.IGNORECASE)
_Config = TypeVar("_Config")


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists each field, its value and the fix."""


class Rule(NamedTuple):
    """What a field's value must be: whether one is, and what is wanted, in words."""

    holds: Callable[[Any], bool]
    wanted: str


AT_LEAST_ONE = Rule(lambda value: 1 <= value <= _MOST, f"at least 1, at most {_MOST}")
NOT_NEGATIVE = Rule(lambda value: 0 <= value <= _MOST, f"0 or more, at most {_MOST}")
AT_MOST = Rule(lambda value: value <= _MOST, f"at most {_MOST}")
POSITIVE = Rule(lambda value: value > 0, "a positive number")
POSITIVE_OR_NONE = Rule(lambda value: value is None or value > 0, "None or a positive number")
SHARE = Rule(lambda value: 0 <= value <= 1, "a share from 0 to 1")
SEED = Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
DECAY = Rule(lambda value: 0 <= value < 1, "a number from 0 up to, not with, 1")


def one_of(values: tuple[str, ...]) -> Rule:
    """A rule for a field that names one of several things."""
    return Rule(values.__contains__, f"one of {values}")


def given(wanted: str) -> Rule:
    """A rule for a field that must not be empty."""
    return Rule(bool, wanted)


# Of the parts that all trainings of a loaded checkpoint have.
PARTS = {
    "workdir": given("a folder for what the run leaves"),
    "model": given("a folder in the diffusers layout, a hub id, or tiny"),
    "seed": SEED,
    "lora.rank": AT_LEAST_ONE,
    "lora.alpha": POSITIVE,
    "lora.targets": given("the names of one or more modules, such as ('to_q', 'to_v')"),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.clip_norm": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.warmup_steps": NOT_NEGATIVE,
    "optimizer.decay_steps": AT_MOST,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "compute.cache": given("auto, off, or a folder for compiled programs"),
}
LOG = {
    "log.wandb": Rule(
        lambda project: not project or importlib.util.find_spec("wandb") is not None,
        "'', or install its package, from the repository: pip install '.[wandb]'",
    )
}


def broken(config: Any, rules: Mapping[str, Rule]) -> Iterator[str]:
    """A problem for each field, named by its path, whose value breaks its rule."""
    for name, rule in rules.items():
        value = operator.attrgetter(name)(config)
        if not rule.holds(value):
            yield f"config.{name} is {value!r}; please use {rule.wanted}"


def split_problems(mesh: MeshConfig, devices: int, batches: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with a mesh on so many devices, and with batches, by field, on that mesh."""
    try:
        data, fsdp, *_ = mesh.shape(devices)
    except ValueError as error:
        yield f"config.{error}"
        return
    shards = data * fsdp
    for name, value in batches.items():
        if value % shards:
            yield (
                f"config.{name} is {value}; please use a multiple of data × fsdp = {shards}, the "
                f"number of parts that a batch is split into on {devices} devices"
            )


def distributed_part(config: Mapping[str, Any]) -> DistributedConfig:
    """How processes join: the part of a configuration that is needed before devices are known.

    Raises:
        ConfigError: it is not right; of the rest nothing is looked at.
    """
    return checked(DistributedConfig, config.get("distributed", {}), path="config.distributed")


def checked(
    kind: type[_Config],
    values: Any,
    problems: Callable[[_Config], Iterable[str]] = lambda _: (),
    path: str = "config",
) -> _Config:
    """The configuration of a dataclass's type that nested mappings hold.

    Args:
        kind: the dataclass; its annotations say what a value may be.
        values: by field.
        problems: what else may be wrong with one whose values are of the right types.
        path: names it in messages.

    Raises:
        ConfigError: lists every field that is unknown, missing, of another type or a problem.
    """
    found: list[str] = []
    built = _build(kind, values, path, found)
    if built is not None:
        found += problems(built)
    if found:
        raise ConfigError("this configuration cannot run:\n  " + "\n  ".join(found))
    return built


def _build(cls: type, given: Any, path: str, problems: list[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = ", ".join(sorted(fields))
    if not isinstance(given, Mapping):
        problems.append(f"{path} is {given!r}; please give its fields: {known}")
        return None
    types_of = typing.get_type_hints(cls)
    before = len(problems)
    problems += [
        f"{path}.{name} is unknown (its value is {_shown(name, given[name])}); known fields are "
        f"{known}"
        for name in sorted(set(given) - set(fields))
    ]
    values: dict[str, Any] = {}
    for name, entry in fields.items():
        if name not in given:
            if entry.default is entry.default_factory is dataclasses.MISSING:
                problems.append(f"{path}.{name} is missing; please give {wanted(types_of[name])}")
        elif dataclasses.is_dataclass(types_of[name]):
            values[name] = _build(types_of[name], given[name], f"{path}.{name}", problems)
        elif (item := _item_class(types_of[name])) and isinstance(given[name], list | tuple):
            values[name] = tuple(
                _build(item, part, f"{path}.{name}[{number}]", problems)
                for number, part in enumerate(given[name])
            )
        else:
            values[name] = _tuples(given[name])
            if not fits(values[name], types_of[name]):
                problems.append(
                    f"{path}.{name} is {given[name]!r}; please give {wanted(types_of[name])}"
                )
            elif _is_huge(values[name]):
                problems.append(
                    f"{path}.{name} is {given[name]!r}; please give whole numbers up to "
                    f"{_LARGEST_WHOLE}, and others up to {_LARGEST:.2g}"
                )
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{path}.{error}")
        return None


def _item_class(kind: Any) -> type | None:
    """The dataclass that a tuple's items are of, if they are."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(parts[0]):
        return parts[0]
    return None


def _shown(name: str, value: Any) -> str:
    """A value as an error shows it; what may be a secret stays one."""
    return "[hidden]" if _SECRET.search(name) else repr(value)


def without_secrets(value: Any) -> Any:
    """A value as it may be shown: what may be a secret, by its name in a mapping, is not in it."""
    if isinstance(value, Mapping):
        return {
            name: "[hidden]"
            if _SECRET.search(name) and name != "key_env"
            else without_secrets(part)
            for name, part in value.items()
        }
    return tuple(map(without_secrets, value)) if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _is_huge(value: Any) -> bool:
    """Whether a number, or one in a tuple, is larger than anything that a field can mean."""
    if isinstance(value, tuple):
        return any(map(_is_huge, value))
    if isinstance(value, float):
        return abs(value) > _LARGEST
    return isinstance(value, int) and abs(value) > _LARGEST_WHOLE


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from a file is of an annotated type; whole numbers are floats.

    nan and infinity are not: no field means anything with them.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return (
            isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
        )
    if origin in (tuple, collections.abc.Sequence):
        return isinstance(value, tuple) and all(fits(item, parts[0]) for item in value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def wanted(kind: Any) -> str:
    """What a value of an annotated type is, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(wanted, parts))
    if origin is tuple and parts[-1] is not Ellipsis:
        return "(" + ", ".join(map(wanted, parts)) + ")"
    if origin in (tuple, collections.abc.Sequence):
        return f"a tuple whose items are each {wanted(parts[0])}"
    if dataclasses.is_dataclass(kind):
        names = ", ".join(entry.name for entry in dataclasses.fields(kind))
        return f"{getattr(kind, 'SHORT', '')}a mapping of the fields of {kind.__name__}: {names}"
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}
    return names.get(kind, "options by name" if origin else "None")
