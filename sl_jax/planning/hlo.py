"""What a compiled program sends between chips, read from the text of XLA's optimised HLO.

XLA counts the body of a loop once. Here it counts as often as it runs: every instruction carries
the path of the JAX program that it comes from, and the loops of that path are known. One transfer
may stand in the text several times, as XLA spreads it over computations that it overlaps with; such
copies share a channel. An operand that arrives in parts while its product runs (a loop that passes
them on by `collective-permute`) counts as one transfer of the whole.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sl_jax.planning.topologies import PlanError

_TYPES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|f\d+|[su]\d+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PATH = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(\S*\))? \{[^}]*\}|\{\{[^}]*\}|\[[\d,]+\])"
)

Trips = Callable[[str], float]


class _Transfer(NamedTuple):
    """One collective: its kind, the bytes of its larger side, its members, its path."""

    kind: str
    whole: float
    members: int
    path: str


def sent_bytes(text: str, trips: Trips) -> dict[str, float]:
    """Bytes that one chip sends in one run of a program, by kind of collective.

    By the algorithms that send least: (n − 1)/n of the whole array for all-gather, reduce-scatter
    and all-to-all among n chips, twice that for all-reduce.

    Args:
        text: of the optimised HLO, for one chip.
        trips: path of an instruction in the JAX program, "jit(f)/while/body/…" → how often it runs.
    """
    sent: dict[str, float] = {}
    for transfer in _transfers(text):
        share = (transfer.members - 1) / transfer.members if transfer.members else 0.0
        times = 2 if transfer.kind == "all-reduce" else 1
        total = times * share * transfer.whole * trips(transfer.path)
        sent[transfer.kind] = sent.get(transfer.kind, 0.0) + total
    return sent


def _transfers(text: str) -> Iterator[_Transfer]:
    seen: set[tuple[str, Any]] = set()
    for line in text.splitlines():
        if not (found := _COLLECTIVE.search(line)):
            continue
        shapes, kind, _ = found.groups()
        path = match[1] if (match := _PATH.search(line)) else ""
        channel = match[1] if (match := _CHANNEL.search(line)) else line
        arrays = _ARRAY.findall(shapes)
        # The parts of one operand are passed on by several instructions of one product, under whose
        # path are those of its adapter, too: they differ in shape.
        parts = (path, arrays[0]) if kind == "collective-permute" else channel
        if (kind, parts) in seen:
            continue
        seen.add((kind, parts))
        sizes = [_bytes(kind, dimensions) for kind, dimensions in arrays]
        if kind == "collective-permute":
            members = pairs.count("{") if (pairs := _group(_PAIRS, line)) else 1
            yield _Transfer(kind, max(sizes) * members, members, path)
        else:
            members = _members(_group(_GROUPS, line), line)
            largest = max(sizes) * (members if kind == "reduce-scatter" else 1)
            yield _Transfer(kind, largest, members, path)


def _group(pattern: re.Pattern[str], line: str) -> str:
    found = pattern.search(line)
    return found[1] if found else ""


def _bytes(kind: str, dimensions: str) -> float:
    width = _TYPES.get(kind) or int(kind[1:]) / 8
    return width * math.prod(int(size) for size in dimensions.split(",") if size)


def _members(groups: str, line: str) -> int:
    """How many chips take part in one group of a collective.

    Raises:
        PlanError: the text says so in a way that is not known.
    """
    if not groups:
        shown = re.sub(r"(metadata|backend_config)=.*", "", line.strip())[:300]
        raise PlanError(
            f"who takes part in a transfer is not understood: {shown}; please use another version "
            "of libtpu, and report this line"
        )
    if groups.startswith("mesh"):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", groups)}
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups.rpartition(" {")[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    if groups.startswith("{{"):
        return groups.count(",") + 1
    return int(groups.strip("[]").split(",")[-1])
