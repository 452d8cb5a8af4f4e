"""One process of a training run: `python one_process.py ARGUMENTS.json` leaves its adapter."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace


def main(arguments: dict) -> None:
    """Joins the others, trains, and writes the adapter as this process has it.

    Errors and interrupts end it as they end `sl_jax.train`. With "kill", which names a phase, how
    many times it begins before that, and seconds from its beginning, it gets a signal there:
    SIGKILL, or the "signal" that is named; with "pace" each micro-batch is said from then on, and
    takes so many seconds more. "lost" is after how many seconds without a sign of life a process
    counts as killed. "spoiled" says what is not finite in which "process": the "prompt" of a step
    and slot, and advantages from one "update" on. "profile" is of which epochs a trace is made.
    With "measured", a model and sizes of a mesh, `results` of `test_mesh_shapes` come first.
    """
    import jax
    import numpy as np
    from jax._src import compiler

    jax.config.update("jax_disable_most_optimizations", True)
    # Simulated devices share the cores: programs that wait for each other may starve otherwise.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX keeps programs of the first process alone, and on CPUs those of another have other keys.
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0))
    from sl_jax import train
    from sl_jax.grpo import phases, run
    from sl_jax.grpo.config import from_mapping
    from sl_jax.parallel import processes as module
    from sl_jax.parallel.joining import DistributedConfig, joined
    from sl_jax.training.console import ending_in_a_line, set_up_logging
    from sl_jax.training.profiling import span

    begun = _killer(arguments.get("kill"))
    module._LOST = arguments.get("lost", module._LOST)
    begin, gather = phases.Phases.begin, run.to_everywhere

    def noted_phase(self, name):
        begun(name)
        begin(self, name)

    def noted(tree, mesh):
        whole = gather(tree, mesh)
        leaves = jax.tree_util.tree_leaves_with_path(whole)
        found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        np.savez(Path(arguments["folder"]) / f"adapter_{processes.index}.npz", **found)
        begun("exporting")
        return whole

    phases.Phases.begin, run.to_everywhere = noted_phase, noted
    set_up_logging()
    begun("starting")
    with (
        ending_in_a_line(train._EXPECTED, "epoch", arguments["config"]["workdir"]) as code_of,
        joined(DistributedConfig(**arguments["distributed"]), code_of) as processes,
    ):
        assert len(jax.local_devices()) == arguments["devices"]
        spoiled = arguments.get("spoiled")
        if spoiled and spoiled["process"] == processes.index:
            _spoil(**spoiled)
        if "measured" in arguments:
            place = Path(arguments["folder"]) / f"results_{processes.index}.npz"
            _measure(place, **arguments["measured"])
        config = from_mapping(arguments["config"], jax.device_count())
        train.run(config, processes, span(arguments.get("profile", "")))


def _killer(plan: dict | None):
    """Is told which phase begins."""
    left = {} if plan is None else {plan["phase"]: plan["number"]}

    def die():
        os.kill(os.getpid(), getattr(signal, plan.get("signal", "SIGKILL")))

    def begun(name):
        if name in left:
            left[name] -= 1
            if left[name] == -1:
                threading.Timer(plan["delay"], die).start()
                if "pace" in plan:
                    _slow_down(plan["pace"])

    return begun


def _slow_down(seconds):
    from sl_jax.grpo.learner import Learner

    accumulate = Learner._accumulate

    def slowly(*args):
        print("A micro-batch", flush=True)
        time.sleep(seconds)
        return accumulate(*args)

    Learner._accumulate = slowly


def _measure(path, model, mesh):
    """Leaves them at a path, each leaf by its place in the tree."""
    import jax
    import numpy as np
    from conftest import Bench
    from test_mesh_shapes import results

    from sl_jax.parallel.processes import to_everywhere

    bench = Bench(model, **mesh)
    found = results(bench, lambda tree: to_everywhere(tree, bench.layout.mesh))
    np.savez(path, *jax.tree.leaves(found))


def _spoil(process, prompt, update):
    """Where only this process notices: the others have other rows of the batch."""
    import numpy as np

    from sl_jax.grpo import epoch
    from sl_jax.grpo.prompts import PromptTable

    read, scored, updates = PromptTable.__call__, epoch._scored, []

    def spoiled_read(self, examples):
        hidden, lengths = read(self, examples)
        for row, example in enumerate(examples):
            if [example.step, example.slot] == prompt:
                hidden[row] = np.nan
        return hidden, lengths

    def spoiled_scored(*args):
        batches, worth = scored(*args)
        updates.append(1)
        if len(updates) > update:
            batches = [batch._replace(advantage=np.nan * batch.advantage) for batch in batches]
        return batches, worth

    PromptTable.__call__, epoch._scored = spoiled_read, spoiled_scored


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(json.loads(Path(sys.argv[1]).read_text()))
