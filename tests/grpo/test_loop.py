"""The epoch loop's books: whenever a run is cut short, it goes on as if it had not been."""

import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from live_buffers import buffers_of

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.grpo import loop, rolling
from sl_jax.grpo.config import CheckpointConfig, EvaluationConfig, GrpoConfig, RolloutConfig
from sl_jax.grpo.epoch import window_start
from sl_jax.grpo.judging import JudgeUnavailableError
from sl_jax.grpo.loop import train
from sl_jax.grpo.parts import Parts
from sl_jax.parallel.processes import Processes
from sl_jax.training.health import NotFiniteError
from sl_jax.training.metrics import read_metrics, repeatable
from sl_jax.training.profiling import Profiler


@struct.dataclass
class State:
    """Stands for `LearnerState`: something that every epoch changes."""

    initial: jax.Array
    ema: jax.Array
    updates: jax.Array


class Stream:
    def __init__(self):
        self.position, self.quarantined = 0, {}

    def state(self):
        return {"step": self.position}

    def restore(self, state):
        self.position = state["step"]


class Run:
    """A run in miniature, whose epochs multiply, and which `fault(phase, epoch)` may disturb."""

    def __init__(self, folder, monkeypatch, every=2, epochs=6):
        self.folder, self.fault, self.seen = folder, lambda phase, epoch: None, []
        self.shown, self.warned = [], []
        self.config = GrpoConfig(
            str(folder),
            "tiny",
            epochs,
            checkpoint=CheckpointConfig(every, 3),
            evaluation=EvaluationConfig(every=3),
        )
        monkeypatch.setattr(
            loop.Epochs, "run", lambda epochs, *args: self._epoch(epochs._parts, *args)
        )
        monkeypatch.setattr(
            loop, "evaluation_metrics", lambda value: {"evaluation/reward": float(value)}
        )
        monkeypatch.setattr(
            loop._Books, "pictures", lambda books, step, results: self._pictures(step, results)
        )
        monkeypatch.setattr(loop, "warn_of_divergence", self._warn)
        monkeypatch.setattr(loop, "_sampler_gap", lambda *args: {"rollout/score_gap": 0.5})

    def _epoch(self, parts, state, epoch, phases):
        phases.begin("rollout")
        self.seen.append(epoch)
        parts.stream.position += 4
        self.fault("rollout", epoch)
        phases.begin("learning")
        changed = State(state.initial, state.ema * 1.01 + epoch, state.updates + 2)
        self.fault("learning", epoch)
        return changed, {"judge/reward_mean": float(changed.ema), "position": parts.stream.position}

    def _pictures(self, step, results):
        self.shown.append((step, float(results)))

    def _warn(self, records, said):
        self.warned.append(list(records)[-1]["step"])

    def _evaluated(self, value, *_):
        self.fault("evaluating", len(self.seen))
        return value

    def _start(self, adapter):
        return State(jnp.float32(adapter), jnp.float32(adapter), jnp.int32(0))

    def start(self):
        """A new process: everything but the folder is made anew."""
        checkpoints = RunCheckpoints(self.folder / "checkpoints", 3)
        self.parts = Parts(
            config=self.config,
            folder=self.folder,
            stream=Stream(),
            prompts=None,
            rollout=None,
            judging=None,
            learner=SimpleNamespace(start=self._start),
            evaluator=self._evaluated,
            checkpoints=checkpoints,
            layout=None,
            processes=Processes(),
            profiler=Profiler(None, self.folder),
        )
        try:
            with self.parts.processes.open():
                return train(self.parts, lambda: 1.0)
        finally:
            checkpoints.close()

    def records(self):
        return [repeatable(record) for record in read_metrics(self.folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its outcome and its records."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Run(tmp_path_factory.mktemp("whole"), monkeypatch)
        return run.start(), run.records()


def _interrupt(at_phase, at_epoch, error=KeyboardInterrupt):
    def fault(phase, epoch):
        if (phase, epoch) == (at_phase, at_epoch):
            raise error

    return fault


def _same(outcome, other):
    assert jax.tree.map(np.asarray, outcome.state) == jax.tree.map(np.asarray, other.state)
    assert float(outcome.after) == float(other.after)
    assert float(outcome.before) == float(other.before)


def test_an_undisturbed_run(whole):
    outcome, records = whole
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5, 6]
    evaluated = [r["step"] for r in records if "evaluation/reward" in r]
    assert evaluated == [0, 3, 6]
    assert records[0]["rollout/score_gap"] == 0.5
    assert int(outcome.state.updates) == 12
    assert float(outcome.before) == 1.0 and float(outcome.after) == float(outcome.state.ema)


@pytest.mark.parametrize(("phase", "epoch"), [("rollout", 0), ("learning", 3), ("rollout", 5)])
def test_interrupted_in_an_epoch(tmp_path, monkeypatch, whole, phase, epoch):
    run = Run(tmp_path, monkeypatch)
    run.fault = _interrupt(phase, epoch)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    run.fault, run.seen = lambda phase, epoch: None, []
    outcome = run.start()
    assert run.seen == list(range(epoch, 6))  # whole epochs are not repeated
    _same(outcome, whole[0])
    assert run.records() == whole[1]


@pytest.mark.parametrize("epoch", [0, 3, 6])
def test_interrupted_in_an_evaluation(tmp_path, monkeypatch, whole, epoch):
    run = Run(tmp_path, monkeypatch)
    run.fault = _interrupt("evaluating", epoch)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    run.fault, run.seen = lambda phase, epoch: None, []
    outcome = run.start()
    assert run.seen == list(range(max(epoch - 1, 0), 6))
    _same(outcome, whole[0])
    assert run.records() == whole[1]


def test_a_judge_that_is_gone_leaves_a_checkpoint(tmp_path, monkeypatch, whole):
    run = Run(tmp_path, monkeypatch, every=100)
    run.fault = _interrupt("rollout", 4, JudgeUnavailableError("nobody answers"))
    with pytest.raises(JudgeUnavailableError):
        run.start()
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    assert checkpoints.latest == 4
    checkpoints.close()
    run.fault = lambda phase, epoch: None
    _same(run.start(), whole[0])
    assert run.records() == whole[1]


def test_too_many_updates_that_are_not_finite_leave_a_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, every=100)

    def require(epochs):
        if run.seen == [0, 1, 2, 3]:
            raise NotFiniteError("5 updates in a row")

    monkeypatch.setattr(loop.Epochs, "require_health", require)
    with pytest.raises(NotFiniteError):
        run.start()
    assert (tmp_path / "checkpoints" / "4").is_dir()  # with the epoch that ended it


def test_what_a_kill_left_of_samples_half_written_is_removed(tmp_path, monkeypatch):
    """The next run may keep others."""
    kept = tmp_path / "not_finite"
    kept.mkdir()
    for name in ("epoch_000001_step_1_slot_0.json", f".{'0a' * 16}.partial"):
        (kept / name).write_bytes(b"{")
    Run(tmp_path, monkeypatch, epochs=1).start()
    assert [path.name for path in kept.iterdir()] == ["epoch_000001_step_1_slot_0.json"]


def test_killed_between_checkpoints(tmp_path, monkeypatch, whole):
    """What was recorded after the checkpoint that a run goes on from is recorded anew."""
    run = Run(tmp_path, monkeypatch)
    save = RunCheckpoints.save
    monkeypatch.setattr(
        RunCheckpoints, "save", lambda self, step, *a: step > 2 or save(self, step, *a)
    )
    run.fault = _interrupt("rollout", 5)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    monkeypatch.setattr(RunCheckpoints, "save", save)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "judge/rew')  # cut off by the kill
    run.fault, run.seen = lambda phase, epoch: None, []
    outcome = run.start()
    assert run.seen == [2, 3, 4, 5]
    _same(outcome, whole[0])
    assert run.records() == whole[1]


def test_a_damaged_newest_checkpoint(tmp_path, monkeypatch, whole):
    run = Run(tmp_path, monkeypatch)
    run.fault = _interrupt("rollout", 5)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    for path in (tmp_path / "checkpoints" / "5").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    run.fault, run.seen = _interrupt("rollout", 4), []
    with pytest.raises(KeyboardInterrupt):
        run.start()
    assert run.seen == [4]
    # The next epoch of the same number is saved as usual.
    run.fault, run.seen = _interrupt("rollout", 5), []
    with pytest.raises(KeyboardInterrupt):
        run.start()
    run.fault, run.seen = lambda phase, epoch: None, []
    outcome = run.start()
    assert run.seen == [5]
    _same(outcome, whole[0])
    assert run.records() == whole[1]


def test_an_interrupt_waits_for_what_belongs_together(tmp_path, monkeypatch, whole):
    """Ctrl-C while an epoch is being recorded and saved comes through after that."""
    run = Run(tmp_path, monkeypatch)
    save = loop._save

    def interrupted(parts, state, epoch, position, *reward):
        if epoch == 4:
            os.kill(os.getpid(), signal.SIGINT)
        save(parts, state, epoch, position, *reward)

    monkeypatch.setattr(loop, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    assert [record["step"] for record in run.records()] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(loop, "_save", save)
    run.seen = []
    _same(run.start(), whole[0])
    assert run.seen == [4, 5]
    assert run.records() == whole[1]


def test_an_epoch_whose_metrics_are_being_written_is_complete(tmp_path, monkeypatch, whole):
    """Ctrl-C just before processes tell each other of what they wrote: nothing is repeated."""
    run = Run(tmp_path, monkeypatch, every=100)
    scalars = loop._Books.scalars

    def interrupted(books, step, values):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        scalars(books, step, values)

    monkeypatch.setattr(loop._Books, "scalars", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    monkeypatch.setattr(loop._Books, "scalars", scalars)
    run.seen = []
    _same(run.start(), whole[0])
    assert run.seen == [4, 5]
    assert run.records() == whole[1]


def test_pictures_before_and_after_and_a_look_after_each_evaluation(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    outcome = run.start()
    assert run.shown == [(0, 1.0), (6, float(outcome.after))]
    assert run.warned == [3, 6]


def test_prolonging_a_run(tmp_path, monkeypatch):
    short = Run(tmp_path, monkeypatch, epochs=2)
    short.start()
    longer = Run(tmp_path, monkeypatch, epochs=4)
    longer.start()
    assert longer.seen == [2, 3]
    assert [record["step"] for record in longer.records()] == [0, 1, 2, 3, 4]


def test_judgements_that_cannot_be_read_back_end_no_run(tmp_path, monkeypatch, caplog):
    """They are shown where an epoch is evaluated, and missed once in the log."""
    (tmp_path / "judge").mkdir()
    for epoch in (1, 3, 6):
        (tmp_path / "judge" / f"epoch_{epoch:06d}.jsonl").write_text("{}\n")
        (tmp_path / "judge" / f"epoch_{epoch:06d}_000.png").write_bytes(b"")
    run = Run(tmp_path, monkeypatch)
    run.start()
    assert run.seen == list(range(6))
    assert caplog.text.count("TensorBoard gets none of epoch 1's judgements") == 1
    assert caplog.text.count("TensorBoard gets none") == 1


def test_nobody_holds_on_to_a_past_state(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, every=100)
    run.config = dataclasses.replace(run.config, evaluation=EvaluationConfig(every=100))
    alive = []

    def epoch(parts, state, epoch, phases):
        alive.append(len(buffers_of(12345)))
        changed = State(state.initial, state.ema + 1, state.updates + 1)
        return changed, {"judge/reward_mean": 0.0}

    def start(adapter):
        return State(*(jnp.zeros(12345) + i for i in range(3)))

    monkeypatch.setattr(run, "_start", start)
    monkeypatch.setattr(run, "_evaluated", lambda value, *_: None)
    monkeypatch.setattr(loop, "evaluation_metrics", lambda value: {})
    monkeypatch.setattr(loop._Books, "pictures", lambda *args: None)
    monkeypatch.setattr(loop.Epochs, "run", lambda epochs, *args: epoch(epochs._parts, *args))
    run.start()
    # When an epoch begins, the one state's three arrays are all there is.
    assert alive == [3] * 6
    restore, restored = RunCheckpoints.restore, []

    def restoring(self, like):
        restored.append(len(buffers_of(12345)))
        return restore(self, like)

    monkeypatch.setattr(RunCheckpoints, "restore", restoring)
    run.config = dataclasses.replace(run.config, epochs=8)
    run.start()
    assert restored == [0] and alive == [3] * 8


def test_windows_are_drawn_per_epoch_from_the_seed():
    config = GrpoConfig(
        "", "", 1, seed=3, rollout=RolloutConfig(window_range=(1, 6), window_size=2)
    )
    starts = [window_start(config, epoch) for epoch in range(60)]
    assert starts == [window_start(config, epoch) for epoch in range(60)]
    assert set(starts) == {1, 2, 3, 4}
    other = GrpoConfig("", "", 1, seed=4, rollout=config.rollout)
    assert starts != [window_start(other, epoch) for epoch in range(60)]


def test_a_sliding_window_moves_by_one_and_stays_at_the_end():
    rollout = RolloutConfig(
        window_range=(1, 5), window_size=2, window_order="sliding", window_epochs=3
    )
    config = GrpoConfig("", "", 1, rollout=rollout)
    starts = [window_start(config, epoch) for epoch in range(12)]
    assert starts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]


def test_keys_depend_on_step_and_slot_alone():
    examples = [SimpleNamespace(slot=slot) for slot in range(4)]
    keys = rolling.rollout_keys(1, 5, examples)
    assert len(np.unique(keys, axis=0)) == 4
    assert np.array_equal(rolling.rollout_keys(1, 5, examples[2:]), keys[2:])
    assert not np.array_equal(rolling.rollout_keys(1, 6, examples), keys)


def test_records_are_json_lines(whole, tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, epochs=1)
    run.start()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert {"seconds/rollout", "seconds/learning"} <= set(json.loads(lines[1]))
