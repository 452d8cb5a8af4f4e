"""Per-layer L1 and its order-free companion, worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_jax.eval.stable_layers import layer_l1, layer_l1_matrix


def row(*pixels: tuple[int, int, int, int]) -> np.ndarray:
    return np.array([pixels], np.uint8)


CLEAR = (0, 0, 0, 0)
RED, BLUE, WHITE = (255, 0, 0, 255), (0, 0, 255, 255), (255, 255, 255, 255)


def test_identical_is_zero():
    stack = np.stack([row(WHITE, WHITE), row(RED, CLEAR)])
    result = layer_l1(stack, stack)
    assert (result.per_layer, result.mean, result.background, result.order_free) == (
        (0.0, 0.0),
        0.0,
        0.0,
        0.0,
    )
    assert result.assignment == (0, 1)
    assert result.layers == 2


def test_premultiplied_by_hand():
    # One pixel (200, 100, 0, 51) against (0, 100, 255, 102), alphas 0.2 and 0.4:
    # |200·51 − 0| + |100·51 − 100·102| + |0 − 255·102| + 255·|51 − 102|, over 255² and 4 channels.
    predicted, reference = row((200, 100, 0, 51))[None], row((0, 100, 255, 102))[None]
    expected = (10200 + 5100 + 26010 + 13005) / 255**2 / 4
    assert layer_l1(predicted, reference).mean == pytest.approx(expected, rel=1e-12)


def test_colour_under_alpha_zero_does_not_count():
    assert layer_l1(row((255, 9, 77, 0))[None], row(CLEAR)[None]).mean == 0.0


def test_swapped_objects_cost_index_wise_but_not_order_free():
    background, left, right = row(WHITE, WHITE), row(RED, CLEAR), row(CLEAR, BLUE)
    result = layer_l1(np.stack([background, left, right]), np.stack([background, right, left]))
    # Each swapped pair differs by (1, 0, 0, 1) and (0, 0, 1, 1) on its two pixels: 4 of 8 values.
    assert result.per_layer == (0.0, 0.5, 0.5)
    assert result.mean == pytest.approx(1 / 3)
    assert (result.background, result.order_free, result.assignment) == (0.0, 0.0, (0, 2, 1))


def test_more_predictions_than_references_and_the_reverse():
    background, extra = row(WHITE, WHITE), row(RED, CLEAR)
    two, one = np.stack([background, extra]), background[None]
    # The lonely layer is compared with nothing: red and alpha of one of two pixels, 2 of 8 values.
    surplus = layer_l1(two, one)
    assert (surplus.layers, surplus.per_layer, surplus.mean) == (1, (0.0, 0.25), 0.125)
    missing = layer_l1(one, two)
    assert (missing.layers, missing.per_layer, missing.mean) == (2, (0.0, 0.25), 0.125)
    assert missing.order_free == 0.125


def test_surplus_blank_layer_costs_nothing_of_its_own():
    background = row(WHITE, WHITE)
    padded = np.stack([background, row(CLEAR, CLEAR)])
    assert layer_l1(padded, background[None]).mean == 0.0


def test_single_blank_layers_and_no_overlap():
    blank, full = row(CLEAR, CLEAR)[None], row(WHITE, WHITE)[None]
    assert layer_l1(blank, blank).mean == 0.0
    assert layer_l1(blank, full).mean == 1.0
    # Two opaque white pixels that do not overlap are as far apart as it gets.
    assert layer_l1(row(WHITE, CLEAR)[None], row(CLEAR, WHITE)[None]).mean == 1.0


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4))
def test_equals_the_formula_and_order_free_is_the_best_permutation(seed, predicted, reference):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 256, (predicted, 3, 5, 4), np.uint8)
    r = rng.integers(0, 256, (reference, 3, 5, 4), np.uint8)

    def shown(stack):
        unit = stack / 255.0
        full = np.zeros((max(predicted, reference), 3, 5, 4))
        full[: len(stack)] = np.concatenate([unit[..., :3] * unit[..., 3:], unit[..., 3:]], -1)
        return full

    expected = np.abs(shown(p)[:, None] - shown(r)[None]).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(layer_l1_matrix(p, r), expected, atol=1e-12)
    result = layer_l1(p, r)
    assert result.mean == pytest.approx(np.trace(expected) / len(expected))
    chosen = [expected[i, j] for i, j in enumerate(result.assignment)]
    assert result.order_free == pytest.approx(np.mean(chosen))
    assert sorted(result.assignment) == list(range(len(expected)))
    assert result.order_free <= result.mean + 1e-12


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (np.zeros((0, 2, 2, 4), np.uint8), "at least one layer"),
        (np.zeros((1, 2, 2, 4), np.float32), "uint8"),
        (np.zeros((1, 3, 2, 4), np.uint8), "resize"),
    ],
)
def test_bad_stacks_are_refused(predicted, message):
    with pytest.raises(ValueError, match=message):
        layer_l1(predicted, np.zeros((1, 2, 2, 4), np.uint8))
