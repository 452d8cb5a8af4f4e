"""What `--explain` prints: meanings from docstrings, origins from comments, and none is missing."""

import dataclasses
import functools
import io
import operator
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from sl_jax.grpo.config import GrpoConfig, from_mapping
from sl_jax.training.configuration import ConfigError
from sl_jax.training.explain import ORIGINS, explained, meanings, origins
from sl_jax.training.flags import packaged, read_config

FILE = Path(__file__).parents[2] / "configs" / "grpo.py"
VARIANTS = ("production", "tiny", "gpu1", "v5e8", "v5p16", "hosted")


@dataclass(frozen=True)
class Inner:
    """Of a part.

    Attributes:
      size, weight: how large, and
        how heavy; see below.
      extra: free.

    Raises:
      ValueError: never: it is no field.
    """

    size: int = 1
    weight: float = 1.0
    extra: str | None = None


@dataclass(frozen=True)
class Named(Inner):
    """A part of several, for which its name will do."""

    SHORT: ClassVar[str] = "a name, or "


@dataclass(frozen=True)
class Outer:
    """A whole.

    Attributes:
        name: what it is called.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    untold: bool = False


def test_meanings_are_those_of_docstrings():
    found = meanings(Outer)
    assert list(found) == ["name", "inner.size", "inner.weight", "inner.extra", "untold"]
    assert found["name"] == ("what it is called.", "a text")
    assert found["inner.size"] == ("how large, and how heavy; see below.", "a whole number")
    assert found["inner.weight"].text == found["inner.size"].text
    assert found["inner.extra"] == ("free.", "a text or None")
    assert found["untold"].text == ""


def test_parts_of_which_there_may_be_several_are_told_by_their_fields():
    whole = dataclasses.make_dataclass(
        "Whole", [("plain", tuple[Inner, ...]), ("named", tuple[Named, ...])]
    )
    each = "a tuple whose items are each"
    assert {name: meaning.values for name, meaning in meanings(whole).items()} == {
        "plain": f"{each} a mapping of the fields of Inner: size, weight, extra",
        "named": f"{each} a name, or a mapping of the fields of Named: size, weight, extra",
    }


SOURCE = """
from ml_collections import ConfigDict

def get_config(variant="production"):
    return {"production": _production, "small": _small}[variant]()

def _production():
    config = ConfigDict()
    config.name = "# no comment"  # peer: them

    # ours: measured
    # on two machines
    inner = config.inner = ConfigDict()
    inner.size = 4
    inner.weight = (
        2.0
    )  # paper
    inner.extra = None

    config.untold = True
    return config

def _small():
    config = _production()
    config.inner.size = 2  # unmeasured
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_origins_are_comments(file):
    expected = {
        "name": "peer: them",
        "inner": "ours: measured on two machines",
        "inner.size": "ours: measured on two machines",
        "inner.weight": "paper",
        "inner.extra": "ours: measured on two machines",
        "untold": "",
    }
    assert origins(file) == origins(file, "production") == expected
    assert origins(file, "small") == expected | {"inner.size": "unmeasured"}


def test_every_field_is_explained(file):
    config = read_config(file, "small").to_dict()
    config["inner"]["weight"] = 3.0
    text = explained(Outer, config, {"inner.weight": 3.0}, f"{file}:small", "grpo")
    assert (
        text
        == f"""{file}:small

config.name = '# no comment'
    what it is called.
    Takes a text.
    Origin: peer: them
config.inner.size = 2
    how large, and how heavy; see below.
    Takes a whole number.
    Origin: unmeasured
config.inner.weight = 3.0  (overridden)
    how large, and how heavy; see below.
    Takes a finite number.
    Origin: your command line; in the file 2.0, paper
config.inner.extra = None
    free.
    Takes a text or None.
    Origin: ours: measured on two machines
config.untold = True
    Takes True or False.
    Origin: mine.py does not say

5 fields, 1 overridden."""
    )


def _explained(source, config, **given):
    return explained(GrpoConfig, config.to_dict(), given, str(source), "grpo")


def test_a_file_that_builds_on_the_packaged_one_has_its_origins(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from sl_jax.configs import grpo\n"
        "def get_config():\n"
        "    config = grpo.get_config()\n"
        "    config.epochs = 7  # ours: a week\n"
        "    config.lora.rank = 9\n"
        "    config.optimizer.update(b1=0.5)\n"
        "    return config\n"
    )
    text = _explained(path, read_config(path))
    entries = dict(re.findall(r"^config\.(\S+) = [^\n]*\n(.*?)(?=^config|\Z)", text, re.M | re.S))
    assert "Origin: ours: a week" in entries["epochs"]
    assert "mine.py does not say" in entries["lora.rank"]
    assert "mine.py does not say" in entries["optimizer.b1"]
    assert "Origin: peer: flow_grpo" in entries["optimizer.b2"]


@pytest.mark.parametrize("columns", [80, 100])
def test_it_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = _explained(f"{FILE}:tiny", packaged("grpo", "tiny"))
    _, *lines = text.splitlines()  # after the file's path
    assert 0.9 * columns < max(map(len, lines)) <= columns


def test_secrets_are_not_shown():
    config = packaged("grpo", "tiny")
    config.judge.request.extra = {"api_key": "s3cret", "top_k": 5}
    config.judge.endpoints = ({"url": "http://a/v1", "token": "s3cret", "key_env": "JUDGE_KEY"},)
    text = _explained(f"{FILE}:tiny", config)
    assert "s3cret" not in text
    assert "'top_k': 5" in text and "JUDGE_KEY" in text and text.count("[hidden]") == 2


def test_no_field_lacks_a_meaning():
    found = meanings(GrpoConfig)
    assert len(found) > 100
    assert [name for name, meaning in found.items() if len(meaning.text) < 8] == []
    vague = [name for name, meaning in found.items() if meaning.text.startswith("see ")]
    assert vague == []


def test_meanings_can_be_read_alone():
    """They begin with what the field is, and "euler" stands where it may be given."""
    for name, (text, values) in meanings(GrpoConfig).items():
        assert not text.startswith(("of ", "for ", "that ")), (name, text)
        assert "None" not in values.replace(" or None", ""), (name, values)
        quoted = re.findall(r'"(\w+)"', text)
        assert not quoted or not re.fullmatch(r"a \w+ number( or None)?", values), (name, text)


def test_a_field_that_takes_only_some_texts_says_which():
    texts = [name for name, meaning in meanings(GrpoConfig).items() if meaning.values == "a text"]
    assert len(texts) > 8
    config = packaged("grpo", "tiny").to_dict()
    for name in texts:
        *parts, last = name.split(".")
        at = functools.reduce(operator.getitem, parts, config)
        at[last] = "nonsense:1"  # an address, too
    with pytest.raises(ConfigError) as error:
        from_mapping(config, 1)
    assert "config.judge.prompts" in str(error.value)
    assert "one of" not in str(error.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_value_lacks_an_origin(variant):
    found = origins(FILE, variant)
    for name in meanings(GrpoConfig):
        kind = re.split(r"[ :,;]", found.get(name, ""))[0]
        assert kind in ORIGINS, (name, found.get(name))
    for kind in ORIGINS:
        assert re.search(rf"^    {kind} +\w", FILE.read_text(), re.MULTILINE), kind


def test_every_variant_is_known_and_origins_follow_the_values():
    """A value that a variant changes has its own origin, not the production run's."""
    with pytest.raises(ValueError, match=", ".join(VARIANTS)):
        packaged("grpo", "none")
    production, said = packaged("grpo", "production").to_dict(), origins(FILE)

    def changed(here, there, path=""):
        for name, value in here.items():
            if isinstance(value, dict) and name != "extra":
                yield from changed(value, there[name], f"{path}{name}.")
            elif value != there[name]:
                yield f"{path}{name}"

    for variant in VARIANTS[1:]:
        names = list(changed(packaged("grpo", variant).to_dict(), production))
        assert names
        text = FILE.read_text()
        body = text[text.index(f"def _{variant}(") :].split("\n\n\n")[0]
        comments = [
            token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(body).readline)
            if token.type == tokenize.COMMENT
        ]
        for name in names:
            told = origins(FILE, variant)[name]
            assert any(told.startswith(comment) for comment in comments), (variant, name, told)
            assert told != said[name] or variant == "tiny"


def test_all_fields_stand_in_the_file_in_the_dataclasses():
    """Nothing of the file is left out of what `--explain` prints."""

    def leaves(config, kind, path=""):
        types_of = {entry.name: entry.type for entry in dataclasses.fields(kind)}
        for name, value in config.items():
            part = types_of[name]
            if dataclasses.is_dataclass(part):
                yield from leaves(value, part, f"{path}{name}.")
            else:
                yield f"{path}{name}"

    assert set(leaves(packaged("grpo", "production"), GrpoConfig)) == set(meanings(GrpoConfig))
