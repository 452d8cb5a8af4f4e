"""The LayerD protocol: layer decompositions of different lengths, aligned and compared.

LayerD (arXiv 2509.25134) compares a predicted stack of layers with a reference stack in four
moves, and its public implementation fixes the details that the paper leaves open:

1. **Group.** In each stack, layers that overlap nothing above them among those that remain are
   peeled off together from the top (two layers overlap where both have alpha > 0), and each such
   group is composited into one layer. Order among things that do not touch thereby stops counting.
2. **Align** the two grouped stacks by order-preserving dynamic time warping, with the pair cost

       cost(p, r) = (rgb_l1(p, r) + 1 − alpha_iou(p, r)) / 2

       rgb_l1(p, r)    = Σ_{α_r > 0} mean_c |p_c − r_c| / (#{α_r > 0} + 1e-8)     straight RGB, 0..1
       alpha_iou(p, r) = Σ min(α_p, α_r) / Σ max(α_p, α_r)                        0 if both empty

   Ties prefer the diagonal step, then the step along the prediction.
3. **Score**: means of cost, rgb_l1 and alpha_iou over the pairs of the path.
4. **Edit**: merge the neighbouring pair, in the prediction or in the reference, that gains most,
   and align again; up to five times. A stack of two layers or fewer is never merged, and the
   edits stop when no merge gains anything.

All sums are integer sums of uint8 values, exact until the last divisions. Scores equal the public
implementation's to about 1e-15; only where two choices tie in exact arithmetic and differ by its
rounding (about one in 6,000 random designs of a few pixels and two colours) may it choose the
other one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

MAX_EDITS = 5
_SMALLEST_STACK = 2  # stacks of this length or shorter are not merged further
_EPSILON = 1e-8  # in the denominator of rgb_l1, as in the public implementation


class PairScores(NamedTuple):
    """How one predicted layer compares with one reference layer; both numbers in 0..1."""

    rgb_l1: float
    alpha_iou: float

    @property
    def cost(self) -> float:
        """The alignment cost (rgb_l1 + 1 − alpha_iou) / 2, 0..1, lower is better."""
        return (self.rgb_l1 + (1 - self.alpha_iou)) / 2


@dataclass(frozen=True)
class EditScores:
    """Scores of one design after `edits` merges: means over the pairs of the alignment path.

    `path` holds (prediction, reference) indices into the grouped and merged stacks.
    """

    edits: int
    cost: float
    rgb_l1: float
    alpha_iou: float
    path: tuple[tuple[int, int], ...]


class _Box(NamedTuple):
    """Half-open rectangle of rows and columns."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def meet(self, other: _Box) -> _Box:
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return _Box(top, max(top, bottom), left, max(left, right))


class _Layer:
    """One layer with what every comparison needs of it, computed once."""

    __slots__ = ("alpha", "alpha_sum", "box", "pixels", "rgb_mask", "visible")

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.alpha = np.ascontiguousarray(pixels[..., 3])
        self.box = _visible_box(self.alpha)
        shown = self.alpha[self.box.window] > 0
        self.visible = int(np.count_nonzero(shown))
        self.alpha_sum = _total(self.alpha[self.box.window])
        self.rgb_mask = np.zeros((*shown.shape, 4), np.uint8)
        self.rgb_mask[..., :3] = (shown * np.uint8(255))[..., None]


class _Comparisons:
    """Pair scores and merges of one design, each computed at most once."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[_Layer, _Layer], PairScores] = {}
        self._merges: dict[tuple[_Layer, _Layer], _Layer] = {}

    def pair(self, layer: _Layer, target: _Layer) -> PairScores:
        key = (layer, target)
        if key not in self._pairs:
            self._pairs[key] = PairScores(_rgb_l1(layer, target), _alpha_iou(layer, target))
        return self._pairs[key]

    def likeness(self, layer: _Layer, targets: Iterable[_Layer]) -> float:
        return sum(1 - self.pair(layer, target).cost for target in targets)

    def merge(self, below: _Layer, above: _Layer) -> _Layer:
        key = (below, above)
        if key not in self._merges:
            self._merges[key] = _merged(below, above)
        return self._merges[key]


def layerd_scores(
    predicted: np.ndarray | Sequence[np.ndarray],
    reference: np.ndarray | Sequence[np.ndarray],
    max_edits: int = MAX_EDITS,
) -> tuple[EditScores, ...]:
    """Scores one predicted decomposition against its reference by the LayerD protocol.

    Args:
      predicted: uint8 [L_p, H, W, 4] straight RGBA, back to front, L_p ≥ 1.
      reference: uint8 [L_r, H, W, 4], the same; L_r may differ from L_p.
      max_edits: the largest number of merges; the protocol uses 5.

    Returns:
      Scores after 0, 1, … merges. Shorter than max_edits + 1 where no further merge gained.

    Raises:
      ValueError: an empty stack, another dtype or shape, or different picture sizes.

    Source: LayerD, arXiv 2509.25134, section on evaluation, and its public implementation. Its
    script leaves out designs with fewer than two layers on either side; here that choice is the
    caller's.
    """
    stacks = [_checked(predicted, "predicted"), _checked(reference, "reference")]
    if stacks[0].shape[1:] != stacks[1].shape[1:]:
        raise ValueError(
            f"predicted layers are {stacks[0].shape[1:3]} and reference layers "
            f"{stacks[1].shape[1:3]} (H, W); please resize one of them first"
        )
    known = _Comparisons()
    predictions, references = (_grouped(stack) for stack in stacks)
    scores = []
    for edits in range(max_edits + 1):
        table = [[known.pair(p, r) for r in references] for p in predictions]
        path = _align(np.array([[pair.cost for pair in row] for row in table]))
        scores.append(_path_scores(edits, path, table))
        if edits == max_edits or not _merge_best(predictions, references, path, known):
            break
    return tuple(scores)


def group_layers(layers: np.ndarray) -> list[list[int]]:
    """Indices of layers that peel off together, groups back to front, back to front inside.

    Args:
      layers: uint8 [L, H, W, 4], back to front.

    Returns:
      Each index exactly once. A layer belongs to the topmost group in which nothing that is still
      there lies above it and overlaps it (alpha > 0 in both at one pixel or more).
    """
    shown = [layer[..., 3] > 0 for layer in layers]
    boxes = [_visible_box(mask) for mask in shown]
    count = len(shown)
    covered_by = [
        {j for j in range(i + 1, count) if _overlap(shown[i], shown[j], boxes[i].meet(boxes[j]))}
        for i in range(count)
    ]
    groups, remaining = [], list(range(count))
    while remaining:
        group = [i for i in remaining if covered_by[i].isdisjoint(remaining)]
        groups.append(group)
        remaining = [i for i in remaining if i not in group]
    return groups[::-1]


def _checked(layers: np.ndarray | Sequence[np.ndarray], name: str) -> np.ndarray:
    stack = np.asarray(layers)
    if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 4 or stack.size == 0:
        raise ValueError(
            f"{name} layers must be uint8 [L, H, W, 4] with at least one layer and one pixel, "
            f"got {stack.dtype} {list(stack.shape)}"
        )
    return np.ascontiguousarray(stack)


def _visible_box(alpha: np.ndarray) -> _Box:
    """The smallest box around what is not 0; an empty box where all is 0."""
    rows = np.flatnonzero(alpha.any(axis=1))
    if not rows.size:
        return _Box(0, 0, 0, 0)
    columns = np.flatnonzero(alpha[rows[0] : rows[-1] + 1].any(axis=0))
    return _Box(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def _overlap(first: np.ndarray, second: np.ndarray, box: _Box) -> bool:
    return bool((first[box.window] & second[box.window]).any())


def _total(values: np.ndarray) -> int:
    """Exact sum of uint8 values [h, w, …]: rows in uint32, their totals in Python integers."""
    rows = values.sum(axis=tuple(range(1, values.ndim)), dtype=np.uint32)
    return int(rows.sum(dtype=np.uint64))


def _grouped(layers: np.ndarray) -> list[_Layer]:
    groups = []
    for indices in group_layers(layers):
        group = _Layer(layers[indices[0]])
        for index in indices[1:]:
            group = _merged(group, _Layer(layers[index]))
        groups.append(group)
    return groups


def _merged(below: _Layer, above: _Layer) -> _Layer:
    """`above` over `below` in uint8 as Pillow rounds it, which leaves `below` as it is wherever
    `above` has alpha 0, colours under alpha 0 included."""
    pixels = below.pixels.copy()
    window = above.box.window
    if above.visible:
        pixels[window] = Image.alpha_composite(
            Image.fromarray(np.ascontiguousarray(below.pixels[window])),
            Image.fromarray(np.ascontiguousarray(above.pixels[window])),
        )
    return _Layer(pixels)


def _rgb_l1(layer: _Layer, target: _Layer) -> float:
    ours, theirs = layer.pixels[target.box.window], target.pixels[target.box.window]
    difference = np.maximum(ours, theirs)
    difference -= np.minimum(ours, theirs)
    difference &= target.rgb_mask
    return _total(difference) / (3 * 255) / (target.visible + _EPSILON)


def _alpha_iou(layer: _Layer, target: _Layer) -> float:
    window = layer.box.meet(target.box).window
    shared = _total(np.minimum(layer.alpha[window], target.alpha[window]))
    union = layer.alpha_sum + target.alpha_sum - shared  # Σ max = Σ α_p + Σ α_r − Σ min
    return shared / union if union else 0.0


def _align(cost: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The cheapest monotone path from (0, 0) to the last pair through the cost matrix [n, m]."""
    total = np.full((cost.shape[0] + 1, cost.shape[1] + 1), math.inf)
    total[0, 0] = 0.0
    for i, j in np.ndindex(cost.shape):
        total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    i, j = cost.shape
    path = [(i - 1, j - 1)]
    while (i, j) != (1, 1):
        steps = ((i - 1, j - 1), (i - 1, j), (i, j - 1))  # min keeps the first of equals
        i, j = min(steps, key=lambda step: total[step])
        path.append((i - 1, j - 1))
    return tuple(path[::-1])


def _path_scores(
    edits: int, path: tuple[tuple[int, int], ...], table: list[list[PairScores]]
) -> EditScores:
    pairs = [table[i][j] for i, j in path]
    return EditScores(
        edits=edits,
        cost=float(np.mean([pair.cost for pair in pairs])),
        rgb_l1=float(np.mean([pair.rgb_l1 for pair in pairs])),
        alpha_iou=float(np.mean([pair.alpha_iou for pair in pairs])),
        path=path,
    )


def _merge_best(
    predictions: list[_Layer],
    references: list[_Layer],
    path: tuple[tuple[int, int], ...],
    known: _Comparisons,
) -> bool:
    """Merges two neighbours in place, on the side that gains more; False if nothing gains.

    The reference side wins a tie. Its gains are measured with the roles exchanged: rgb_l1 then
    runs over the prediction's alpha > 0.
    """
    back = tuple((j, i) for i, j in path)
    ours, our_gain = _best_merge(predictions, references, path, known)
    theirs, their_gain = _best_merge(references, predictions, back, known)
    if max(our_gain, their_gain) == -math.inf:
        return False
    stack, index = (predictions, ours) if our_gain > their_gain else (references, theirs)
    stack[index : index + 2] = [known.merge(stack[index], stack[index + 1])]
    return True


def _best_merge(
    layers: list[_Layer],
    targets: list[_Layer],
    path: tuple[tuple[int, int], ...],
    known: _Comparisons,
) -> tuple[int, float]:
    """(lower index, gain) of the merge in `layers` that gains most; the gain is −∞ if none does.

    With T_i the targets that the path gives to layer i and S(x, T) = Σ_T (1 − cost(x, t)),
    merging i and i+1 into m, with n the layer above them (if there is one), gains

        S(m, T_i) + max{S(m, T_i+1), S(n, T_i), S(n, T_i+1)} − S(i, T_i) − S(i+1, T_i+1).

    The two terms with n are the public implementation's: what the merge frees may go to n.
    """
    best = (-1, -math.inf)
    if len(layers) <= _SMALLEST_STACK:
        return best
    matched = [[targets[j] for i, j in path if i == layer] for layer in range(len(layers))]
    for index in range(len(layers) - 1):
        lower, upper = matched[index], matched[index + 1]
        merged = known.merge(layers[index], layers[index + 1])
        rest = [known.likeness(merged, upper)]
        for following in layers[index + 2 : index + 3]:
            rest += [known.likeness(following, lower), known.likeness(following, upper)]
        before = known.likeness(layers[index], lower) + known.likeness(layers[index + 1], upper)
        after = max(other + known.likeness(merged, lower) for other in rest)
        if after > before and after - before > best[1]:
            best = (index, after - before)
    return best
