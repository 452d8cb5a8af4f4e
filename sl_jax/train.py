"""The main job: Flow-GRPO fine-tuning. `python -m sl_jax.train --config=configs/grpo.py`.

Stopped and started again with the same configuration, a run goes on where it was.
"""

import jax
from absl import app, flags
from ml_collections import config_flags

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.data import FolderError
from sl_jax.grpo.config import from_mapping
from sl_jax.grpo.judging import JudgeUnavailableError
from sl_jax.grpo.run import run
from sl_jax.parallel.joining import joined
from sl_jax.parallel.processes import ProcessError
from sl_jax.scoring import BudgetError
from sl_jax.scoring.cache import CacheError
from sl_jax.scoring.captions import CaptionError
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.types import PreflightError
from sl_jax.training.configuration import ConfigError, distributed_part
from sl_jax.training.console import ending_in_a_line, set_up_logging
from sl_jax.training.flags import parse_config_flags
from sl_jax.training.profiling import span

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_PROFILE = flags.DEFINE_string(
    "profile", "", "START:STEPS: a trace of so many epochs from START, counted from 0."
)
_EXPECTED = (
    *(ConfigError, CheckpointError, FolderError, ProcessError, JudgeUnavailableError, BudgetError),
    *(KeyMissingError, PreflightError, CacheError, CaptionError),
)


def main(argv: list[str]) -> None:
    """Trains to the end of the run; leaves adapter and report in the work directory."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    config = _CONFIG.value.to_dict()
    with (
        ending_in_a_line(_EXPECTED, "epoch", config["workdir"]),
        joined(distributed_part(config)) as processes,
    ):
        run(from_mapping(config, jax.device_count()), processes, span(_PROFILE.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_config_flags)
