"""What a compiled program moves: bytes to and from memory, bytes between chips.

Read from the text of XLA's optimised HLO. XLA's own analysis takes a loop's body once; here bodies
count as often as they run, by the counter that the loop's condition compares with a constant.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=(mesh\[[^\]]*\] \{[^}]*\}|\{\{[^}]*\}|\[[\d,]+\])")

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Names for values, or programs that are counted by themselves.
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
        *("call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "domain"),
    }
)


class Traffic(NamedTuple):
    """Bytes of one run of a program, per chip.

    Attributes:
        hbm: read from and written to the chip's memory.
        collectives: sent to other chips, by kind of collective.
        open_loops: loops whose number of trips the program does not tell.
    """

    hbm: float
    collectives: dict[str, float]
    open_loops: int

    @property
    def ici(self) -> float:
        """Bytes sent to other chips."""
        return sum(self.collectives.values())


class Shape(NamedTuple):
    """One array of an instruction's result."""

    bytes: float
    in_hbm: bool


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    text: str
    is_root: bool


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What it returns."""
        instructions = list(self.instructions.values())
        return next((i for i in reversed(instructions) if i.is_root), instructions[-1])


def traffic(text: str, trips: tuple[float, ...] = ()) -> Traffic:
    """What one run of a program moves.

    Args:
        text: of the optimised HLO, for one chip.
        trips: of loops whose number the program does not tell, in the order in which they run.
    """
    return _Walk(parse(text), trips).run()


def parse(text: str) -> dict[str, Computation]:
    """The computations of a module by name; the entry's name is "ENTRY"."""
    found: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if match := _HEADER.match(line):
                current = Computation("ENTRY" if match[1] else match[2])
                found[current.name] = current
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
    return found


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.partition(" = ")
    if not equals:
        return None
    name = head.strip()
    is_root = name.startswith("ROOT ")
    name = name.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    operands = _NAME.findall(rest[opening : closing + 1])
    shapes = [_shape(*match.groups()) for match in _SHAPE.finditer(kind)]
    text = rest[opening:] if rest.startswith("constant") else rest[closing + 1 :]
    return Instruction(name, rest[:opening], shapes, operands, text, is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    return len(text) - 1


def _shape(kind: str, sizes: str, layout: str | None) -> Shape:
    count = 1
    for size in sizes.split(","):
        count *= int(size) if size else 1
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind, int(digits[0]) if digits else 8)
    space = re.search(r"S\((\d+)\)", layout or "")
    return Shape(count * bits / 8, space is None or space[1] == "0")


class _Walk:
    def __init__(self, computations: dict[str, Computation], trips: tuple[float, ...]):
        self._computations = computations
        self._trips = iter(trips)
        self._open = 0
        self._hbm = 0.0
        self._collectives: dict[str, float] = {}

    def run(self) -> Traffic:
        self._visit(self._computations["ENTRY"], 1.0, True)
        return Traffic(self._hbm, self._collectives, self._open)

    def _visit(self, computation: Computation, times: float, outermost: bool) -> None:
        seen: set[str] = set()
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                body, count = self._loop(computation, instruction, outermost)
                self._visit(self._computations[body], times * count, False)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction.text):
                    self._visit(self._computations[branch], times, outermost)
            elif instruction.opcode == "call":
                for called in _CALLED.findall(instruction.text):
                    self._visit(self._computations[called], times, outermost)
            else:
                self._count(computation, instruction, times, seen)

    def _count(
        self, computation: Computation, instruction: Instruction, times: float, seen: set[str]
    ) -> None:
        for collective in self._sent(instruction):
            kind, amount, channel = collective
            if channel not in seen:  # parts of one that runs beside other work name it each
                seen.add(channel)
                self._collectives[kind] = self._collectives.get(kind, 0.0) + times * amount
        self._hbm += times * _moved(computation, instruction, self._computations)

    def _sent(self, instruction: Instruction) -> Iterator[tuple[str, float, str]]:
        if instruction.opcode == "fusion" or instruction.opcode == "async-start":
            for called in _CALLED.findall(instruction.text):
                for inner in self._computations[called].instructions.values():
                    yield from self._sent(inner)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            yield kind, _sent_bytes(kind, instruction), channel[1] if channel else instruction.name

    def _loop(
        self, computation: Computation, loop: Instruction, outermost: bool
    ) -> tuple[str, float]:
        condition, body = (
            re.search(rf"{part}=%([\w.\-]+)", loop.text)[1] for part in ("condition", "body")
        )
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        count = float(known[1]) if known else self._trip_count(computation, loop, condition, body)
        if count is None and outermost:
            self._open += 1
            count = next(self._trips, 1.0)
        return body, 1.0 if count is None else count

    def _trip_count(
        self, computation: Computation, loop: Instruction, condition: str, body: str
    ) -> float | None:
        limit = _limit(self._computations, condition)
        if limit is None:
            return None
        place, bound = limit
        start = _initial(computation, loop, place)
        if start is None:
            return None
        return max((bound - start) / _increment(self._computations, body, place), 0.0)


def _branches(text: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", text)
    if listed:
        return _NAME.findall(listed[1])
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", text)


def _sent_bytes(kind: str, instruction: Instruction) -> float:
    """What one chip sends, by the algorithms that send least: rings."""
    arrays = [shape.bytes for shape in instruction.shapes if shape.bytes > 8]
    if not arrays:
        return 0.0
    if kind == "collective-permute":
        return max(arrays)
    members = _members(instruction.text)
    share = (members - 1) / members
    largest = max(arrays) if instruction.opcode.endswith("-start") else sum(arrays)
    if kind == "reduce-scatter":  # the result is a part
        return largest * members * share if not instruction.opcode.endswith("-start") else (
            largest * share
        )
    return (2 if kind == "all-reduce" else 1) * largest * share


def _members(text: str) -> int:
    """How many chips take part in one group of a collective."""
    match = _GROUPS.search(text)
    if not match:
        return 1
    groups = match[1]
    if groups.startswith("mesh"):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", groups)}
        count = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups.partition("] {")[2]):
            count *= int(part) if part else sizes[name]
        return count
    if groups.startswith("{{"):
        return groups.count(",") + 1
    return int(groups.strip("[]").split(",")[-1])


def _moved(
    computation: Computation, instruction: Instruction, computations: dict[str, Computation]
) -> float:
    """Bytes of HBM that one run of an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and "AllocateBuffer" in instruction.text:
        return 0.0
    operands = [
        sum(shape.bytes for shape in computation.instructions[name].shapes if shape.in_hbm)
        for name in instruction.operands
        if name in computation.instructions
    ]
    result = sum(shape.bytes for shape in instruction.shapes if shape.in_hbm)
    if opcode == "dynamic-slice":
        return 2 * result if operands and operands[0] else result
    if opcode == "dynamic-update-slice":
        return 2 * operands[1] if len(operands) > 1 else result
    if opcode.endswith("-start"):
        return result  # of copies: source and target
    if opcode != "fusion":
        return result + sum(operands)
    called = _CALLED.search(instruction.text)
    if not called:
        return result + sum(operands)
    return _fused(computations[called[1]], operands, instruction)


def _fused(inner: Computation, operands: list[float], instruction: Instruction) -> float:
    """A fusion reads of an array that it slices the slice, and writes of one it updates the part.

    What it only passes on it does not touch.
    """
    parameters = [i for i in inner.instructions.values() if i.opcode == "parameter"]
    users: dict[str, list[Instruction]] = {}
    for user in inner.instructions.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)
    read = 0.0
    for parameter in parameters:
        place = int(re.search(r"\d+", parameter.text or "0")[0]) if parameter.text else 0
        whole = operands[place] if place < len(operands) else 0.0
        read += min(whole, _touched(parameter, users, inner, whole))
    root = inner.root
    results = [root] if root.opcode != "tuple" else [
        inner.instructions[name] for name in root.operands if name in inner.instructions
    ]
    written = 0.0
    for made, shape in zip(results, instruction.shapes, strict=False):
        if not shape.in_hbm or made.opcode == "parameter":
            continue
        if made.opcode == "dynamic-update-slice":
            update = inner.instructions.get(made.operands[1])
            written += sum(s.bytes for s in update.shapes) if update else shape.bytes
        else:
            written += shape.bytes
    return read + written


def _touched(
    value: Instruction, users: dict[str, list[Instruction]], inner: Computation, whole: float
) -> float:
    total = 0.0
    for user in users.get(value.name, []):
        if user.opcode == "dynamic-slice" and user.operands[0] == value.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "tuple" and user is inner.root:
            continue
        elif user.opcode == "bitcast":
            total += _touched(user, users, inner, whole)
        else:
            return whole
    return total


def _limit(computations: dict[str, Computation], condition: str) -> tuple[int, float] | None:
    """Which element of the loop's state is compared with which constant."""
    inner = computations[condition]
    root = inner.root
    if root.opcode == "fusion":
        called = computations[_CALLED.search(root.text)[1]]
        if called.root.opcode != "compare" or "direction=LT" not in called.root.text:
            return None
    elif root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    place = bound = None
    for name in root.operands:
        found = _resolved(inner, name)
        if found is None:
            continue
        if found.opcode == "get-tuple-element":
            place = int(re.search(r"index=(\d+)", found.text)[1])
        elif found.opcode == "constant":
            bound = _value(found)
    return None if place is None or bound is None else (place, bound)


def _value(constant: Instruction) -> float | None:
    match = re.match(r"\((-?[\d.]+)\)", constant.text)
    return float(match[1]) if match else None


def _resolved(computation: Computation, name: str) -> Instruction | None:
    """The instruction behind copies."""
    found = computation.instructions.get(name)
    while found and found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        found = computation.instructions.get(found.operands[0])
    return found


def _initial(computation: Computation, loop: Instruction, place: int) -> float | None:
    state = computation.instructions.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    found = _resolved(computation, state.operands[place])
    return _value(found) if found and found.opcode == "constant" else None


def _increment(computations: dict[str, Computation], body: str, place: int) -> float:
    """By what a trip raises the loop's counter; 1 where that cannot be seen."""
    inner = computations[body]
    if inner.root.opcode != "tuple":
        return 1.0
    return _added(computations, inner, inner.root.operands[place]) or 1.0


def _added(computations: dict[str, Computation], inner: Computation, name: str) -> float:
    found = _resolved(inner, name)
    if found is None:
        return 0.0
    if found.opcode == "fusion":
        called = computations[_CALLED.search(found.text)[1]]
        return _added(computations, called, called.root.name)
    if found.opcode != "add":
        return 0.0
    total = 0.0
    for operand in found.operands:
        part = _resolved(inner, operand)
        if part and part.opcode == "constant":
            total += _value(part) or 0.0
        else:
            total += _added(computations, inner, operand)
    return total
