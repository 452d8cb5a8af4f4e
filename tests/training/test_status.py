"""`status.json`: whole at every moment, alive by itself, and right about how a run ended."""

import dataclasses
import datetime
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from etils import epath

from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.run import run
from sl_jax.parallel.interrupts import Interrupts, Terminated
from sl_jax.parallel.processes import ALONE
from sl_jax.training import status as module
from sl_jax.training import status_screen
from sl_jax.training.status import (
    Status,
    StatusError,
    StatusFile,
    Warned,
    looks_dead,
    read_status,
    require_none_lost,
    watched,
)
from sl_jax.training.status_screen import EXIT_CODES, screen

NOW = datetime.datetime(2026, 11, 28, 3, 10, 0, tzinfo=datetime.UTC)
STATUS = Status(
    state="running",
    of=300,
    started="2026-11-27T23:10:00Z",
    updated="2026-11-28T03:09:55Z",
    host="tpu-7",
    pid=4711,
    heartbeat=10.0,
    processes=4,
    version="0.1.0",
    phase="learning",
    phase_since="2026-11-28T03:07:55Z",
    epoch=75,
    updates=150,
    reward=0.5612,
    held_out=0.601,
    seconds_per_epoch=190.0,
    seconds_left=42_750.0,
    judge={"up": 1.0, "a/up": 1.0, "b/up": 0.0, "waiting": 3.0, "requests": 900.0, "p95": 4.2},
    last_checkpoint=70,
    warnings=(Warned("2026-11-28T03:00:00Z", "Rollout and learner differ"),),
    warned=7,
)
DEAD_PID = 2**22 + 1  # more than Linux gives


def _soon(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _time(status):
    return datetime.datetime.fromisoformat(status.updated)


def _told(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats of a twentieth of a second."""
    monkeypatch.setattr(module, "_TIMES", {False: (0.05, 0.01), True: (0.05, 0.01)})


def test_a_run_from_its_start_to_its_end(tmp_path, quick):
    (tmp_path / "checkpoints" / "2" / "tree").mkdir(parents=True)
    with watched(tmp_path, 6, ALONE) as status:
        _soon(lambda: (tmp_path / "status.json").exists())
        first = read_status(tmp_path)
        assert (first.state, first.phase, first.epoch, first.of) == ("running", "loading", 0, 6)
        assert (first.host, first.pid) == (socket.gethostname(), os.getpid())
        assert first.seconds_per_epoch is None and first.last_checkpoint == 2
        assert status.pace is None
        status.begin_epochs(2)
        status.begin("rollout")
        _soon(lambda: read_status(tmp_path).phase == "rollout")
        status.wait("no judge has been up")
        _soon(lambda: read_status(tmp_path).state == "waiting")
        assert read_status(tmp_path).reason == "no judge has been up"
        status.wait("")
        _soon(lambda: read_status(tmp_path).state == "running")
        metrics = {"judge/reward_mean": 0.5, "learner/updates": 6.0, "pool/a/p95": float("nan")}
        status.end_epoch(metrics | {"evaluation/reward": 0.7})
        status.end_epoch(metrics)
        _soon(lambda: read_status(tmp_path).epoch == 4)
        told = read_status(tmp_path)
        assert (told.updates, told.reward, told.held_out) == (6, 0.5, 0.7)
        assert told.judge == {"a/p95": None}
        assert told.seconds_left == pytest.approx(2 * told.seconds_per_epoch, abs=0.1)
        status.begin("learning")
    end = read_status(tmp_path)
    assert (end.state, end.phase, end.reason) == ("finished", "", "")
    assert not [t for t in threading.enumerate() if t.name == "status"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "status.json"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "Ctrl-C"),
        (Terminated(), "SIGTERM"),
        (ValueError("of the\ntest"), "ValueError: of the test"),
    ],
)
def test_a_run_that_stops_says_why(tmp_path, error, reason):
    with pytest.raises(type(error)), watched(tmp_path, 6, ALONE) as status:
        status.begin("judging")
        raise error
    told = read_status(tmp_path)
    assert (told.state, told.reason, told.phase) == ("stopped", reason, "judging")


def test_other_processes_write_nothing(tmp_path):
    class Second:
        is_main, count = False, 2

    with watched(tmp_path, 6, Second()) as status:
        status.begin_epochs(0)
        status.begin("rollout")
        status.wait("a judge")
        status.end_epoch({})
        assert status.pace is None
    assert list(tmp_path.iterdir()) == []


def test_it_beats_while_nothing_changes(tmp_path, quick):
    status = StatusFile(tmp_path, 3)
    _soon(lambda: (tmp_path / "status.json").exists())
    before = (tmp_path / "status.json").stat().st_mtime_ns
    _soon(lambda: (tmp_path / "status.json").stat().st_mtime_ns > before)
    status.close("finished")


def test_a_reader_never_meets_half_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TIMES", {False: (0.001, 0.0), True: (0.001, 0.0)})
    status = StatusFile(tmp_path, 3)
    _soon(lambda: (tmp_path / "status.json").exists())
    for number in range(300):
        status.wait("x" * (number % 7) * 1000)
        _told(tmp_path)
    status.close("finished")


def test_the_next_start_takes_away_what_a_kill_left_of_one(tmp_path, quick):
    (tmp_path / ".status.json.partial").write_text("{")
    StatusFile(tmp_path, 3).close("finished")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_last_warnings_are_kept(tmp_path, quick):
    log = logging.getLogger("sl_jax.some.room")
    with watched(tmp_path, 3, ALONE):
        for number in range(8):
            log.warning("number %d", number)
        log.info("no warning")
    log.warning("after the end")
    told = read_status(tmp_path)
    assert told.warned == 8
    assert [warning.text for warning in told.warnings] == [f"number {n}" for n in range(3, 8)]


def test_a_signal_that_comes_in_a_change_does_not_stop_it(tmp_path, quick):
    """Handlers run in the thread that they interrupt, with the locks that it holds."""
    interrupts, held = Interrupts(False, "Process 1"), []

    def interrupted():
        with status._lock, status._changed._cond:
            interrupts.take(signal.SIGINT, None)
        held.append("no more")

    status = StatusFile(tmp_path, 3)
    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(60)
    assert held == ["no more"]
    _soon(lambda: status._status.warned)
    status.close("stopped")
    (warning,) = read_status(tmp_path).warnings
    assert warning.text == "Process 1 got SIGINT: all stop at their next exchange."


def test_a_disk_that_is_full_ends_no_run(tmp_path, quick, caplog):
    folder = tmp_path / "none"  # a folder that is not there takes no file either
    with watched(folder, 3, ALONE) as status:
        status.begin("rollout")
        _soon(lambda: caplog.text)
    assert caplog.text.count("status.json cannot be written") == 1


def test_a_store_with_errors_of_its_own_ends_no_run(tmp_path, quick, caplog, monkeypatch):
    """Nor does it hide how the run ended."""

    class HttpError(Exception):
        """As of gcsfs."""

    def refuses(path, *_, **__):
        raise HttpError("503, try again")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", refuses)
    with pytest.raises(ZeroDivisionError), watched(epath.Path(tmp_path), 3, ALONE) as status:
        for phase in ("rollout", "judging"):
            status.begin(phase)
            _soon(lambda: not status._changed.is_set())
        _soon(lambda: caplog.text)
        assert status._thread.is_alive()
        raise ZeroDivisionError
    assert caplog.text.count("status.json cannot be written, and tells nothing new: 503") == 1


def test_what_is_no_status_is_refused(tmp_path):
    with pytest.raises(StatusError, match="name the work directory of a run that was started"):
        read_status(tmp_path)
    for text in ("{", "[]", "[" * 100_000, '{"state": "running"}', '{"warnings": [], "other": 3}'):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(StatusError, match=r"status\.json is no status of this version's"):
            read_status(tmp_path)
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    with pytest.raises(StatusError, match=r"status\.json cannot be read: Is a directory"):
        read_status(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("pid", None), ("pid", 2**31), ("pid", True), ("heartbeat", "x"), ("heartbeat", 10**400)),
        *(("updated", "9999999-11-28T03:10:00Z"), ("updated", "2026-11-28T03:10:00")),
        *(("phase_since", ""), ("started", 3), ("state", "asleep"), ("epoch", -1), ("of", 3.5)),
        *(
            ("judge", 3),
            ("judge", {"up": "x"}),
            ("judge", {"up": 10**400}),
            ("seconds_left", float("inf")),
        ),
        *(("warnings", 3), ("warnings", [{"time": "now", "text": 3}]), ("\x1b[31m", 3)),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path, field, value):
    told = dataclasses.asdict(STATUS)
    (tmp_path / "status.json").write_text(json.dumps(told))
    assert read_status(tmp_path) == STATUS
    (tmp_path / "status.json").write_text(json.dumps(told | {field: value}))
    with pytest.raises(StatusError, match=r"status\.json is no status of this version's") as error:
        read_status(tmp_path)
    assert str(error.value).isprintable()


def test_a_status_that_is_strange_and_of_the_right_kind_is_shown(tmp_path):
    most = {"epoch": 2**31 - 1, "of": 0, "seconds_left": -1e308, "updated": "0001-01-01T00:00:00Z"}
    told = dataclasses.asdict(STATUS) | most | {"heartbeat": 1e308, "host": "\ud800"}
    told["judge"] = {**told["judge"], "tokens": 5 * 10**9}  # of a long run
    (tmp_path / "status.json").write_text(json.dumps(told))
    text, _ = screen(read_status(tmp_path), "run", NOW, 80)
    assert max(map(_columns, text.splitlines())) <= 80


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path):
    """Nor is anything that is left of it touched, until its status is deleted as the error says."""
    (tmp_path / "checkpoints" / "2" / "tree").mkdir(parents=True)
    StatusFile(tmp_path, 2).close("finished")
    for name in ("metrics.jsonl", "report.html"):
        (tmp_path / name).write_text("of the run")
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"are gone, the last of them after epoch 2; please"):
        run(GrpoConfig(str(tmp_path), "tiny", 2))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    (tmp_path / "status.json").unlink()
    require_none_lost(tmp_path)
    StatusFile(tmp_path, 2).close("stopped")  # of a run that had none yet
    require_none_lost(tmp_path)


def test_every_field_is_documented():
    told = Status.__doc__
    for field in dataclasses.fields(Status):
        assert f"{field.name}:" in told or f"{field.name}, " in told or f", {field.name}" in told


def test_who_looks_dead():
    here = dataclasses.replace(STATUS, host=socket.gethostname(), pid=os.getpid())
    later = NOW + datetime.timedelta(seconds=120)
    assert looks_dead(STATUS, NOW) == looks_dead(here, NOW) == ""
    assert looks_dead(STATUS, NOW - datetime.timedelta(hours=1)) == ""  # clocks differ
    gone = dataclasses.replace(here, pid=DEAD_PID)
    assert looks_dead(gone, NOW) == f"process {DEAD_PID} is no more"
    assert looks_dead(STATUS, later) == "silent for 125 s, and it should write every 10 s"
    for state in ("finished", "stopped"):
        assert looks_dead(dataclasses.replace(gone, state=state), later) == ""
    assert looks_dead(dataclasses.replace(gone, state="waiting"), NOW) != ""


def test_the_screen():
    text, code = screen(STATUS, "runs/grpo", NOW, 100)
    assert code == 0
    assert (
        text
        == """runs/grpo

state       running, as of 5.0 s ago
epoch       75 of 300 [######..................] 25%
reward      0.561 in the last epoch, 0.601 on held-out pictures
pace        3 min per epoch, 11.9 h left
phase       learning for 2 min
judge       after epoch 75: 1 of 2 servers up, 3 requests waiting, 900 asked so far, p95 4.2 s
checkpoint  after epoch 70
process     4711 on tpu-7, 4 processes, since 2026-11-27T23:10:00Z, sl_jax 0.1.0
warnings    7; the last at 2026-11-28T03:00:00Z: Rollout and learner differ"""
    )


def test_exit_codes_tell_states_apart():
    for state in ("running", "waiting", "finished", "stopped"):
        _, code = screen(dataclasses.replace(STATUS, state=state), "run", NOW, 80)
        assert code == EXIT_CODES[state]
    later = NOW + datetime.timedelta(hours=1)
    text, code = screen(STATUS, "run", later, 80)
    assert code == EXIT_CODES["dead"] == 4
    assert "looks dead" in text and "goes on from there" in text
    assert EXIT_CODES == {"running": 0, "finished": 0, "waiting": 2, "stopped": 3, "dead": 4}


def _columns(line):
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return len(line) + wide - sum(bool(unicodedata.combining(c)) for c in line)


@pytest.mark.parametrize("width", [1, 7, 12, 13, 20, 40, 80, 200])
def test_no_line_is_too_wide_nor_steers_the_terminal(width):
    nasty = "\x1b[31mred\x07\r\n" + "判定者" * 40 + " e\u0301 " + "w" * 300 + "\u202eoverride"
    status = dataclasses.replace(
        STATUS, state="waiting", reason=nasty, warnings=(Warned("t", nasty),), host=nasty
    )
    text, _ = screen(status, f"gs://bucket/{nasty}", NOW, width)
    lines = text.splitlines()
    assert width < 80 or len(lines) <= 24
    assert max(map(_columns, lines)) <= max(width, 2)  # a wide character has two columns
    assert not any(unicodedata.category(c)[0] == "C" for line in lines for c in line)
    if width >= 80:
        assert "判定者" in text and "..." in text and "red" in text


def test_what_the_terminal_cannot_show_is_replaced(tmp_path):
    with watched(tmp_path, 3, ALONE) as status:
        status.wait("判定者 busy")
        _soon(lambda: (tmp_path / "status.json").exists())
    script = (
        f"from sl_jax.training.status_screen import show; raise SystemExit(show({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    assert status_screen.EXIT_CODES["finished"] == 0


def test_the_screen_of_the_readme_is_that_of_the_program(monkeypatch):
    """Of the run that it names, as its status.json was."""
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    warned = (
        "Held-out pictures are judged by the judge of training: scores that rise there too may "
        "show how to please it. config.evaluation.judge names another."
    )
    told = Status(
        state="running",
        of=24,
        started="2026-11-28T15:13:10Z",
        updated="2026-11-28T15:13:24Z",
        host="vm",
        pid=18154,
        heartbeat=10.0,
        processes=1,
        version="0.1.0",
        phase="rollout",
        phase_since="2026-11-28T15:13:24Z",
        epoch=9,
        reward=0.36565,
        held_out=0.38546,
        seconds_per_epoch=2.57,
        seconds_left=38.5,
        judge={"up": 2.0, "a/up": 1.0, "b/up": 1.0, "waiting": 0.0, "requests": 757.0, "p95": 0.39},
        last_checkpoint=9,
        warnings=(Warned("2026-11-28T15:13:11Z", warned),),
        warned=2,
    )
    text, _ = screen(told, "runs/pool", _time(told) + datetime.timedelta(seconds=0.6), 80)
    assert text in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
