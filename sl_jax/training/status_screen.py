"""A run's status on one screen of a terminal, and as an exit code."""

import dataclasses
import datetime
import shutil
import sys
import unicodedata

from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.imaging.words import printable, time_span
from sl_jax.training.status import Status, age, looks_dead, newest_checkpoint, read_status

EXIT_CODES = {"running": 0, "finished": 0, "waiting": 2, "stopped": 3, "dead": 4}
"""Of `--status`; 1 where there is no status to read."""

_WIDTH = 100  # where there is no terminal
_LABEL = 12  # columns
_BAR = 24
_LONG = ("reason", "warnings")  # have up to four lines, the others two


def show(workdir: str) -> int:
    """Prints the status of a run, for the terminal that is there; the exit code.

    Raises:
        StatusError: there is none.
        CheckpointError: the store of `workdir` cannot be reached.
    """
    folder = reachable(workdir)
    # What a process that was killed was too late to tell.
    status = dataclasses.replace(read_status(folder), last_checkpoint=newest_checkpoint(folder))
    now = datetime.datetime.now(datetime.UTC)
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    text, code = screen(status, workdir, now, width)
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding))
    return code


def screen(status: Status, workdir: str, now: datetime.datetime, width: int) -> tuple[str, int]:
    """What to print of a status, in lines of at most `width` columns, and the exit code."""
    dead = looks_dead(status, now)
    state = "looks dead" if dead else status.state
    heard = f"{time_span(age(status, now))} ago" if status.state != "finished" else status.updated
    rows = [
        ("state", f"{state}, as of {heard}"),
        ("reason", dead or status.reason),
        ("epoch", f"{status.epoch} of {status.of}  {_bar(status)}"),
        ("reward", _rewards(status)),
        ("pace", _pace(status)),
        ("phase", _phase(status, now, dead)),
        ("judge", _judge(status)),
        ("checkpoint", _checkpoint(status, dead)),
        ("process", _process(status)),
        ("warnings", _warnings(status)),
    ]
    lines = [*fitted(workdir, width, 1), ""]
    for label, text in rows:
        most = 4 if label in _LONG else 2
        for number, line in enumerate(fitted(text, max(width - _LABEL, 1), most)):
            head = "" if number else label
            lines.append(f"{head:{_LABEL}}{line}"[:width] if width > _LABEL else line)
    return "\n".join(line.rstrip() for line in lines), EXIT_CODES["dead" if dead else status.state]


def fitted(text: str, width: int, lines: int) -> list[str]:
    """A text as at most so many lines of at most `width` columns; what is too long ends in "...".

    Wide characters take two columns. What could steer the terminal comes as escapes.
    """
    found = [""]
    for word in text.split():
        word = printable(word)
        if found[-1] and _columns(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
            continue
        if found[-1]:
            found.append("")
        for character in word:  # may be longer than a line
            if found[-1] and _columns(found[-1] + character) > width:
                found.append("")
            found[-1] += character
    if len(found) > lines:
        last = found[lines - 1]
        while last and _columns(f"{last}...") > width:
            last = last[:-1]
        found = [*found[: lines - 1], f"{last}..."[:width]]
    return [line for line in found if line]


def _columns(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def _bar(status: Status) -> str:
    full = min(_BAR * status.epoch // max(status.of, 1), _BAR)
    share = status.epoch / max(status.of, 1)
    return f"[{'#' * full}{'.' * (_BAR - full)}] {share:.0%}"


def _rewards(status: Status) -> str:
    last = [] if status.reward is None else [f"{status.reward:.3f} in the last epoch"]
    held = [] if status.held_out is None else [f"{status.held_out:.3f} on held-out pictures"]
    return ", ".join(last + held)


def _pace(status: Status) -> str:
    if status.seconds_per_epoch is None or status.state == "finished":
        return ""
    per, left = time_span(status.seconds_per_epoch), time_span(status.seconds_left or 0.0)
    return f"{per} per epoch, {left} left"


def _phase(status: Status, now: datetime.datetime, dead: str) -> str:
    if status.phase_since is None or dead or status.state == "stopped":
        return status.phase
    since = datetime.datetime.fromisoformat(status.phase_since)
    return f"{status.phase} for {time_span(max(0.0, (now - since).total_seconds()))}"


def _judge(status: Status) -> str:
    pool = status.judge
    if not pool:
        return ""
    servers = sum(name.endswith("/up") for name in pool)
    said = [f"after epoch {status.epoch}: {pool.get('up') or 0:.0f} of {servers} servers up"]
    said += [f"{pool.get('waiting') or 0:.0f} requests waiting"]
    said += [f"{pool.get('requests') or 0:.0f} asked so far"]
    if pool.get("p95") is not None:
        said.append(f"p95 {pool['p95']:.1f} s")
    return ", ".join(said)


def _checkpoint(status: Status, dead: str) -> str:
    if status.last_checkpoint is None:
        return "none yet"
    goes_on = bool(dead) or status.state == "stopped"
    after = f"after epoch {status.last_checkpoint}"
    return f"{after}; the same command goes on from there" if goes_on else after


def _process(status: Status) -> str:
    count = f", {status.processes} processes" if status.processes > 1 else ""
    return f"{status.pid} on {status.host}{count}, since {status.started}, sl_jax {status.version}"


def _warnings(status: Status) -> str:
    if not status.warnings:
        return "none"
    last = status.warnings[-1]
    return f"{status.warned}; the last at {last.time}: {last.text}"
