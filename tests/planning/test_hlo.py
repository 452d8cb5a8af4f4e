"""Bytes between chips, from lines as XLA prints them."""

import re

import pytest

from sl_jax.planning.hlo import sent_bytes
from sl_jax.planning.topologies import PlanError

GATHER = (
    "  %all-gather.{n} = bf16[1,3072,64]{{1,2,0:T(8,128)(2,1)}} all-gather(%param.{n}), "
    "channel_id={channel}, replica_groups={groups}, dimensions={{1}}, "
    'metadata={{op_name="jit(_velocity)/jvp(MMDiT)/while/body/closed_call/blocks/attn" '
    "stack_frame_id=316}}"
)
PERMUTE = (
    "  %collective-permute-start.{n} = (bf16[1,384,64]{{1,2,0}}, bf16[1,384,64]{{1,2,0}}, "
    "u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%x.{n}), channel_id={n}, "
    "source_target_pairs={{{{0,7}},{{1,0}},{{2,1}},{{3,2}},{{4,3}},{{5,4}},{{6,5}},{{7,6}}}}, "
    'metadata={{op_name="jit(f)/MMDiT/while/body/to_out/dot_general"}}'
)
WHOLE = 3072 * 64 * 2


def _once(path):
    return 1.0


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("mesh['axis_0'=8] {'axis_0'}", 8),
        ("mesh['a'=4,'b'=2] {'b'}", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}", 8),
        ("mesh['a'=8], device_ids=([4,2]T(1,0)) {'a':(1)2}", 2),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[1]", 1),
    ],
)
def test_gathering_sends_what_others_lack(groups, members):
    text = GATHER.format(n=1, channel=5, groups=groups)
    assert sent_bytes(text, _once) == {"all-gather": pytest.approx(WHOLE * (1 - 1 / members))}


def test_groups_that_are_not_understood_are_no_small_number():
    with pytest.raises(PlanError, match=r"not understood: %all-gather.*torus"):
        sent_bytes(GATHER.format(n=1, channel=5, groups="torus(4)"), _once)


def test_the_pieces_of_one_transfer_count_once():
    """XLA may spread a gathering over several computations, all with its channel."""
    groups = "mesh['axis_0'=8] {'axis_0'}"
    pieces = [GATHER.format(n=n, channel=5, groups=groups) for n in range(3)]
    other = GATHER.format(n=9, channel=6, groups=groups)
    once = sent_bytes(pieces[0], _once)["all-gather"]
    assert sent_bytes("\n".join(pieces), _once)["all-gather"] == once
    assert sent_bytes("\n".join([*pieces, other]), _once)["all-gather"] == 2 * once


def test_a_product_that_passes_its_operand_on_counts_as_the_whole_operand():
    lines = [PERMUTE.format(n=n) for n in range(4)]  # two directions, unrolled by two
    done = "  %d = bf16[1,384,64] collective-permute-done(%collective-permute-start.1)"
    found = sent_bytes("\n".join([*lines, done]), _once)
    assert found == {"collective-permute": pytest.approx(WHOLE * 7 / 8)}


def test_operands_of_one_product_count_each():
    """An adapter's, before or after the kernel's, stand under the same path."""
    kernel, adapter = PERMUTE.format(n=1), PERMUTE.format(n=2).replace("384,64", "48,64")
    for lines in ((kernel, adapter), (adapter, kernel)):
        found = sent_bytes("\n".join(lines), _once)
        assert found == {"collective-permute": pytest.approx((1 + 1 / 8) * WHOLE * 7 / 8)}


def test_what_lies_in_loops_counts_as_often_as_it_runs():
    text = GATHER.format(n=1, channel=5, groups="[1,8]<=[8]")

    def trips(path):
        return 60 if re.search(r"MMDiT\)*/while/body", path) else 1

    assert sent_bytes(text, trips)["all-gather"] == pytest.approx(60 * WHOLE * 7 / 8)


def test_reductions():
    line = (
        "  %r = f32[100]{{0}} {kind}(%x), channel_id=1, replica_groups={{{{0,1,2,3}}}}, "
        'to_apply=%add, metadata={{op_name="jit(f)/add"}}'
    )
    reduced = sent_bytes(line.format(kind="all-reduce"), _once)
    assert reduced == {"all-reduce": pytest.approx(2 * 400 * 3 / 4)}
    # Its result is a part of what was summed.
    scattered = sent_bytes(line.format(kind="reduce-scatter"), _once)
    assert scattered == {"reduce-scatter": pytest.approx(4 * 400 * 3 / 4)}
