"""Requests: what a judge sees, and that the pictures can be read back."""

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.scoring import Group, JudgeRequest, RenderConfig, rubric
from sl_jax.scoring import request as rendering

_PROMPTS = rubric.load_prompts()


def _layers(seed: int = 0, count: int = 3, side: tuple[int, int] = (24, 20)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    layers = rng.integers(0, 256, (count, *side, 4), np.uint8)
    layers[0, ..., 3] = 255
    return layers


def _group(count: int = 3) -> Group:
    candidates = tuple(_layers(seed) for seed in range(count))
    return Group("g", imaging.recompose(candidates[0]), candidates, "a red hat")


@pytest.mark.parametrize("layout", ["sheet", "separate"])
def test_stage_1_shows_everything_and_is_read_back(layout):
    layers = _layers()
    source = imaging.recompose(_layers(9))
    request = rendering.candidate_request(
        source, layers, _PROMPTS, RenderConfig(layout=layout), "a red hat"
    )
    pictures = [part for part in request.parts if not isinstance(part, str)]
    assert len(pictures) == (1 if layout == "sheet" else 2 + 3 * len(layers))
    assert "a red hat" in request.parts[0]
    seen = rendering.read_candidate(request)
    np.testing.assert_allclose(seen.source, source / 255, atol=1e-6)
    np.testing.assert_allclose(seen.recomposition, imaging.recompose(layers) / 255, atol=1e-6)
    np.testing.assert_allclose(seen.alpha, layers[..., 3] / 255, atol=1e-6)
    wanted = imaging.premultiplied(layers)[..., :3]
    np.testing.assert_allclose(seen.color, wanted, atol=0.51 / 255)


def test_both_layouts_show_the_same():
    layers = _layers()
    source = imaging.recompose(layers)
    seen = [
        rendering.read_candidate(
            rendering.candidate_request(source, layers, _PROMPTS, RenderConfig(layout=layout))
        )
        for layout in ("sheet", "separate")
    ]
    for first, second in zip(*seen, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_grid_is_read_back_by_label():
    group = _group(5)
    arrangement = rendering.shuffle(range(5), 3, "g", 0)
    request = rendering.grid_request(group, arrangement, None, _PROMPTS, RenderConfig())
    labels, seen = rendering.read_grid(request)
    assert labels == arrangement.labels
    for index, candidate in zip(arrangement.places, seen, strict=True):
        layers = group.candidates[index]
        np.testing.assert_allclose(candidate.source, group.source / 255, atol=1e-6)
        np.testing.assert_allclose(candidate.alpha, layers[..., 3] / 255, atol=1e-6)
        wanted = imaging.premultiplied(layers)[..., :3]
        np.testing.assert_allclose(candidate.color, wanted, atol=0.51 / 255)


def test_the_grid_tells_stage_1_scores_by_label_and_asks_for_every_label():
    group = _group(3)
    arrangement = rendering.Shuffle(np.array([2, 0, 1]), ("B", "C", "A"))
    stage1 = np.array([0.11, 0.22, 0.33])
    request = rendering.grid_request(group, arrangement, stage1, _PROMPTS, RenderConfig())
    assert "A: 2.2, B: 3.3, C: 1.1" in request.parts[0]
    assert request.schema["properties"]["scores"]["required"] == ["A", "B", "C"]


def test_large_pictures_are_shrunk_and_small_ones_left_alone():
    layers = _layers(side=(48, 96))
    source = imaging.recompose(layers)
    config = RenderConfig(picture_size=32, tile_size=24)
    request = rendering.candidate_request(source, layers, _PROMPTS, config)
    assert rendering.read_candidate(request).alpha.shape == (3, 16, 32)
    group = Group("g", source, (layers, layers))
    arrangement = rendering.shuffle(range(2), 0, "g", 0)
    _, seen = rendering.read_grid(
        rendering.grid_request(group, arrangement, None, _PROMPTS, config)
    )
    assert seen[0].alpha.shape == (3, 12, 24)


def test_shuffles_depend_on_seed_group_and_grid_alone():
    first = rendering.shuffle(range(8), 1, "g", 0)
    again = rendering.shuffle(range(8), 1, "g", 0)
    np.testing.assert_array_equal(first.places, again.places)
    assert first.labels == again.labels
    assert sorted(first.places) == list(range(8)) and sorted(first.labels) == list("ABCDEFGH")
    others = [rendering.shuffle(range(8), *key) for key in ((2, "g", 0), (1, "h", 0), (1, "g", 1))]
    assert all((other.places != first.places).any() for other in others)
    assert any(other.labels != tuple(sorted(other.labels)) for other in others)


def test_labels_go_on_after_z():
    assert [rendering.label_of(i) for i in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]


def test_a_picture_that_does_not_fit_its_legend_is_refused():
    request = rendering.candidate_request(
        imaging.recompose(_layers()), _layers(), _PROMPTS, RenderConfig()
    )
    cut = JudgeRequest(1, (*request.parts[:2], request.parts[2][:-1]), request.schema)
    with pytest.raises(rendering.UnreadableRequestError, match="does not fit"):
        rendering.read_candidate(cut)
    with pytest.raises(rendering.UnreadableRequestError):
        rendering.read_candidate(JudgeRequest(1, ("Hello.",), request.schema))
    with pytest.raises(rendering.UnreadableRequestError):
        rendering.read_grid(JudgeRequest(2, ("Hello.",), request.schema))


def test_the_digest_covers_all_that_is_shown():
    parts = ("text", np.zeros((2, 3, 3), np.uint8))
    request = JudgeRequest(1, parts, {"type": "object"})
    assert request.digest() == JudgeRequest(1, parts, {"type": "object"}, repeat=4).digest()
    others = [
        JudgeRequest(1, ("texts", parts[1]), {"type": "object"}),
        JudgeRequest(1, ("text", parts[1].reshape(3, 2, 3)), {"type": "object"}),
        JudgeRequest(1, ("text", parts[1] + 1), {"type": "object"}),
        JudgeRequest(1, parts, {"type": "array"}),
    ]
    assert len({request.digest(), *(other.digest() for other in others)}) == 5
