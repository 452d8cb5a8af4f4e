"""How long from the start of a run to its first program on the chips, where all is compiled?

    python tests/benchmarks/first_step.py --output tests/benchmarks/results/first_step.json

For the production run on a v5e:2x4, from parts that need no TPU: seconds of a core to import, to
describe the run and to trace and lower its programs, measured here; bytes of its compiled
programs, which the cache holds; bytes of the weights, and the seconds of a core that each takes to
be read, from `tests/soak/results/load_checkpoint.json`. What the store delivers, and how many cores
read, are assumptions, and stand in the result. Left out is what only the hardware tells: weights
from the host to the chips, programs onto them, and the first table of the modulation.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_RESULT = "tests/benchmarks/results/first_step.json"
_TOPOLOGY = "v5e:2x4"
_STORE = 2e9  # bytes/s, assumed: a local SSD, or gs:// read by many streams
_READERS = 16  # cores, assumed; a host of eight v5e chips has 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    seconds, sizes = measured()
    result = {
        "command": f"python tests/benchmarks/first_step.py --output {_RESULT}",
        "topology": _TOPOLOGY,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "core_seconds": seconds,
        "bytes": sizes,
        "assumed": {"store_bytes_per_second": _STORE, "reading_cores": _READERS},
        "seconds": parts(seconds, sizes),
    }
    result["total"] = sum(result["seconds"].values())
    print(json.dumps(result, indent=1))
    output.write_text(json.dumps(result, indent=1) + "\n")


def parts(seconds: dict[str, float], sizes: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of a start on one host, one after the other."""
    loaded = json.loads((_ROOT / "tests/soak/results/load_checkpoint.json").read_text())["load"]
    stored = sizes["weights on chips"] + sizes["weights on hosts"]
    reading = loaded["cpu_seconds"] / loaded["bytes"] * stored / _READERS
    return {
        "import, describe, trace and lower": sum(seconds.values()),
        "read compiled programs": sizes["compiled programs"] / _STORE,
        "load weights": max(stored / _STORE, reading),
    }


def measured() -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a core, and bytes, by part."""
    clock = _Clock()
    from sl_jax.checkpoints.pipeline import parameter_shapes
    from sl_jax.checkpoints.source import release_shapes
    from sl_jax.grpo.config import from_mapping
    from sl_jax.grpo.micro_batch import with_micro_batch
    from sl_jax.grpo.programs import Programs
    from sl_jax.parallel.mesh import Layout, make_mesh
    from sl_jax.planning import topologies
    from sl_jax.planning.compiled import compile_program
    from sl_jax.training.flags import packaged

    slice_ = topologies.topology(_TOPOLOGY)
    topologies.prepare_environment(slice_)
    chips = topologies.devices(slice_)
    seconds = {"import": clock.lap()}
    settings = packaged("grpo", "production").to_dict()
    settings["data"]["path"] = "of no interest here"
    config = from_mapping(settings, len(chips))
    layout, folder = Layout(make_mesh(config.mesh, chips)), release_shapes()
    config = with_micro_batch(config, folder, layout, slice_.chip.hbm)
    programs = Programs(config, folder, layout)
    seconds["describe"] = clock.lap()
    compiled_bytes = 0
    for chain in programs.chains():
        phase = next(chain, None)
        while phase is not None:
            phase.traced.lower()
            name = f"trace and lower {phase.name}"
            seconds[name] = clock.lap()
            compiled = compile_program(phase.traced, quick=True)
            compiled_bytes += len(compiled.runtime_executable().serialize())
            clock.lap()
            try:
                phase = chain.send(compiled.output_shardings)
            except StopIteration:
                phase = None
    on_chips, whole = (
        _bytes(tree) for tree in (programs.pipeline.params, parameter_shapes(folder))
    )
    stored = whole / 2  # shapes are float32, the checkpoint bfloat16
    sizes = {
        "compiled programs": float(compiled_bytes),
        "weights on chips": float(on_chips),
        "weights on hosts": stored - on_chips,
    }
    return seconds, sizes


class _Clock:
    """Seconds of a core since the last call."""

    def __init__(self):
        self._last = time.process_time()

    def lap(self) -> float:
        now = time.process_time()
        passed, self._last = now - self._last, now
        return passed


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
