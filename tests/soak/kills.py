"""Fifty SIGKILLs at random moments of runs, each of which then ends as one that nobody disturbed.

    python tests/soak/kills.py --out tests/soak/results/kills.json

Runs of the smallest configuration are killed ten times each, in random phases (starting,
evaluating, rollout, decoding, judging, learning, checkpointing, exporting …), at a random number of
the phase's beginnings and a random time from there, and started again each time. What the last
start leaves is compared with an undisturbed run to the last bit: adapter, average, moments,
counters, position in the data, metrics, judgements, exported adapter. Each start has to say that
it goes on after the newest whole checkpoint; `went_on_after` is the epoch that it named, or null if
there was no checkpoint, or the kill came before it had said so.

Every second run is judged by a server that stays up and is paid per request. It may be asked again
at most what was in flight at a kill: all else the run remembers.
"""

import argparse
import collections
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "grpo"))

import jax
import numpy as np
import one_process
from random_base import write_random_base
from runner import (
    IN_FLIGHT,
    LIMIT,
    MINIMAL,
    MOMENTS,
    PREFLIGHT,
    SERVED,
    Runner,
    differences,
    draw_kill,
    left_by,
)
from served import ServedJudge
from soak_results import about

from sl_jax.checkpoints.orbax import find_step
from sl_jax.scoring.cache import AnswerCache

EPOCHS = 24
LAST = "exporting"  # there, a run is about to end
FINISHED = f"This run is finished: {EPOCHS} epochs."
TOKEN = "a-token-of-the-soak"
LATENCY = 0.02  # seconds of an answer, so that many kills find requests in flight


class ForkingRunner(Runner):
    """Starts processes from one that has imported everything, which saves half of a start."""

    def _process(self, arguments, printed, environment, inside):
        assert not inside
        os.environ.update(environment)  # taken over when the first one starts
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sl_jax.train", "sl_jax.grpo.run", "one_process"])
        process = context.Process(target=_run, args=(arguments, printed))
        process.start()
        return _Started(process)


class _Started:
    """As `subprocess.Popen`, as far as it is needed."""

    def __init__(self, process):
        self._process, self.kill = process, process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    def wait(self, seconds):
        self._process.join(seconds)
        assert self.returncode is not None
        return self.returncode


def _run(arguments, printed):
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    one_process.main(json.loads(arguments.read_text()))


class Judged(NamedTuple):
    """Runs by one judge: in process, or a server, which is None or the other.

    Attributes:
        options: of their starts.
        whole: what one that nobody disturbs leaves, see `left_by`.
        asked: how often it asks each request.
    """

    server: ServedJudge | None
    options: dict
    whole: dict
    asked: collections.Counter


def undisturbed(runner, folder, server=None):
    """A run by that judge, which all others by it are compared with."""
    options = {"servers": ((server,),), "fields": SERVED} if server else {}
    runner(folder, **options)
    asked = server.judge.asked.copy() if server else collections.Counter()
    return Judged(server, options, left_by(folder / "run"), asked)


def killed_run(runner, folder, rng, kills, options):
    """A run that is killed so many times: the moments, and after which epoch each start went on."""
    moments = []
    while len(moments) < kills:
        last = len(moments) == kills - 1
        phase = LAST if last else str(rng.choice([name for name in MOMENTS if name != LAST]))
        kill, due = draw_kill(rng, phase), due_next(folder)
        (process,) = runner.start(folder, kills=(kill,), **options)
        code, said = process.wait(LIMIT), (folder / "printed_0.txt").read_text()
        early = phase == "starting" and code == -signal.SIGKILL
        moments.append(kill | {"went_on_after": went_on_after(said, due, early)})
        if code != -signal.SIGKILL:  # it came to its end before
            assert code == 0 and "Report: " in said, said[-3000:]
            moments.pop()
            break
        print(json.dumps(moments[-1]), flush=True)
    due = due_next(folder)
    (said,), _ = runner(folder, **options)
    went_on_after(said, due)
    return moments


def requests_of(judged, folder, kills):
    """What a killed run cost beside an undisturbed one; the server has counted it alone.

    Raises:
        AssertionError: more was asked again, or counted without being asked, than may have been
            in flight at the kills; or something was never asked, or not counted.
    """
    asked, most = judged.server.judge.asked, kills * IN_FLIGHT
    preflight, once = [*judged.asked][:PREFLIGHT], [*judged.asked][PREFLIGHT:]
    with closing(AnswerCache(folder / "run" / "judge.sqlite3")) as ledger:
        counted, _ = ledger.spent()
    found = {
        "undisturbed": sum(judged.asked[digest] for digest in once),
        "asked again": sum(asked[digest] - judged.asked[digest] for digest in once),
        "in flight at most": most,
        "preflights": sum(asked[digest] for digest in preflight),
        "counted, but never came": counted - asked.total(),
    }
    assert asked.keys() == judged.asked.keys() and judged.asked <= asked, found
    assert found["asked again"] <= most and 0 <= found["counted, but never came"] <= most, found
    return found


def added_up(runs):
    """What the runs that a server judged asked, all together."""
    served = [run for run in runs if "requests" in run]
    totals = {name: sum(run["requests"][name] for run in served) for name in served[0]["requests"]}
    return {"runs": len(served), "kills": sum(len(run["kills"]) for run in served), **totals}


def due_next(folder):
    """What the next start of a run has to say, going by what is stored; None if it begins anew."""
    step = find_step(folder / "run") if folder.exists() else None
    if step is None:
        return None
    if int(step.name) == EPOCHS and (folder / "run" / "report.html").exists():
        return FINISHED
    return f"Going on after epoch {step.name}."


def went_on_after(said, due, early=False):
    """The epoch that a start named, if any; one that was killed early may not have come to it."""
    told = re.findall(rf"{FINISHED}|Going on after epoch \d+\.", said)
    assert told == ([] if due is None else [due]) or (early and not told), said[-3000:]
    named = [int(text.split()[-1][:-1]) for text in told if text != FINISHED]
    return named[0] if named else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--each", type=int, default=10, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # what runs once here, costs less so
    rng, runs = np.random.default_rng(arguments.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "base").mkdir()
        base, settings = write_random_base(root / "base"), MINIMAL | {"epochs": EPOCHS}
        runner = ForkingRunner(base, root, settings, devices=1, token=TOKEN)
        server = ServedJudge(TOKEN)
        server.judge.latency = LATENCY
        judges = undisturbed(runner, root / "whole"), undisturbed(runner, root / "served", server)
        while (left := arguments.kills - sum(len(run["kills"]) for run in runs)) > 0:
            judged, folder = judges[len(runs) % 2], root / f"run_{len(runs)}"
            server.judge.asked.clear()
            moments = killed_run(runner, folder, rng, min(arguments.each, left), judged.options)
            differing = differences(left_by(folder / "run"), judged.whole)
            runs.append({"kills": moments, "differences": differing})
            if judged.server:
                runs[-1]["requests"] = requests_of(judged, folder, len(moments))
        server.stop()
    kills = [kill for run in runs for kill in run["kills"]]
    command = f"python tests/soak/kills.py --kills {arguments.kills} --seed {arguments.seed}"
    result = about(command) | {
        "epochs": EPOCHS,
        "compared": len(judges[0].whole),
        "kills": len(kills),
        "by_phase": {name: sum(kill["phase"] == name for kill in kills) for name in MOMENTS},
        "runs": len(runs),
        "lost": sum(len(run["differences"]) for run in runs),
        "served": added_up(runs) if len(runs) > 1 else None,
        "details": runs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(0 if result["lost"] == 0 else 1)


if __name__ == "__main__":
    main()
