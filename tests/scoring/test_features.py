"""Each penalty of the embedded judge answers to the flaw that it is named after."""

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.scoring import RenderConfig, cases, rubric
from sl_jax.scoring import request as rendering
from sl_jax.scoring._features import Penalties, penalties, shrunk

_PROMPTS = rubric.load_prompts()
_CLEAN = cases.design()
_SOURCE = imaging.recompose(_CLEAN)


def _penalties(layers: np.ndarray) -> Penalties:
    request = rendering.candidate_request(_SOURCE, layers, _PROMPTS, RenderConfig())
    return penalties(rendering.read_candidate(request))


def _with_hole(layers: np.ndarray) -> np.ndarray:
    flawed = layers.copy()
    flawed[0, layers[1, ..., 3] > 128] = 0
    return flawed


def _with_specks(layers: np.ndarray) -> np.ndarray:
    flawed = layers.copy()
    flawed[2, 4:12, 4:12] = (90, 200, 20, 255)
    return flawed


def _faint_over_the_picture(layers: np.ndarray) -> np.ndarray:
    flawed = layers.copy()
    flawed[0, ..., :3] = _SOURCE
    flawed[1:, ..., 3] //= 3
    return flawed


def _behind_cut_off(layers: np.ndarray) -> np.ndarray:
    """The object behind ends where the one in front begins."""
    flawed = layers.copy()
    flawed[1, layers[2, ..., 3] > 128] = 0
    return flawed


def _other_colours(layers: np.ndarray) -> np.ndarray:
    flawed = layers.copy()
    flawed[1:, ..., :3] = layers[1:, ..., [1, 2, 0]]
    return flawed


def _swallowed(layers: np.ndarray) -> np.ndarray:
    """The object in front grows over the one behind."""
    flawed = layers.copy()
    behind = layers[1, ..., 3] > 0
    flawed[2][behind] = _with_alpha(_SOURCE)[behind]
    return flawed


def _halves_exchanged(layers: np.ndarray) -> np.ndarray:
    """Each object's layer holds the left half of its own and the right half of the other."""
    flawed = layers.copy()
    for mine, other in ((1, 2), (2, 1)):
        shown = layers[other, ..., 3] > 0
        right = shown & (np.cumsum(shown, axis=1) > shown.sum(1, keepdims=True) / 2)
        flawed[mine][right] = layers[other][right]
        flawed[other][right] = 0
    return flawed


def _with_alpha(picture: np.ndarray) -> np.ndarray:
    return np.concatenate([picture, np.full_like(picture[..., :1], 255)], -1)


def _negative_background(layers: np.ndarray) -> np.ndarray:
    flawed = layers.copy()
    flawed[0, ..., :3] = 255 - layers[0, ..., :3]
    return flawed


_ANSWERS = [
    ("recomposition", cases.blank_with_missing, 0.02),
    ("unlike", _other_colours, 0.1),
    ("stained", _negative_background, 0.2),
    ("missing", cases.blank_with_missing, 0.02),
    ("noise", cases.noise_layer, 0.05),
    ("partial", cases.color_bleed, 0.2),
    ("misaligned", cases.halo, 0.3),
    ("unmatted", cases.all_in_background, 0.8),
    ("hole", _with_hole, 0.1),
    ("ghost", cases.ghost, 0.2),
    ("fill", cases.ghost, 0.2),
    ("unlifted", _faint_over_the_picture, 0.5),
    ("sheet", cases.composite_copies, 1.0),
    ("duplicate", cases.duplicate, 0.5),
    ("cut", cases.cut_in_two, 0.08),
    ("lumped", cases.all_in_one, 0.1),
    ("idle", cases.all_in_background, 0.8),
    ("smear", cases.smeared, 0.3),
    ("mixed", _halves_exchanged, 0.5),
    ("varied", cases.all_in_one, 0.1),
    ("astray", cases.all_in_background, 0.1),
    ("scattered", _with_specks, 0.02),
    ("truncated", _behind_cut_off, 0.1),
    ("buried", _swallowed, 0.8),
]


@pytest.mark.parametrize(("name", "flaw", "least"), _ANSWERS, ids=[a[0] for a in _ANSWERS])
def test_a_penalty_answers_to_its_flaw(name, flaw, least):
    change = getattr(_penalties(flaw(_CLEAN)), name) - getattr(_penalties(_CLEAN), name)
    assert change > least


def test_every_penalty_is_tested_and_small_on_a_clean_design():
    assert {name for name, *_ in _ANSWERS} == set(Penalties._fields)
    assert max(_penalties(_CLEAN)) < 0.05


def test_objects_and_background_answer_for_themselves():
    clean = _penalties(_CLEAN)
    assert _penalties(_negative_background(_CLEAN)).unlike < clean.unlike + 0.02
    assert _penalties(_other_colours(_CLEAN)).stained < clean.stained + 0.02


def test_penalties_are_continuous():
    flawed = cases.ghost(_CLEAN)
    nudged = flawed.copy()
    nudged[0, ..., :3] -= nudged[0, ..., :3] > 0
    for before, after in zip(_penalties(flawed), _penalties(nudged), strict=True):
        assert abs(before - after) < 0.02


def test_large_pictures_are_averaged_down():
    big = cases.design(256)
    source = imaging.recompose(big)
    request = rendering.candidate_request(source, big, _PROMPTS, RenderConfig())
    found = penalties(rendering.read_candidate(request))
    assert max(found) < 0.08
    seen = shrunk(rendering.read_candidate(request), 3)
    assert seen.alpha.shape == (3, 85, 85) and seen.source.shape == (85, 85, 3)
    np.testing.assert_allclose(
        seen.source[0, 0], (source[:3, :3] / 255).mean(axis=(0, 1)), atol=1e-5
    )
