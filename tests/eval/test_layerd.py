"""The LayerD protocol: cases worked by hand, and scores that the public implementation gave."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_jax.eval.layerd import (
    EditScores,
    PairScores,
    _align,
    group_layers,
    layerd_scores,
)

# [{"seed": …, "scores": [[cost, rgb_l1, alpha_iou] per edit]}] of `random_designs(seed)`, produced
# by LayersEditDist() of github.com/CyberAgentAILab/LayerD at 6b95bc5.
EXPECTED = json.loads((Path(__file__).parent / "layerd_expected.json").read_text())


def random_designs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random stacks of 1 to 8 layers: rectangles with flat or noisy colour and alpha."""
    rng = np.random.default_rng(seed)
    height, width, predicted, reference = rng.integers((4, 4, 1, 1), (24, 24, 9, 9))
    kind = ("solid", "binary", "soft", "noise")[seed % 4]
    truth = _random_stack(rng, reference, height, width, kind)
    if rng.random() < 0.5:
        picked = np.sort(rng.integers(0, reference, predicted))
        shifts = rng.integers(-20, 21, (predicted, 1, 1, 4))
        return np.clip(truth[picked] + shifts, 0, 255).astype(np.uint8), truth
    return _random_stack(rng, predicted, height, width, kind), truth


def _random_stack(rng, count, height, width, kind):
    stack = np.zeros((count, height, width, 4), np.uint8)
    for layer in stack:
        top, bottom = np.sort(rng.integers(0, height + 1, 2))
        left, right = np.sort(rng.integers(0, width + 1, 2))
        area = layer[top:bottom, left:right]
        colour = rng.integers(0, 256, 3)
        alpha = rng.integers(0, 256, area.shape[:2])
        area[..., :3] = colour if kind != "binary" else 255 * (colour > 127)
        area[..., 3] = {"soft": alpha, "noise": alpha}.get(kind, 255)
        if kind == "noise":
            layer[..., :3] = rng.integers(0, 256, (height, width, 3))
    return stack


def row(*pixels: tuple[int, int, int, int]) -> np.ndarray:
    """A layer of height 1, from its RGBA pixels."""
    return np.array([pixels], np.uint8)


CLEAR = (0, 0, 0, 0)
RED, GREEN, BLUE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"seed{case['seed']}")
def test_equals_the_public_implementation(case):
    scores = layerd_scores(*random_designs(case["seed"]))
    got = [[level.cost, level.rgb_l1, level.alpha_iou] for level in scores]
    np.testing.assert_allclose(got, case["scores"], rtol=0, atol=1e-11)


def test_expected_cases_cover_every_number_of_edits():
    assert {len(case["scores"]) for case in EXPECTED} == {1, 2, 3, 4, 5, 6}


def test_identical_stacks_are_perfect():
    stack = np.stack([row(RED, RED, RED), row(CLEAR, GREEN, GREEN), row(CLEAR, CLEAR, BLUE)])
    (scores,) = layerd_scores(stack, stack)
    assert scores == EditScores(0, 0.0, 0.0, 1.0, ((0, 0), (1, 1), (2, 2)))


def test_pair_cost_by_hand():
    # Reference alpha > 0 on pixels 0 and 1; there |Δ| is 255 on one of three channels, then 0:
    # rgb_l1 = (1/3 + 0)/2. Alphas 255, 0, 255 against 255, 51, 0: IoU = 255/(255 + 51 + 255).
    predicted = np.stack([row(RED, (9, 9, 9, 0), RED)])
    reference = np.stack([row((0, 0, 0, 255), (9, 9, 9, 51), CLEAR)])
    (scores,) = layerd_scores(predicted, reference)
    assert scores.rgb_l1 == pytest.approx(1 / 6, abs=1e-8)
    assert scores.alpha_iou == pytest.approx(255 / 561, abs=1e-12)
    assert scores.cost == pytest.approx((1 / 6 + 1 - 255 / 561) / 2, abs=1e-8)


def test_colour_is_compared_straight_and_under_the_reference_only():
    # A nearly transparent black pixel where the reference is opaque white costs its full colour;
    # what the prediction shows outside the reference costs IoU alone.
    predicted = np.stack([row((0, 0, 0, 1), RED)])
    reference = np.stack([row(WHITE, CLEAR)])
    (scores,) = layerd_scores(predicted, reference)
    assert scores.rgb_l1 == pytest.approx(1.0, abs=1e-7)
    assert scores.alpha_iou == pytest.approx(1 / (255 + 255), abs=1e-12)


def test_empty_layers_have_no_colour_error_and_no_overlap():
    blank = np.zeros((1, 2, 2, 4), np.uint8)
    (scores,) = layerd_scores(blank, blank)
    assert (scores.rgb_l1, scores.alpha_iou, scores.cost) == (0.0, 0.0, 0.5)


def test_prediction_that_overlaps_nothing():
    (scores,) = layerd_scores(np.stack([row(CLEAR, RED)]), np.stack([row(BLACK, CLEAR)]))
    # Under the reference the prediction's hidden colour is black too: only the IoU term is left.
    assert (scores.rgb_l1, scores.alpha_iou, scores.cost) == (0.0, 0.0, 0.5)


def test_touching_needs_a_common_pixel_of_alpha_one_or_more():
    background = row(WHITE, WHITE, WHITE)
    left, right = row(RED, CLEAR, CLEAR), row(CLEAR, CLEAR, BLUE)
    faint = row((0, 0, 0, 1), CLEAR, CLEAR)
    assert group_layers(np.stack([background, left, right])) == [[0], [1, 2]]
    assert group_layers(np.stack([background, left, faint])) == [[0], [1], [2]]
    # A layer that nothing covers peels off with the top, however deep it lies in the stack.
    assert group_layers(np.stack([right, left, faint])) == [[1], [0, 2]]
    # Blank layers overlap nothing, so they too belong to the topmost group.
    assert group_layers(np.stack([background, row(CLEAR, CLEAR, CLEAR)])) == [[0, 1]]


def test_order_of_layers_that_do_not_touch_is_free():
    background = row(WHITE, WHITE, WHITE)
    left, right = row(RED, CLEAR, CLEAR), row(CLEAR, CLEAR, BLUE)
    first = np.stack([background, left, right])
    second = np.stack([background, right, left])
    assert layerd_scores(first, second)[0].cost == 0.0


def test_alignment_prefers_the_diagonal_then_the_prediction():
    # All ones: from the end the diagonal is cheapest as long as it can be walked.
    assert _align(np.ones((3, 3))) == ((0, 0), (1, 1), (2, 2))
    # Worked by hand: accumulated costs [[0, 0, 2], [0, 2, 1], [2, 1, 1]]. At the corner the
    # diagonal costs 2 and both others 1: the prediction steps back, to (1, 2); there the
    # diagonal (0, 1) costs 0, no more than (0, 2) and (1, 1).
    cost = np.array([[0.0, 0.0, 2.0], [0.0, 2.0, 1.0], [2.0, 1.0, 0.0]])
    assert _align(cost) == ((0, 0), (0, 1), (1, 2), (2, 2))
    assert _align(np.zeros((1, 3))) == ((0, 0), (0, 1), (0, 2))
    assert _align(np.zeros((3, 1))) == ((0, 0), (1, 0), (2, 0))


def test_a_split_object_is_merged_back():
    background, whole = row(WHITE, WHITE, WHITE), row(CLEAR, RED, GREEN)
    # The halves overlap in one pixel, so grouping leaves them apart; merged they are the object.
    lower, upper = row(CLEAR, RED, GREEN), row(CLEAR, CLEAR, GREEN)
    reference = np.stack([background, whole])
    predicted = np.stack([background, lower, upper])
    before, after = layerd_scores(predicted, reference)
    assert before.path == ((0, 0), (1, 1), (2, 1))
    # The third pair: G = GREEN under alpha, CLEAR's black where the reference is RED: rgb_l1 =
    # (1/3 + 0)/2, IoU = 1/2.
    assert before.rgb_l1 == pytest.approx(1 / 6 / 3, abs=1e-8)
    assert before.alpha_iou == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert (after.edits, after.cost, after.path) == (1, 0.0, ((0, 0), (1, 1)))
    # The same from the other side: there the reference is merged.
    assert layerd_scores(reference, predicted)[-1].cost == 0.0


def test_the_reference_is_merged_when_both_sides_gain_the_same():
    # The reference is the prediction with red and green exchanged, so both sides gain alike.
    predicted = np.stack([row((255, 255, 0, 255)), row(RED), row(BLACK)])
    reference = np.stack([row((255, 255, 0, 255)), row(GREEN), row(BLACK)])
    before, after = layerd_scores(predicted, reference)
    # Red against green differs in two of three channels: rgb_l1 = 2/3, once in three pairs.
    assert before.rgb_l1 == pytest.approx(2 / 3 / 3, abs=1e-7)
    # Three predictions face two references: yellow, and black over green, which is black. Red is
    # one channel away from yellow.
    assert after.path == ((0, 0), (1, 0), (2, 1))
    assert after.rgb_l1 == pytest.approx(1 / 3 / 3, abs=1e-7)


def test_two_layers_are_never_merged():
    predicted = np.stack([row(RED, RED), row(CLEAR, GREEN)])
    reference = np.stack([row(RED, GREEN)])
    assert len(layerd_scores(predicted, reference)) == 1


def test_more_predictions_than_references_and_the_reverse():
    layers = np.stack([row(*(RED,) * 5)] + [row(*(CLEAR,) * k, *(BLUE,) * (5 - k)) for k in (1, 2)])
    one = layers[:1]
    assert layerd_scores(layers, one)[0].path == ((0, 0), (1, 0), (2, 0))
    assert layerd_scores(one, layers)[0].path == ((0, 0), (0, 1), (0, 2))


def test_max_edits_bounds_the_levels():
    longest = next(case["seed"] for case in EXPECTED if len(case["scores"]) == 6)
    full = layerd_scores(*random_designs(longest))
    assert len(full) == 6
    assert layerd_scores(*random_designs(longest), max_edits=2) == full[:3]
    assert layerd_scores(*random_designs(longest), max_edits=0) == full[:1]


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (np.zeros((0, 2, 2, 4), np.uint8), "at least one layer"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"\[L, H, W, 4\]"),
        (np.zeros((1, 2, 2, 4), np.float32), "uint8"),
        (np.zeros((1, 2, 3, 4), np.uint8), "resize"),
    ],
)
def test_bad_stacks_are_refused(predicted, message):
    with pytest.raises(ValueError, match=message):
        layerd_scores(predicted, np.zeros((1, 2, 2, 4), np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_scores_stay_in_range_and_groups_partition(seed):
    predicted, reference = random_designs(seed)
    for scores in layerd_scores(predicted, reference):
        assert 0 <= scores.rgb_l1 <= 1 and 0 <= scores.alpha_iou <= 1
        assert scores.cost == pytest.approx(PairScores(scores.rgb_l1, scores.alpha_iou).cost)
        assert scores.path[0] == (0, 0)
    indices = [index for group in group_layers(predicted) for index in group]
    assert sorted(indices) == list(range(len(predicted)))
