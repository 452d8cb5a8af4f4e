"""What benchmarks that are paired with a peer share: turns, rates, memory and the rows."""

import gc
import importlib.metadata
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from sl_jax.models.lora import Adapter
from sl_jax.parallel.peaks import peak_flops

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft")


class Side(NamedTuple):
    """One contender.

    Attributes:
        name: how rows call it.
        run: does the work once, and returns when it is done.
    """

    name: str
    run: Callable[[], Any]


def on_gpu() -> bool:
    """Whether sizes are production's. Both sides must then have the GPU."""
    gpu = jax.devices()[0].platform == "gpu"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("JAX has a GPU, PyTorch has none; please install PyTorch for CUDA")
    return gpu


def torch_device() -> torch.device:
    """Where the peer runs: where JAX runs."""
    return torch.device("cuda" if on_gpu() else "cpu")


def device_name() -> str:
    """For rows: a GPU's name, or the number of cores."""
    if on_gpu():
        return jax.devices()[0].device_kind
    return f"cpu, {os.cpu_count()} cores"


def finished(value: Any) -> Any:
    """Waits for what JAX or PyTorch computes."""
    if on_gpu():
        torch.cuda.synchronize()
    return jax.block_until_ready(value)


def without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same, remembering nothing for a backward pass."""

    def call() -> Any:
        with torch.no_grad():
            return run()

    return call


def seconds_in_turns(sides: list[Side], repeats: int, warm_ups: int = 1) -> dict[str, list[float]]:
    """Seconds of each run. Sides take turns, so that other work on the machine meets all alike."""
    for side in sides:
        for _ in range(warm_ups):
            finished(side.run())
    spent: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            started = time.perf_counter()
            finished(side.run())
            spent[side.name].append(time.perf_counter() - started)
    return spent


def peak_memory(side: Side) -> int | None:
    """Peak bytes on the device up to the end of a run; None where the backend does not tell.

    JAX counts from the start of the process: of a later row this is a bound from above.
    """
    if not on_gpu():
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    finished(side.run())
    if side.name != "sl_jax":
        return torch.cuda.max_memory_allocated()
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def matrix_rate(dtype: Any, repeats: int = 5) -> float:
    """FLOP/s of a large matrix product in JAX on this device."""
    side = 8192 if on_gpu() else 1024
    draw = np.random.default_rng(0).normal(size=(2, side, side))
    left, right = jnp.asarray(draw, dtype)
    product = jax.jit(jnp.matmul)
    spent = seconds_in_turns([Side("product", lambda: product(left, right))], repeats, 2)
    return 2 * side**3 / statistics.median(spent["product"])


def copy_adapter(adapter: Adapter, peer: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Gives PEFT an adapter's factors; (path, block, PEFT's weight) of every second factor."""
    modules = dict(peer.named_modules())
    pairs = []
    for path, value in traverse_util.flatten_dict(adapter.lora).items():
        dotted = re.sub(r"(to_out|net)_(\d+)", r"\1.\2", ".".join(path[1:-1]))
        for block, factor in enumerate(np.asarray(value)):
            module = modules[f"transformer_blocks.{block}.{dotted}"]
            given = (module.lora_A if path[-1] == "a" else module.lora_B)["default"].weight
            with torch.no_grad():
                given.copy_(torch.from_numpy(factor.T.copy()))
            if path[-1] == "b":
                pairs.append((path, block, given))
    return pairs


def relative_error(found: Any, truth: Any) -> float:
    """‖found − truth‖ / ‖truth‖.

    Raises:
        ValueError: the shapes differ.
    """
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if found.shape != truth.shape:
        raise ValueError(f"the sides' results have shapes {found.shape} and {truth.shape}")
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def rows(
    name: str,
    sides: list[Side],
    *,
    shapes: Mapping[str, Any],
    dtype: str,
    flops: float | None,
    repeats: int,
    error: float,
    tolerance: float,
    **more: Any,
) -> list[dict[str, Any]]:
    """Times the sides; one row for each.

    Args:
        name: of the subject.
        sides: the first is this package, `ratio_to_peer` says how many times as fast it is.
        shapes, dtype: what is computed.
        flops: of one run, the same number for all sides; None where it is not known.
        repeats: timed runs of each side, after one to warm up.
        error: of the first side's result against a peer's.
        tolerance: the error at which the sides do not compute the same.
        more: written to every row.

    Raises:
        ValueError: the sides disagree, so that a comparison of times means nothing.
    """
    if not error < tolerance:
        raise ValueError(f"{name}: the sides differ by {error:.2g}, more than {tolerance:.2g}")
    product = matrix_rate(dtype)
    spent = seconds_in_turns(sides, repeats)
    ours = statistics.median(spent[sides[0].name])
    peak = peak_flops(jax.devices()[:1])
    made = []
    for side in sides:
        median = statistics.median(spent[side.name])
        rate = None if flops is None else flops / median
        row = {
            "row": name,
            "side": side.name,
            "device": device_name(),
            "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
            "shapes": dict(shapes),
            "dtype": dtype,
            "n": repeats,
            "median_seconds": median,
            "least_seconds": min(spent[side.name]),
            "flops": flops,
            "flops_per_second": rate,
            "share_of_peak": None if peak is None or rate is None else rate / peak,
            "share_of_matrix_product": None if rate is None else rate / product,
            "peak_memory_bytes": peak_memory(side),
            "ratio_to_peer": None if side is sides[0] else median / ours,
            "relative_error_between_sides": error,
            **more,
        }
        print(json.dumps(row), flush=True)
        made.append(row)
    return made
