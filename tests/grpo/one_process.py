"""One process of a training run: `python one_process.py ARGUMENTS.json` leaves its adapter."""

import json
import os
import sys
from pathlib import Path


def main(arguments: dict) -> None:
    """Joins the others, trains, and writes the adapter as this process has it.

    Errors and interrupts end it as they end `sl_jax.train`.
    """
    import jax
    import numpy as np

    jax.config.update("jax_disable_most_optimizations", True)
    # Simulated devices share the cores: programs that wait for each other may starve otherwise.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    from sl_jax import train
    from sl_jax.grpo import run
    from sl_jax.grpo.config import from_mapping
    from sl_jax.parallel.joining import DistributedConfig, joined
    from sl_jax.training.console import ending_in_a_line, set_up_logging

    gather = run.to_everywhere

    def noted(tree, mesh):
        whole = gather(tree, mesh)
        leaves = jax.tree_util.tree_leaves_with_path(whole)
        found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        np.savez(Path(arguments["folder"]) / f"adapter_{processes.index}.npz", **found)
        return whole

    run.to_everywhere = noted
    set_up_logging()
    with (
        ending_in_a_line(train._EXPECTED, "epoch"),
        joined(DistributedConfig(**arguments["distributed"])) as processes,
    ):
        assert len(jax.local_devices()) == arguments["devices"]
        train.run(from_mapping(arguments["config"], jax.device_count()), processes)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(json.loads(Path(sys.argv[1]).read_text()))
