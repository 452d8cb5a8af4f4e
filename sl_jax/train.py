"""The main job: Flow-GRPO fine-tuning. `python -m sl_jax.train --config=configs/grpo.py`.

Stopped and started again with the same configuration, a run goes on where it was.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import load_pipeline
from sl_jax.checkpoints.source import TINY, resolve_model
from sl_jax.data import EvalSet, FolderError, TrainStream, make_buckets, training_and_held_out
from sl_jax.eval.report import write_html
from sl_jax.grpo import workdir as work
from sl_jax.grpo.adapter import first_adapter
from sl_jax.grpo.config import ConfigError, GrpoConfig, from_mapping
from sl_jax.grpo.evaluation import Evaluator
from sl_jax.grpo.judges import open_judges
from sl_jax.grpo.judging import JudgeUnavailableError, Judging
from sl_jax.grpo.learner import Learner
from sl_jax.grpo.loop import Parts, train
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.report import run_report
from sl_jax.grpo.rollout import Rollout
from sl_jax.inference.decomposer import Decomposer
from sl_jax.models.lora import Adapter
from sl_jax.parallel.mesh import Layout, make_mesh
from sl_jax.scoring import BudgetError, Rewards
from sl_jax.scoring.cache import CacheError
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.records import JudgeRecords
from sl_jax.scoring.types import PreflightError
from sl_jax.training.console import set_up_logging
from sl_jax.training.flags import parse_config_flags

_log = logging.getLogger("sl_jax")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_EXPECTED = (
    *(ConfigError, CheckpointError, FolderError),
    *(KeyMissingError, PreflightError, CacheError, JudgeUnavailableError, BudgetError),
)


def main(argv: list[str]) -> None:
    """Trains to the end of the run; leaves adapter and report in the work directory."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    try:
        run(from_mapping(_CONFIG.value.to_dict(), len(jax.devices())))
    except _EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last complete epoch.", flush=True)
        sys.exit(130)


def run(config: GrpoConfig) -> None:
    """One run, from wherever its work directory stands."""
    folder = work.claim(config)
    report, adapter = folder / "report.html", folder / "adapter"
    with closing(RunCheckpoints(folder / "checkpoints", config.checkpoint.keep)) as checkpoints:
        if (checkpoints.latest or 0) >= config.epochs and report.exists():
            print(f"This run is finished: {config.epochs} epochs. Report: {report}")
            return
        with _parts(config, folder, checkpoints) as (parts, first):
            work.record(config)
            report.unlink(missing_ok=True)  # of a shorter run, which this one prolongs
            outcome = train(parts, first)
        save_peft(adapter, outcome.state.ema, config.model)
        write_html(run_report(config, folder, outcome.before, outcome.after), report)
    print(f"Adapter (PEFT folder): {adapter}\nReport: {report}")


@contextmanager
def _parts(
    config: GrpoConfig, folder: epath.Path, checkpoints: RunCheckpoints
) -> Iterator[tuple[Parts, Callable[[], Adapter]]]:
    """Everything that training needs, with the maker of the adapter to start from.

    What needs no weights comes first, so that its errors do.
    """
    data, rollout = config.data, config.rollout
    if config.model == TINY:
        _log.warning("The tiny base knows procedural designs only: expect little of others.")
    index, held_out = training_and_held_out(
        data.path,
        make_buckets(data.buckets, "config.data.buckets"),
        eval_data=data.eval_data or None,
        eval_fraction=data.eval_fraction,
    )
    examples = EvalSet(held_out, layers=data.layers, count=config.evaluation.pictures)
    stream = TrainStream(index, groups=rollout.batch_groups, layers=data.layers, seed=config.seed)
    model = resolve_model(config.model)
    layout = Layout(make_mesh(config.mesh))
    first = first_adapter(config, model, layout)
    left = config.epochs - (checkpoints.latest or 0)
    with open_judges(config, folder, left, len(examples)) as judges, closing(stream):
        captions = [record.caption for part in (index, held_out) for record in part]
        prompts = PromptTable(model, data, captions, folder / "prompts", config.compute.dtype)
        pipeline = load_pipeline(model, config.compute, layout)
        records = JudgeRecords(
            folder / "judge", config.judge.recorded_pictures, config.judge.render
        )
        judging = Judging(judges.training, Rewards(config.rewards), config.judge, records)
        grading = Judging(judges.evaluation, Rewards((("judge", 1.0),)), config.judge)
        evaluator = Evaluator(
            Decomposer(pipeline), examples, prompts, grading, config.evaluation, rollout.shift
        )
        rolling = Rollout(pipeline, rollout, layout)
        learner = Learner(
            pipeline, rollout, config.objective, config.optimizer, config.learner, layout
        )
        parts = (config, folder, stream, prompts, rolling, judging, learner, evaluator)
        yield Parts(*parts, checkpoints), partial(first, pipeline.params)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_config_flags)
