"""Peak rates by the names of devices."""

from types import SimpleNamespace

import jax
import pytest

from sl_jax.parallel.peaks import memory_use, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L400", None),
        ("cpu", None),
    ],
)
def test_by_the_longest_name(kind, peak):
    device = SimpleNamespace(device_kind=kind)
    assert peak_flops([device]) == peak
    assert peak_flops([device] * 4) == (peak and 4 * peak)


def test_one_unknown_makes_all_unknown():
    kinds = ("TPU v4", "cpu")
    assert peak_flops([SimpleNamespace(device_kind=kind) for kind in kinds]) is None


def test_memory_of_the_fullest():
    stats = [
        {"bytes_in_use": 5, "peak_bytes_in_use": 7},
        {"bytes_in_use": 3, "peak_bytes_in_use": 9},
    ]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    assert memory_use(devices) == {"memory_bytes": 5, "memory_peak_bytes": 9}
    assert memory_use(jax.devices("cpu")) == {}
