"""Peak rates of accelerators, by the names that JAX gives to devices."""

from collections.abc import Sequence
from typing import Any

# Dense bfloat16 FLOP/s per device. TPUs: Google's system architecture pages of each generation
# (cloud.google.com/tpu/docs); GPUs: NVIDIA's data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Of all devices together, in bfloat16; None where the rate of one is not known (CPUs)."""
    rates = [_peak(device.device_kind) for device in devices]
    return None if None in rates else float(sum(rates))


def _peak(kind: str) -> float | None:
    """Of the longest name that the kind begins with."""
    names = [n for n in PEAK_FLOPS if kind == n or kind.startswith((f"{n} ", f"{n}-"))]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def memory_use(devices: Sequence[Any]) -> dict[str, float]:
    """Bytes on the fullest of this process's devices: now, and the most so far; {} for CPUs."""
    stats = [found for device in devices if (found := device.memory_stats())]
    names = {"bytes_in_use": "memory_bytes", "peak_bytes_in_use": "memory_peak_bytes"}
    return {
        told: float(max(found[name] for found in stats))
        for name, told in names.items()
        if stats and all(name in found for found in stats)
    }


def memory_limit(devices: Sequence[Any]) -> float | None:
    """Bytes that programs may use on each of the devices; None where one does not say (CPUs)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if None in limits else float(min(limits))
