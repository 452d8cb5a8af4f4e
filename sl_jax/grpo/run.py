"""One run of training by reward, from the parts that its configuration names to its report."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import jax
from etils import epath

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import abstract_adapter, load_pipeline
from sl_jax.checkpoints.source import TINY, resolve_model
from sl_jax.data import EvalSet, TrainStream
from sl_jax.eval.report import write_html
from sl_jax.grpo.batches import pictures_of, rows_here
from sl_jax.grpo.captions import captioned, to_caption
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.evaluation import Evaluator
from sl_jax.grpo.identity import IDENTITY
from sl_jax.grpo.judges import judgings, open_judges
from sl_jax.grpo.learner import Learner
from sl_jax.grpo.loop import train
from sl_jax.grpo.micro_batch import with_micro_batch
from sl_jax.grpo.parts import Parts
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.report import run_report
from sl_jax.grpo.rollout import Rollout
from sl_jax.imaging.words import counted
from sl_jax.inference.decomposer import Decomposer
from sl_jax.models.lora import Adapter
from sl_jax.parallel.peaks import memory_limit
from sl_jax.parallel.processes import ALONE, Processes, to_everywhere
from sl_jax.training import workdir as work
from sl_jax.training.adapter import first_adapter
from sl_jax.training.compilation import compilation_cache
from sl_jax.training.layout import run_layout
from sl_jax.training.profiling import Profiler, Span
from sl_jax.training.status import require_none_lost, watched

_log = logging.getLogger(__name__)

_SETTINGS = ["*/*.json"]  # of a checkpoint


def run(config: GrpoConfig, processes: Processes = ALONE, profiled: Span | None = None) -> None:
    """One run, from wherever its work directory stands; of some epochs a trace may be made."""
    folder = work.claim(config, IDENTITY, processes)
    report, adapter = folder / "report.html", folder / "adapter"
    profiler = Profiler(profiled, folder, processes)
    keep = config.checkpoint.keep
    with closing(RunCheckpoints(folder / "checkpoints", keep, processes)) as checkpoints:
        done = checkpoints.latest or 0
        if processes.from_main("looking for a report", done >= config.epochs and report.exists()):
            if processes.is_main:
                print(f"This run is finished: {counted(done, 'epoch')}. Report: {report}")
            return
        with processes.together("looking for checkpoints"):
            if processes.is_main and checkpoints.latest is None:
                require_none_lost(folder)  # before anything is written over
        with (
            watched(folder, config.epochs, processes) as status,
            compilation_cache(config.compute.cache, folder),
            _parts(config, folder, checkpoints, processes, profiler) as (made, first),
        ):
            parts = made._replace(status=status)
            with processes.together("recording the configuration"):
                if processes.is_main:
                    work.record(parts.config)
                    report.unlink(missing_ok=True)  # of a run with fewer epochs
            outcome = train(parts, first)
            average = to_everywhere(outcome.state.ema, parts.layout.mesh)
            status.begin("reporting")
            with processes.together("writing adapter and report"):
                if processes.is_main:
                    save_peft(adapter, average, config.model)
                    write_html(run_report(config, folder, outcome.before, outcome.after), report)
                    print(f"Adapter (PEFT folder): {adapter}\nReport: {report}")
                    _tell_of_the_best(checkpoints)


def _tell_of_the_best(checkpoints: RunCheckpoints) -> None:
    """Says so where another epoch's evaluation was better than the last one's."""
    best = checkpoints.best
    if best and best[0] != checkpoints.latest:
        step = checkpoints.directory / str(best[0])
        print(
            f"The best evaluation, {best[1]:.4f}, was that of epoch {best[0]}; it is kept: {step}"
        )


def _memory(processes: Processes) -> float | None:
    """Bytes that programs may use on the smallest device of all processes, if all say."""
    limit = memory_limit(jax.local_devices())
    limits = processes.all_gather("comparing the devices' memory", limit)
    return None if None in limits else min(limits)


@contextmanager
def _parts(
    config: GrpoConfig,
    folder: epath.Path,
    checkpoints: RunCheckpoints,
    processes: Processes,
    profiler: Profiler,
) -> Iterator[tuple[Parts, Callable[[], Adapter]]]:
    """Everything that training needs, with the maker of the adapter to start from.

    What needs no weights comes first, so that its errors do.
    """
    data, rollout = config.data, config.rollout
    settings = resolve_model(config.model, _SETTINGS)
    layout = run_layout(config.mesh, settings)
    first = first_adapter(config, settings, layout)
    config = with_micro_batch(config, settings, layout, _memory(processes))
    if config.model == TINY:
        _log.warning("The tiny base knows procedural designs only: expect little of others.")
    index, held_out = pictures_of(data, processes)
    held_out_set = partial(EvalSet, layers=data.layers, count=config.evaluation.pictures)
    groups, rows = rollout.batch_groups, rows_here(config, layout, processes).held
    training_stream = partial(
        TrainStream, groups=groups, layers=data.layers, seed=config.seed, slots=rows
    )
    left = config.epochs - (checkpoints.latest or 0)
    described = to_caption((index, held_out), data.caption)
    count = len(held_out_set(held_out))
    judging = open_judges(config, folder, left, count, processes, described)
    with judging as judges, ExitStack() as stack:
        index, held_out = captioned(
            (index, held_out), data.caption, judges.training, config.judge.prompts, processes
        )
        stream = stack.enter_context(closing(training_stream(index)))
        examples = held_out_set(held_out)
        captions = [record.caption for part in (index, held_out) for record in part]
        with processes.together("loading the model"):
            model = resolve_model(config.model)
            negative = None if rollout.guidance == 1 else rollout.negative_prompt
            prompts = PromptTable(
                model,
                data,
                captions,
                cache=folder / "prompts",
                dtype=config.compute.dtype,
                negative=negative,
            )
            pipeline = load_pipeline(model, config.compute, layout, [first.shapes])
        training, grading = judgings(config, folder, judges, processes)
        guidance = prompts.guidance(rollout.guidance, layout)
        parts = Parts(
            config=config,
            folder=folder,
            stream=stream,
            prompts=prompts,
            rollout=Rollout(pipeline, rollout, layout, guidance),
            judging=training,
            learner=Learner(
                pipeline=pipeline,
                adapter=abstract_adapter(first.shapes, pipeline.params),
                rollout=rollout,
                objective=config.objective,
                optimizer=config.optimizer,
                config=config.learner,
                layout=layout,
                guidance=guidance,
            ),
            evaluator=Evaluator(
                decomposer=Decomposer(pipeline),
                examples=examples,
                prompts=prompts,
                judging=grading,
                config=config.evaluation,
                shift=rollout.shift,
                layout=layout,
                guidance=guidance,
            ),
            checkpoints=checkpoints,
            layout=layout,
            processes=processes,
            profiler=profiler,
        )
        yield parts, partial(first.on, pipeline.params)
