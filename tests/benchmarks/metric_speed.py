"""Seconds that the metrics take: 1,000 designs of 640 pixels and 6 layers.

    python tests/benchmarks/metric_speed.py --output tests/benchmarks/results/metric_speed.json

Predictions are what models make: each layer moved by some pixels, with a veil of alpha 1 to 3 over
the whole canvas, so that every layer overlaps every other and the LayerD protocol has to try its
merges. A few distinct designs, made before the clock starts, take turns. `--designs 40` takes a
minute; processor seconds are then scaled to 1,000 designs.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sl_jax.data.procedural import make_design
from sl_jax.eval.layerd import layerd_scores
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.imaging import recompose


class Case(NamedTuple):
    """A decomposition with what it is compared with."""

    predicted: np.ndarray
    reference: np.ndarray
    source: np.ndarray


PROTOCOLS: dict[str, Callable[[Case], object]] = {
    "stable_layers": lambda case: layer_l1(case.predicted, case.reference),
    "layerd": lambda case: layerd_scores(case.predicted, case.reference),
    "reference_free": lambda case: reference_free(case.predicted, case.source),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--designs", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=25)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    count = min(arguments.distinct, arguments.designs)
    cases = [_case(seed, arguments.size, arguments.layers) for seed in range(count)]
    seconds, busy = {}, {}
    with ThreadPoolExecutor(arguments.threads) as pool:
        for name, protocol in PROTOCOLS.items():
            turns = (cases[index % count] for index in range(arguments.designs))
            started, spent = time.perf_counter(), time.process_time()
            for _ in pool.map(protocol, turns):
                pass
            seconds[name] = time.perf_counter() - started
            busy[name] = time.process_time() - spent
            each = busy[name] / arguments.designs
            print(f"{name:15} {seconds[name]:8.1f} s, {each:.3f} CPU s a design", flush=True)
    print(f"{'together':15} {sum(seconds.values()):8.1f} s on {arguments.threads} threads")
    each = sum(busy.values()) / arguments.designs
    minutes = 1000 * each / arguments.threads / 60
    print(f"1,000 designs: {minutes:.1f} minutes of {arguments.threads} cores that do nothing else")
    if arguments.output:
        content = {
            "settings": {k: v for k, v in vars(arguments).items() if k != "output"},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "numpy": np.__version__,
            "seconds": seconds,
            "cpu_seconds": busy,
            "minutes_of_1000_designs": minutes,
            "note": (
                "cpu_seconds of this many designs, scaled to 1,000 and divided by the threads; "
                "seconds are the clock's, on a machine that may have been busy"
            ),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def _case(seed: int, size: int, layers: int) -> Case:
    reference = make_design("B", seed, size, layers).layers
    random = np.random.default_rng(seed)
    predicted = reference.copy()
    for layer in predicted[1:]:
        layer[:] = np.roll(layer, random.integers(-8, 9, 2), (0, 1))
        veil = random.integers(1, 4, layer.shape[:2], np.uint8)
        np.maximum(layer[..., 3], veil, out=layer[..., 3])
    return Case(predicted, reference, recompose(reference))


if __name__ == "__main__":
    main()
