"""The main job: Flow-GRPO fine-tuning. `python -m sl_jax.train --config=configs/grpo.py`.

Stopped and started again with the same configuration, a run goes on where it was.
"""

import sys

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.data import FolderError
from sl_jax.grpo.config import GrpoConfig, from_mapping
from sl_jax.grpo.judging import JudgeUnavailableError
from sl_jax.grpo.run import run
from sl_jax.grpo.selftest import selftest
from sl_jax.parallel.interrupts import stop
from sl_jax.parallel.joining import joined
from sl_jax.parallel.processes import ProcessError
from sl_jax.scoring import BudgetError
from sl_jax.scoring.cache import CacheError
from sl_jax.scoring.captions import CaptionError
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.types import PreflightError
from sl_jax.training.configuration import ConfigError, distributed_part
from sl_jax.training.console import ending_in_a_line, set_up_logging
from sl_jax.training.explain import explained
from sl_jax.training.flags import packaged, parse_config_flags
from sl_jax.training.health import NotFiniteError
from sl_jax.training.profiling import span
from sl_jax.training.status import StatusError
from sl_jax.training.status_screen import show

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_PROFILE = flags.DEFINE_string(
    "profile", "", "START:STEPS: a trace of so many epochs from START, counted from 0."
)
_SELFTEST = flags.DEFINE_boolean(
    "selftest", False, "Check this host's hardware, in ten minutes at most; needs no --config."
)
_EXPLAIN = flags.DEFINE_boolean(
    "explain", False, "Print every field of --config: value, meaning, origin; then end."
)
_STATUS = flags.DEFINE_string(
    "status", "", "Print how the run in this work directory stands; needs no --config."
)
_FOUND = "selftest.json"  # in the current folder
_EXPECTED = (
    *(ConfigError, CheckpointError, FolderError, ProcessError, NotFiniteError),
    *(JudgeUnavailableError, BudgetError, KeyMissingError, PreflightError),
    *(CacheError, CaptionError),
)
_SMALLER = (
    "config.learner.micro_batch first, then config.rollout.batch_groups and "
    "config.evaluation.batch: python -m sl_jax.plan tells what fits"
)


def main(argv: list[str]) -> None:
    """Trains to the end of the run; leaves adapter and report in the work directory."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    if _SELFTEST.value:
        sys.exit(_check_hardware())
    if _STATUS.present:
        sys.exit(_show_status())
    if _CONFIG.value is None:
        raise app.UsageError("there is nothing to train; please use --config=FILE")
    config = _CONFIG.value.to_dict()
    if _EXPLAIN.value:
        flag = flags.FLAGS["config"]
        print(explained(GrpoConfig, config, flag.override_values, flag.config_filename, "grpo"))
        return
    with (
        ending_in_a_line(_EXPECTED, "epoch", config["workdir"], _SMALLER) as code_of,
        joined(distributed_part(config), code_of) as processes,
    ):
        run(from_mapping(config, jax.device_count()), processes, span(_PROFILE.value))


def _show_status() -> int | str:
    try:
        return show(_STATUS.value)
    except (StatusError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"


def _check_hardware() -> int:
    try:
        passed = selftest(_short, _FOUND)
    except KeyboardInterrupt:
        stop("Stopped.")
    print(f"{'All is well' if passed else 'Something is wrong'}: {_FOUND}")
    return 0 if passed else 1


def _short(folder: epath.Path) -> GrpoConfig:
    """One epoch of the tiny configuration, with batches that all devices have a part of."""
    config, count = packaged("grpo", "tiny"), jax.device_count()
    groups, evaluated = count * -(-4 // count), count * -(-8 // count)
    config.update(model="tiny", workdir=str(folder / "run"), epochs=1)
    config.data.path = str(folder / "pictures")
    config.rollout.update(groups=2 * groups, batch_groups=groups)
    config.learner.micro_batch = None  # derived
    config.evaluation.update(pictures=4, batch=evaluated, steps=4)
    config.compute.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return from_mapping(config.to_dict(), count)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_config_flags)
