"""One process of a training run: `python one_process.py ARGUMENTS.json` leaves its adapter."""

import json
import os
import signal
import sys
import threading
from pathlib import Path


def main(arguments: dict) -> None:
    """Joins the others, trains, and writes the adapter as this process has it.

    Errors and interrupts end it as they end `sl_jax.train`. With "kill", which names a phase, how
    many times it begins before that, and seconds from its beginning, it gets a signal there:
    SIGKILL, or the "signal" that is named.
    """
    import jax
    import numpy as np

    jax.config.update("jax_disable_most_optimizations", True)
    # Simulated devices share the cores: programs that wait for each other may starve otherwise.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    from sl_jax import train
    from sl_jax.grpo import phases, run
    from sl_jax.grpo.config import from_mapping
    from sl_jax.parallel.joining import DistributedConfig, joined
    from sl_jax.training.console import ending_in_a_line, set_up_logging

    begun = _killer(arguments.get("kill"))
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
        ending_in_a_line(train._EXPECTED, "epoch", arguments["config"]["workdir"]),
        joined(DistributedConfig(**arguments["distributed"])) as processes,
    ):
        assert len(jax.local_devices()) == arguments["devices"]
        train.run(from_mapping(arguments["config"], jax.device_count()), processes)


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

    return begun


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(json.loads(Path(sys.argv[1]).read_text()))
