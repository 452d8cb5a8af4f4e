"""Mistakes in --config flags are said in a line, with what would be right."""

from pathlib import Path

import pytest

from sl_jax.training.flags import config_problems, parse_config_flags

CONFIG = Path(__file__).parents[2] / "configs" / "grpo.py"


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        (
            "--config.rollout.groops=4",
            ("config.rollout.groops is unknown", "did you mean config.rollout.groups?"),
        ),
        ("--config.rolout.groups=4", ("config.rolout is unknown", "did you mean config.rollout?")),
        ("--config.xyz=4", ("config.xyz is unknown", "known fields are advantage, checkpoint")),
        ("--config.epochs.x=4", ("config.epochs.x is unknown", "config.epochs has no fields")),
        ("--noconfig.judge.twostage", ("did you mean config.judge.two_stage?",)),
    ],
)
def test_unknown_fields(argument, parts):
    (problem,) = config_problems([f"--config={CONFIG}:tiny", argument, "--config.seed=3"])
    assert argument in problem
    for part in parts:
        assert part in problem


def test_known_fields_are_no_problem():
    arguments = ["--config.rollout.groups=4", "--noconfig.judge.two_stage", "--verbosity=1"]
    assert list(config_problems([f"--config={CONFIG}:tiny", *arguments])) == []
    assert list(config_problems(["program"])) == []


def test_files_and_variants(tmp_path):
    (problem,) = config_problems([f"--config={tmp_path}/none.py"])
    assert "there is no file" in problem and "none.py; please give a configuration" in problem
    (tmp_path / "other.py").write_text("x = 1")
    (problem,) = config_problems([f"--config={tmp_path}/other.py"])
    assert "other.py defines no get_config; please" in problem
    (problem,) = config_problems([f"--config={CONFIG}:tinny"])
    assert "variant 'tinny' is unknown; please use production, tiny" in problem


def test_all_mistakes_end_the_program_together():
    with pytest.raises(SystemExit) as error:
        parse_config_flags(["train", "--config=grpo:tiny", "--config.a=1", "--config.b=2"])
    message = str(error.value.code)
    assert "config.a is unknown" in message and "config.b is unknown" in message


def test_a_value_that_cannot_be_read_is_named():
    with pytest.raises(SystemExit) as error:
        parse_config_flags(["train", "--no_such_flag"])
    message = str(error.value.code)
    assert "no_such_flag" in message and "Please see what there is by --help" in message
