"""Slices by name."""

import pytest

from sl_jax.planning.topologies import CHIPS, PlanError, topology


@pytest.mark.parametrize(
    ("name", "chips", "accelerator"),
    [
        ("v5e:2x4", 8, "v5litepod-8"),
        ("v5e:1x1", 1, "v5litepod-1"),
        ("v6e:2x2", 4, "v6e-4"),
        ("v5p:2x2x1", 4, "v5p-8"),  # types of v4 and v5p count cores
        ("v4:4x4x4", 64, "v4-128"),
        ("v5e:16x16", 256, "v5litepod-256"),
    ],
)
def test_a_slice(name, chips, accelerator):
    found = topology(name)
    assert (found.chips, found.accelerator_type) == (chips, accelerator)
    assert found.chip is CHIPS[name.partition(":")[0]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h100:1", "topology 'h100:1' is unknown; please give one of v4, v5e, v5p, v6e"),
        ("v5e", "'v5e' is unknown"),
        ("v5e:2x2x2", "v5e slices have 2 axes; please give them as in v5e:2x2"),
        ("v5p:2x2", "v5p slices have 3 axes; please give them as in v5p:2x2x2"),
        ("v5e:32x32", "has 1024 chips; please give 1 to 256"),
        ("v5e:0x4", "has 0 chips"),
    ],
)
def test_what_is_no_slice(name, said):
    with pytest.raises(PlanError) as caught:
        topology(name)
    assert said in str(caught.value)


def test_the_memory_to_plan_with():
    assert topology("v5p:1x1x1", 74.5).chip.hbm == 74.5 * 2**30
    for size in (0, -1, 96):
        with pytest.raises(PlanError, match=r"at most what the compiler gives .* v5p: 95\.73"):
            topology("v5p:1x1x1", size)
