"""The embedded judge: each flaw lowers its own criterion, and hacks do not pay."""

import asyncio
import json
import threading

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import spearmanr

from sl_jax import imaging
from sl_jax.data import procedural
from sl_jax.scoring import (
    CRITERIA,
    EmbeddedConfig,
    EmbeddedJudge,
    Group,
    JudgeConfig,
    JudgeRequest,
    PermanentJudgeError,
    RenderConfig,
    TwoStageJudge,
    cases,
    rubric,
)
from sl_jax.scoring import request as rendering

_PROMPTS = rubric.load_prompts()
_CASES = cases.built_cases()


def _scores(source, layers, config=None, render=None) -> np.ndarray:
    """The five criteria, 0…1, through the rendered request and the JSON answer."""
    request = rendering.candidate_request(source, layers, _PROMPTS, render or RenderConfig())
    answer = asyncio.run(EmbeddedJudge(config).answer(request))
    return rubric.parse_candidate(answer).scores()


def _judge(group, config=None, **settings):
    judge = TwoStageJudge(EmbeddedJudge(config), JudgeConfig(**settings))
    return asyncio.run(judge.judge(group))


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_each_flaw_lowers_its_own_criterion_most(case):
    change = _scores(case.source, case.flawed) - _scores(case.source, case.clean)
    if case.criterion is None:
        assert np.abs(change).max() < 0.01
        return
    assert CRITERIA[change.argmin()] == case.criterion
    assert change.min() < -0.25 and change.mean() < -0.05


def test_a_clean_design_scores_high():
    assert _scores(_CASES[0].source, _CASES[0].clean).min() > 0.9


@pytest.mark.parametrize("case", [c for c in _CASES if c.criterion], ids=lambda case: case.name)
def test_flaws_are_noticed_in_both_layouts_and_at_another_size(case):
    for render in (RenderConfig(layout="separate"), RenderConfig(picture_size=48)):
        change = _scores(case.source, case.flawed, render=render) - _scores(
            case.source, case.clean, render=render
        )
        assert change.mean() < -0.03


def test_the_grid_agrees_with_stage_1_when_precise():
    clean = cases.design()
    flawed = [flaw(clean) for name, (_, flaw) in cases.FLAWS.items()]
    stacks = [stack for stack in [clean, *flawed] if len(stack) == len(clean)]
    scores = _judge(Group("g", imaging.recompose(clean), tuple(stacks)))
    assert scores.two_stage
    np.testing.assert_allclose(scores.stage2, scores.stage1, atol=0.02)
    assert scores.reward.argmax() == 0


def _perturbed(layers: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """True layers made worse by degrees."""
    flat = imaging.recompose(layers).astype(np.float32) / 255
    p = imaging.premultiplied(layers)
    draw = np.random.default_rng(3)
    cover = imaging.over(layers[1:])[..., 3:]
    if kind == "soft mattes":
        for layer in p[1:]:
            layer[...] = ndimage.gaussian_filter(layer, (3 * strength, 3 * strength, 0))
    elif kind == "ghost":
        p[0, ..., :3] += strength * cover * (flat - p[0, ..., :3])
    elif kind == "noise":
        p += strength * 0.15 * draw.standard_normal(p.shape)
    elif kind == "blotches":
        blotches = ndimage.gaussian_filter(draw.standard_normal(p.shape), (0, 5, 5, 0))
        p += strength * 0.12 * blotches / blotches.std()
    elif kind == "fading":
        p[1:] *= 1 - strength
    elif kind == "smear":
        p[1], p[2] = (
            (1 - strength / 2) * p[1] + strength / 2 * p[2],
            (1 - strength / 2) * p[2] + strength / 2 * p[1],
        )
    elif kind == "composite":
        whole = np.concatenate([flat, np.ones_like(cover)], axis=-1)
        p[1] = (1 - strength) * p[1] + strength * whole
    elif kind == "grown mattes":
        reach = 1 + 2 * round(4 * strength)
        for layer in p[1:]:
            grown = ndimage.grey_dilation(layer[..., 3], size=(reach, reach))
            layer[..., :3] += (grown - layer[..., 3])[..., None] * flat
            layer[..., 3] = grown
    p = np.clip(p, 0, 1)
    color = np.minimum(1, p[..., :3] / np.maximum(p[..., 3:], 1 / 512))
    return imaging.to_uint8(np.concatenate([color, p[..., 3:]], axis=-1))


_KINDS = (
    "soft mattes",
    "ghost",
    "noise",
    "blotches",
    "fading",
    "smear",
    "composite",
    "grown mattes",
)


@pytest.mark.parametrize("kind", _KINDS)
def test_scores_rank_like_the_error_of_the_layers(kind):
    correlations, wins = [], 0
    for seed in range(4):
        design = procedural.make_design("A", 300 + seed, 64, 3)
        stacks = [_perturbed(design.layers, kind, s) for s in (0, 0.15, 0.35, 0.6, 0.9)]
        truth = imaging.premultiplied(design.layers)
        errors = [np.abs(imaging.premultiplied(stack) - truth).mean() for stack in stacks]
        scores = [_scores(design.flat, stack).mean() for stack in stacks]
        correlations.append(spearmanr(scores, -np.array(errors))[0])
        wins += int(np.argmax(scores) == 0)
    assert np.mean(correlations) > 0.85
    assert wins >= 3


def _hacks(layers: np.ndarray) -> dict[str, np.ndarray]:
    flat = imaging.recompose(layers)
    draw = np.random.default_rng(0)
    wrong = layers.copy()
    for layer in wrong[1:]:
        blobs = ndimage.gaussian_filter(draw.standard_normal(flat.shape[:2]), 5) > 0
        layer[..., :3], layer[..., 3] = flat, 255 * blobs
    blank = layers.copy()
    blank[1:] = 0
    one_blank = layers.copy()
    one_blank[1] = 0
    shrunk = layers.copy()
    for layer in shrunk[1:]:
        layer[..., 3] = ndimage.grey_erosion(layer[..., 3], size=(7, 7))
    shrunk_kept = shrunk.copy()
    shrunk_kept[0, ..., :3] = flat
    faint = layers.copy()
    faint[1:, ..., 3] //= 40
    faint[0, ..., :3] = flat
    grey = np.zeros_like(layers)
    grey[0] = (128, 128, 128, 255)
    return {
        "all in the background": cases.all_in_background(layers),
        "binary but wrong mattes": wrong,
        "blank objects": blank,
        "a blank object": one_blank,
        "composite everywhere": cases.composite_copies(layers),
        "shrunk objects": shrunk,
        "shrunk objects over the picture": shrunk_kept,
        "faint objects over the picture": faint,
        "nothing": grey,
    }


def test_hacks_score_below_the_truth_and_below_honest_mistakes():
    for seed in range(4):
        design = procedural.make_design("A", 400 + seed, 64, 3)
        honest = _perturbed(_perturbed(design.layers, "ghost", 0.3), "soft mattes", 0.25)
        bar = min(
            _scores(design.flat, honest).mean(), _scores(design.flat, design.layers).mean() - 0.05
        )
        for name, stack in _hacks(design.layers).items():
            assert _scores(design.flat, stack).mean() < bar, (name, seed)


def test_soft_shadows_are_no_fault():
    layers = cases.design()
    bare = layers.copy()
    bare[1:, ..., 3] = np.where(bare[1:, ..., 3] < 100, 0, bare[1:, ..., 3])
    with_shadows = _scores(imaging.recompose(layers), layers)
    without = _scores(imaging.recompose(bare), bare)
    assert np.abs(with_shadows - without).max() < 0.05


def test_vlm_mode_says_reproducible_integers_in_a_narrow_band():
    config = EmbeddedConfig(mode="vlm")
    spread, precise = [], []
    for case in _CASES[:6]:
        scores = 10 * _scores(case.source, case.flawed, config)
        np.testing.assert_array_equal(scores, np.rint(scores))
        np.testing.assert_array_equal(scores, 10 * _scores(case.source, case.flawed, config))
        spread.append(scores.mean())
        precise.append(10 * _scores(case.source, case.flawed).mean())
    assert np.std(spread) < 0.6 * np.std(precise)


def test_vlm_mode_squeezes_what_it_is_unsure_of_too():
    """round(squeeze(score + offset + noise)): squeezed to nothing, nothing else is left."""
    case = _CASES[0]
    for noise in (0.0, 3.0):
        config = EmbeddedConfig(mode="vlm", center=6.0, squeeze=0.0, noise=noise, picture_offset=2)
        np.testing.assert_array_equal(_scores(case.source, case.flawed, config), 0.6)
    noisy = EmbeddedConfig(mode="vlm", squeeze=1.0, noise=3.0, picture_offset=0)
    calm = EmbeddedConfig(mode="vlm", squeeze=1.0, noise=0, picture_offset=0)
    difference = [
        _scores(c.source, c.flawed, noisy) - _scores(c.source, c.flawed, calm) for c in _CASES
    ]
    assert 0.1 < np.std(difference) < 0.3


def test_vlm_mode_shifts_all_candidates_of_a_picture_alike():
    exact = EmbeddedConfig(mode="vlm", noise=0, picture_offset=0, squeeze=1)
    shifted = EmbeddedConfig(mode="vlm", noise=0, picture_offset=2.0, squeeze=1)
    case = _CASES[0]
    shifts = {
        float(change)
        for layers in (case.clean, case.flawed)
        for change in 10
        * (_scores(case.source, layers, shifted) - _scores(case.source, layers, exact))
        if change
    }
    assert len({np.sign(shift) for shift in shifts}) == 1


def test_vlm_grid_has_its_own_noise_and_a_position_bias():
    clean = cases.design()
    group = Group("g", imaging.recompose(clean), (cases.all_in_one(clean),) * 6)
    biased = EmbeddedConfig(mode="vlm", grid_noise=0, position_bias=20)
    scores = _judge(group, biased)
    order = scores.grid_scores[0][np.argsort(scores.permutations[0])]
    assert (np.diff(order) < 0).all() and order[0] - order[-1] == pytest.approx(0.2, abs=0.02)
    np.testing.assert_allclose(100 * order, np.rint(100 * order), rtol=1e-12)
    noisy = _judge(group, EmbeddedConfig(mode="vlm", grid_noise=8, position_bias=0))
    assert noisy.stage2.std() > 0.02
    np.testing.assert_array_equal(
        noisy.stage2,
        _judge(group, EmbeddedConfig(mode="vlm", grid_noise=8, position_bias=0)).stage2,
    )


def test_the_answer_depends_on_what_is_shown_alone():
    case = _CASES[0]
    request = rendering.candidate_request(case.source, case.clean, _PROMPTS, RenderConfig())
    again = JudgeRequest(1, request.parts, request.schema, repeat=3)
    for mode in ("precise", "vlm"):
        judge = EmbeddedJudge(EmbeddedConfig(mode=mode))
        assert asyncio.run(judge.answer(request)) == asyncio.run(judge.answer(again))
        assert set(json.loads(asyncio.run(judge.answer(request)))) == set(CRITERIA)


def test_odd_shapes_and_single_layers_are_judged():
    draw = np.random.default_rng(0)
    for shape in ((1, 17, 33, 4), (2, 31, 16, 4), (5, 150, 200, 4)):
        layers = draw.integers(0, 256, shape, np.uint8)
        layers[0, ..., 3] = 255
        scores = _scores(imaging.recompose(layers), layers)
        assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()


def test_a_request_that_cannot_be_read_is_refused_for_good():
    with pytest.raises(PermanentJudgeError, match="cannot read"):
        asyncio.run(EmbeddedJudge().answer(JudgeRequest(1, ("Hello.",), {})))
    with pytest.raises(ValueError, match="precise"):
        EmbeddedConfig(mode="loud")


def test_it_computes_beside_the_event_loop(monkeypatch):
    """Several answers at once, and the loop goes on meanwhile."""
    case = _CASES[0]
    group = Group("g", case.source, (case.clean, case.flawed))
    judge, together = EmbeddedJudge(), threading.Barrier(2)
    compute = judge._candidate
    monkeypatch.setattr(judge, "_candidate", lambda r: (together.wait(30), compute(r))[1])
    scores = asyncio.run(TwoStageJudge(judge, JudgeConfig(two_stage=False)).judge(group))
    assert scores.valid.all()
    np.testing.assert_array_equal(scores.criteria, _judge(group, two_stage=False).criteria)
