"""Every field can be set by a flag, which a packaged configuration must name for that."""

import dataclasses
import runpy
import typing
from pathlib import Path

import pytest

from sl_jax.grpo.config import GrpoConfig
from sl_jax.training.finetune import FineTuneConfig
from sl_jax.training.from_nothing import BaseConfig

FOLDER = Path(__file__).parents[2] / "configs"
KINDS = {"grpo": GrpoConfig, "sft": FineTuneConfig, "sft_tiny": BaseConfig}


def _get_config(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]


def _all():
    """Name and arguments of each configuration; those that take a variant list them in an error."""
    for name in KINDS:
        try:
            _get_config(name)("?")
        except ValueError as error:
            yield from ((name, (v,)) for v in str(error).rpartition("please use ")[2].split(", "))
        except TypeError:
            yield name, ()


def _unnamed(kind, given, path="config"):
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        here = f"{path}.{field.name}"
        if field.name not in given:
            yield here
        elif dataclasses.is_dataclass(types[field.name]):
            yield from _unnamed(types[field.name], given[field.name], here)


def test_all_are_looked_at():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", *KINDS}
    assert {("grpo", ("hosted",)), ("sft", ("tiny",)), ("sft_tiny", ())} <= {*_all()}


@pytest.mark.parametrize(("name", "variant"), [*_all()])
def test_a_packaged_configuration_names_every_field(name, variant):
    assert list(_unnamed(KINDS[name], _get_config(name)(*variant))) == []


def test_what_is_not_named_is_found():
    config = _get_config("sft")("tiny")
    del config.optimizer.b2
    assert list(_unnamed(FineTuneConfig, config)) == ["config.optimizer.b2"]
