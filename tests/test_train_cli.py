"""`python -m sl_jax.train` as its users meet it: mistakes, interruptions, kills, results."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from event_files import read_events
from safetensors.numpy import load_file

from sl_jax.data import write_designs
from sl_jax.scoring import CRITERIA
from sl_jax.training.metrics import read_metrics, repeatable
from sl_jax.training.status import read_status

ROOT = Path(__file__).parents[1]
EPOCHS = 3
SETTINGS = {
    "epochs": EPOCHS,
    "data.buckets": ((32, 32),),
    "data.eval_fraction": 0.2,
    "rollout.groups": 4,
    "rollout.batch_groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 4,
    "rollout.window_range": (0, 3),
    "rollout.window_size": 2,
    "learner.micro_batch": 8,
    "learner.updates": 2,
    "lora.rank": 4,
    # With random weights every candidate would meet the vetoes, and nothing be learned.
    "rewards": (("judge", 1.0),),
    "evaluation.pictures": 4,
    "evaluation.batch": 4,
    "evaluation.steps": 2,
    "evaluation.every": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
}
LIMIT = 300  # seconds for one process, on a busy machine


class Trainer:
    """Starts runs on one checkpoint and one folder of pictures."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        write_designs(folder / "pictures", "B", range(24), 32, 3)
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, workdir, *extra, **settings):
        """A process that trains in `workdir`; settings as data__path="…"."""
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        fields = {
            "model": self.model,
            "data.path": self.folder / "pictures",
            "workdir": workdir,
            **SETTINGS,
            **changes,
        }
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", "sl_jax.train", "--config=configs/grpo.py:tiny"]
        return subprocess.Popen(
            [*command, *flags, *extra],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def status(self, workdir):
        """(exit code, what `--status` printed)."""
        command = [sys.executable, "-m", "sl_jax.train", "--status", str(workdir)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=LIMIT
        )
        return done.returncode, done.stdout + done.stderr

    def __call__(self, workdir, *extra, **settings):
        """(exit code, what it printed) of a process that is left alone."""
        process = self.start(workdir, *extra, **settings)
        printed, errors = process.communicate(timeout=LIMIT)
        return process.returncode, printed + errors


@pytest.fixture(scope="module")
def trainer(random_checkpoint, tmp_path_factory):
    return Trainer(random_checkpoint, tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def finished(trainer, tmp_path_factory):
    """The work directory of a run that nobody disturbed, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, printed = trainer(workdir, "--profile=1:1")
    assert code == 0, printed
    return workdir, printed


def _records(workdir):
    """The records without what the clock decides."""
    return [repeatable(record) for record in read_metrics(workdir)]


def _written(workdir):
    """When each file was; a folder in which a lock comes and goes is none."""
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def _assert_same_run(workdir, other):
    # The header's settings stand in no fixed order, the tensors do.
    here, there = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (workdir, other)
    )
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        np.testing.assert_array_equal(tensor, there[name], err_msg=name)
    name = "adapter_config.json"
    assert (workdir / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    assert _records(workdir) == _records(other)


def _wait_for_the_second_epoch(process, workdir):
    """Returns in the middle of it, with the first one's checkpoint on disk."""
    deadline = time.monotonic() + LIMIT
    while not (workdir / "checkpoints" / "1").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _always_logged(record):
    """What a reader of any epoch may count on."""
    judged = ("stage1", "stage2", "reward")
    names = {f"judge/{name}_{what}" for name in judged for what in ("mean", "spread", "ties")}
    names |= {f"judge/{name}_{what}" for name in CRITERIA for what in ("mean", "spread")}
    names |= {"judge/stage_correlation", "judge/valid_share", "judge/two_stage_share"}
    names |= {f"advantage/{name}_groups" for name in ("effective", "tied", "invalid")}
    names |= {"learner/adapter_norm", "learner/skipped_updates", "learner/updates"}
    names |= {"learner/stopped_updates", "judge/quarantined", "rollout/not_finite"}
    names |= {"rollout/staleness", "rollout/window_start"}
    first = int(record["rollout/window_start"])
    per_step = ("ratio_excess", "ratio_std", "clipped_low", "clipped_high", "saturated", "kl_old")
    per_step += ("kl_approx", "kl_reference", "policy_loss", "gradient_norm", "mismatch")
    steps = (first, first + 1)  # the window of this configuration
    return names | {f"learner/{name}/step_{step}" for name in per_step for step in steps}


@pytest.mark.slow
def test_a_run_leaves_all_that_it_promises(finished):
    workdir, printed = finished
    assert "Adapter (PEFT folder)" in printed and "report.html" in printed
    assert {path.name for path in workdir.iterdir()} == {
        *("adapter", "checkpoints", "config.json", "metrics.jsonl", "prompts"),
        *("report.html", "tensorboard", "judge", "profile", "status.json"),
    }
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    assert (workdir / "checkpoints" / str(EPOCHS)).is_dir()
    assert list((workdir / "tensorboard").iterdir())
    assert "<svg" in (workdir / "report.html").read_text()
    adapter = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"]) == ("LORA", 4)
    records = _records(workdir)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [r["step"] for r in records if "evaluation/reward" in r] == [0, 2, 3]
    assert "rollout/score_gap" in records[0]
    for record in records[1:]:
        assert _always_logged(record) <= record.keys()
        assert record["learner/updates"] == 2 * record["step"]
        assert record["learner/skipped_updates"] == 0
        assert record["advantage/effective_groups"] > 0
        assert record["learner/gradient_norm/all"] > 0
        assert record["learner/mismatch_log_ratio/all"] < 1e-3
        assert record["judge/valid_share"] == 1
    phases = ("rollout", "decoding", "encoding", "judging", "learning", "recording")
    for record in list(read_metrics(workdir))[1:]:
        assert {f"{what}/{name}" for what in ("seconds", "share") for name in phases} <= {*record}
        assert sum(v for k, v in record.items() if k.startswith("share/")) == pytest.approx(1)
        rates = {"tflops", "tokens_per_second"}
        parts = ("rollout", "learning", "all")
        assert {f"device/{rate}/{name}" for rate in rates for name in parts} <= {*record}
        made = SETTINGS["rollout.groups"] * SETTINGS["rollout.group_size"]
        if "evaluation/reward" in record:
            made += SETTINGS["evaluation.pictures"]
        rate = record["device/candidates_per_second/all"]
        assert rate * record["seconds/all"] == pytest.approx(made)
        assert record["device/tflops/all"] > 0
    # Of the checkpoint after an epoch the next one tells.
    assert "seconds/checkpointing" in list(read_metrics(workdir))[-1]


@pytest.mark.slow
def test_tensorboard_shows_all_of_it(finished):
    workdir, _ = finished
    events = read_events(workdir)
    for record in read_metrics(workdir):
        for name in {name for name, value in record.items() if value is not None} - {"step"}:
            assert record["step"] in [step for step, _ in events[name]], name
    shown = [name for name in events if name.startswith("held_out/")]
    assert 1 < len(shown) <= SETTINGS["evaluation.pictures"]
    for name in shown:
        assert [step for step, _ in events[name]] == [0, EPOCHS]
    # Judged groups: of the first epoch, of those with an evaluation.
    for number in (0, 1):
        pictures, texts = events[f"judged/{number}"], events[f"judged/{number}.text"]
        assert [step for step, _ in pictures] == [step for step, _ in texts] == [1, 2, 3]
        for (_, pixels), (_, text) in zip(pictures, texts, strict=True):
            assert pixels.shape[2] == 3 and len(np.unique(pixels)) > 5
            assert "| A | " in text and "- A: " in text and CRITERIA[0] in text


@pytest.mark.slow
def test_every_epoch_is_a_line_and_the_status_is_there(trainer, finished):
    workdir, printed = finished
    for epoch in range(1, EPOCHS + 1):
        (line,) = re.findall(rf"^Epoch {epoch} of {EPOCHS}: .*$", printed, re.MULTILINE)
        assert re.search(r"reward 0\.\d{3}, .*\d groups to learn from, \d+% clipped", line)
        assert "learning" in line and (" left." in line) == (epoch < EPOCHS)
        assert ("held out 0." in line) == (epoch in (2, 3))
    told = read_status(workdir)
    assert (told.state, told.epoch, told.updates) == ("finished", EPOCHS, 2 * EPOCHS)
    assert told.last_checkpoint == EPOCHS and told.seconds_per_epoch > 0
    code, screen = trainer.status(workdir)
    assert code == 0 and "finished" in screen and f"{EPOCHS} of {EPOCHS}" in screen


@pytest.mark.slow
def test_a_finished_run_says_so(trainer, finished):
    workdir, _ = finished
    before = _written(workdir)
    code, printed = trainer(workdir)
    assert code == 0
    assert "This run is finished: 3 epochs." in printed
    assert before == _written(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_cut_short_and_started_again_it_ends_the_same(trainer, finished, tmp_path, number):
    workdir = tmp_path / "run"
    process = trainer.start(workdir)
    _wait_for_the_second_epoch(process, workdir)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=LIMIT)
    code, said = {signal.SIGINT: (130, "Stopped"), signal.SIGTERM: (143, "Terminated")}[number]
    assert process.returncode == code, errors
    assert f"{said}. The same command goes on" in printed
    assert "Traceback" not in errors
    assert not (workdir / "report.html").exists()
    code, screen = trainer.status(workdir)
    assert code == 3 and "stopped" in screen
    assert {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number] in screen
    assert "after epoch 1; the same command goes on from there" in screen
    code, printed = trainer(workdir)
    assert code == 0, printed
    assert "Going on after epoch" in printed
    _assert_same_run(workdir, finished[0])


VARIANTS = {
    "advantage__scale": "criterion",
    "epochs": 2,
    "evaluation__window_share": True,
    "learner__reference": "init",
    "learner__stop__kl": 1.0,
    "objective__clip_high": 2e-5,  # of the size that ratios have here
    "objective__clip_low": 2e-5,
    "objective__inverse_dt_weight": True,
    "objective__kl_half_life": 2.0,
    "objective__kl_weight": 0.1,
    "objective__ratio": "guard",
    "rollout__dynamics": "dance_sde",
    "rollout__group_noise": "independent",
    "rollout__guidance": 2.0,
    "rollout__max_staleness": 1,
    "rollout__noise_level": 0.5,
    "rollout__ode_method": "heun",
    "rollout__train_frames": "layers",
    "rollout__window_epochs": 1,
    "rollout__window_order": "sliding",
}


@pytest.mark.slow
def test_a_run_of_variants_is_killed_and_ends_the_same(trainer, tmp_path):
    """All that is off by default at once; what was under way is rolled out again."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, printed = trainer(whole, **VARIANTS)
    assert code == 0, printed
    process = trainer.start(cut, **VARIANTS)
    _wait_for_the_second_epoch(process, cut)
    process.kill()
    process.communicate(timeout=LIMIT)
    assert not (cut / "report.html").exists()
    code, printed = trainer(cut, **VARIANTS)
    assert code == 0, printed
    assert "Going on after epoch" in printed
    _assert_same_run(cut, whole)
    records = _records(whole)[1:]
    assert [record["rollout/staleness"] for record in records] == [0, 1]
    assert [record["rollout/window_start"] for record in records] == [0, 1]
    for first, record in enumerate(records):  # what slides is what is trained
        steps = {name for name in record if name.startswith("learner/ratio_std/step_")}
        assert steps == {f"learner/ratio_std/step_{step}" for step in (first, first + 1)}
    assert [record["learner/updates"] for record in records] == [2, 4]
    assert all(record["learner/stopped_updates"] == 0 for record in records)
    # The first update of a later epoch already finds another policy than the one that sampled.
    assert all(record["learner/kl_old/all"] > 0 for record in records)
    assert all(record["learner/kl_reference/all"] > 0 for record in records)
    assert all(record["learner/mismatch_log_ratio/all"] < 1e-3 for record in records)
    assert all(0 < record["learner/truncated_share"] < 1 for record in records)
    shares = [record.get("rollout/window_share") for record in _records(whole)]
    assert shares[1] is None and all(0 < shares[step] <= 1 for step in (0, 2)), shares


@pytest.mark.slow
def test_another_configuration_is_kept_out(trainer, finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    code, printed = trainer(workdir, lora__rank=5, optimizer__learning_rate=0.25)
    assert code == 1
    assert "ConfigError" in printed and "Traceback" not in printed
    assert "config.lora.rank: 4 there, 5 here" in printed
    assert "config.optimizer.learning_rate: " in printed and "0.25 here" in printed
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_longer_run_goes_on_from_an_adapter_of_another(trainer, finished, tmp_path):
    """A run from `init_adapter`, then prolonged."""
    adapter = finished[0] / "adapter"
    code, printed = trainer(tmp_path / "run", epochs=1, init_adapter=adapter, lora__rank=7)
    assert code == 0, printed
    first = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert first["r"] == 4
    code, printed = trainer(tmp_path / "run", epochs=2, init_adapter=adapter, lora__rank=7)
    assert code == 0, printed
    assert "Going on after epoch 1" in printed
    assert [record["step"] for record in _records(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.slow
def test_a_second_start_compiles_nothing_again(trainer, tmp_path):
    """With the default settings, and nothing of the environment's."""
    told = {n: v for n, v in trainer.environment.items() if not n.startswith("JAX_")}
    alone = copy.copy(trainer)
    alone.environment = told | {"JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    alone.environment["JAX_EXPLAIN_CACHE_MISSES"] = "1"
    missed, found = [], []
    for epochs in (1, 2):
        code, printed = alone(tmp_path / "run", epochs=epochs, evaluation__every=1)
        assert code == 0, printed
        missed.append(set(re.findall(r"COMPILATION CACHE MISS for '.*' with key '(.*)'", printed)))
        found.append(set(re.findall(r"compilation cache hit for '.*' with key '(.*)'", printed)))
    assert len(missed[0]) > 20 and not missed[0] & missed[1]
    names = {key.rpartition("-")[0] for key in found[1]}
    assert {"jit__program", "jit_decode_layers", "jit__micro_batch"} <= names, names
    assert any((tmp_path / "run" / "programs").iterdir())


@pytest.mark.slow
def test_mistakes_end_in_one_line(trainer, tmp_path):
    (tmp_path / "empty").mkdir()
    server = {"judge__endpoints": ("http://127.0.0.1:9/v1",), "judge__model": "m"}
    cases = [
        (("--config.rollout.groops=3",), {}, "did you mean config.rollout.groups?"),
        (("surplus",), {}, "arguments ['surplus'] are not understood"),
        ((), {"data__path": tmp_path / "none"}, f"no folder {tmp_path / 'none'}"),
        ((), {"data__path": tmp_path / "empty"}, f"no usable picture in {tmp_path / 'empty'}"),
        ((), {"data__eval_fraction": 0.0}, "config.data.eval_fraction is 0.0"),
        # Before any picture is looked at:
        (
            (),
            {"lora__targets": ("to_nothing",), "data__path": tmp_path / "empty"},
            "config.lora.targets",
        ),
        (
            (),
            {"model": tmp_path / "empty", "data__path": tmp_path / "empty"},
            "it has no model_index.json",
        ),
        ((), server, "no endpoint of the judge pool can judge"),
        ((), server | {"judge__key_env": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY"),
    ]
    processes = []
    for number, (extra, settings, _) in enumerate(cases):
        workdir = tmp_path / f"run-{number}"
        processes.append((trainer.start(workdir, *extra, **settings), workdir))
        if number % 2:
            for process, _ in processes[-2:]:
                process.wait(LIMIT)
    for (process, workdir), (*_, message) in zip(processes, cases, strict=True):
        printed, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 1, (message, errors)
        assert message in printed + errors
        assert "Traceback" not in errors, errors
        # Nothing was loaded, and the folder is free for the corrected configuration.
        assert not (workdir / "prompts").exists()
        assert not (workdir / "config.json").exists()
