"""The Stable-Layers protocol: L1 of each predicted layer against the reference at its index.

With p = (c·α, α) the premultiplied RGBA of a layer, in 0..1, the distance of two layers is

    d(P, R) = mean over pixels and the four channels of |p_P − p_R|

so that colours which nobody can see do not count. Results are grouped by L, the number of layers
of the reference with the background; reported are the mean over layers and the background alone
("Pred 0"). Beside it stands the order-free mean: the same distance under the assignment of
predicted to reference layers that minimises it, since objects that do not touch can swap places
unseen.

Stacks of different length are padded with fully transparent layers at the front end, and all
max(L_p, L_r) pairs count: a missing layer costs all that it should have shown, a surplus layer all
that it shows, a surplus blank layer nothing but a share of the mean.

Source: Stable-Layers (arXiv 2605.30257), per-layer reconstruction error on Crello. That the
compared RGBA is premultiplied, and how lengths are levelled, is settled here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

_UNIT = 255 * 255  # premultiplied values are kept as integers c·α and 255·α


@dataclass(frozen=True)
class LayerL1:
    """Per-layer L1 of one design, 0..1, lower is better.

    Attributes:
      layers: L of the reference, which is the group this design belongs to.
      per_layer: distance at each index, max(L_p, L_r) of them.
      mean: mean of per_layer.
      background: distance at index 0.
      order_free: mean under the best assignment; never larger than mean.
      assignment: assignment[i] is the reference index that predicted layer i got, over the padded
        stacks.
    """

    layers: int
    per_layer: tuple[float, ...]
    mean: float
    background: float
    order_free: float
    assignment: tuple[int, ...]


def layer_l1(predicted: np.ndarray, reference: np.ndarray) -> LayerL1:
    """Index-wise and order-free L1 of one decomposition.

    Args:
      predicted: uint8 [L_p, H, W, 4] straight RGBA, back to front, L_p ≥ 1.
      reference: uint8 [L_r, H, W, 4], the same picture size; L_r ≥ 1.

    Raises:
      ValueError: an empty stack, another dtype or shape, or different picture sizes.
    """
    distances = layer_l1_matrix(predicted, reference)
    per_layer = np.diagonal(distances)
    rows, columns = linear_sum_assignment(distances)
    return LayerL1(
        layers=len(reference),
        per_layer=tuple(float(value) for value in per_layer),
        mean=float(per_layer.mean()),
        background=float(per_layer[0]),
        order_free=float(distances[rows, columns].mean()),
        assignment=tuple(int(column) for column in columns),
    )


def layer_l1_matrix(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distances of every predicted to every reference layer, float64 [n, n], n = max(L_p, L_r).

    Rows are predictions, columns references, both padded with transparent layers. Arguments and
    errors as for `layer_l1`.
    """
    for name, stack in (("predicted", predicted), ("reference", reference)):
        if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 4 or not stack.size:
            raise ValueError(
                f"{name} layers must be uint8 [L, H, W, 4] with at least one layer and one pixel, "
                f"got {stack.dtype} {list(stack.shape)}"
            )
    if predicted.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"predicted layers are {predicted.shape[1:3]} and reference layers "
            f"{reference.shape[1:3]} (H, W); please resize one of them first"
        )
    size = max(len(predicted), len(reference))
    rows = [_premultiplied(layer) for layer in predicted]
    columns = [_premultiplied(layer) for layer in reference]
    blank = np.zeros_like(rows[0])
    rows += [blank] * (size - len(rows))
    columns += [blank] * (size - len(columns))
    return np.array([[_distance(row, column) for column in columns] for row in rows])


def _premultiplied(layer: np.ndarray) -> np.ndarray:
    """uint16 [H, W, 4] of (c·α, 255·α), exact."""
    scale = layer.astype(np.uint16)
    scale[..., :3] *= scale[..., 3:].copy()
    scale[..., 3] *= 255
    return scale


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    gap = np.maximum(first, second)
    gap -= np.minimum(first, second)
    return int(gap.sum(dtype=np.uint64)) / (_UNIT * gap.size)
