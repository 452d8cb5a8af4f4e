"""The share of a group's spread that the window's noise explains, in scores made to have one."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged import judged

from sl_jax.data import EvalSet, make_buckets, scan_folder, write_designs
from sl_jax.grpo.config import EvaluationConfig, JudgeSettings
from sl_jax.grpo.evaluation import Evaluator
from sl_jax.grpo.judging import Judging
from sl_jax.grpo.phases import Work
from sl_jax.grpo.rollout import Decoded
from sl_jax.grpo.spread import window_share
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.scoring import JudgeWorker, Rewards

CANDIDATES = 3


def _scores(initial, window, pictures=4000, draws=2, candidates=8):
    draw = np.random.default_rng(0)
    return (
        draw.normal(size=(pictures, 1, 1))
        + initial * draw.normal(size=(pictures, draws, 1))
        + window * draw.normal(size=(pictures, draws, candidates))
    )


@pytest.mark.parametrize(("initial", "window"), [(1.0, 1.0), (0.2, 0.6), (3.0, 1.0), (0.0, 1.0)])
def test_the_share_is_that_of_the_variances(initial, window):
    """Whatever the pictures' own level, the number of draws and of candidates."""
    wanted = window**2 / (initial**2 + window**2)
    for shape in ({}, {"draws": 5, "candidates": 3}):
        assert window_share(_scores(initial, window, **shape)) == pytest.approx(wanted, abs=0.03)


def test_scores_that_do_not_spread_have_no_share():
    assert window_share(_scores(1.0, 0.0)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(window_share(np.ones((3, 2, 4))))
    scores = _scores(1.0, 1.0, pictures=5)
    spoiled = np.concatenate([scores, scores[:1]])
    spoiled[-1, 1, 3] = np.nan
    assert window_share(spoiled) == window_share(scores)
    assert math.isnan(window_share(spoiled[-1:]))


class Sampler:
    """Candidates of one grey, drawn from the group's key and, around that, from their number."""

    group_size = CANDIDATES

    def __init__(self, spoiled=()):
        self.drawn, self._spoiled = [], spoiled

    @property
    def with_shared_noise(self):
        return self

    def __call__(self, adapter, pictures, window_start, grid):
        assert (adapter, window_start) == ("adapter", 1)
        words = np.asarray(jax.random.key_data(pictures.keys)).sum(axis=1)
        initial = 80 + words % 80
        grey = initial[:, None] + np.arange(CANDIDATES) * (1 + words % 7)[:, None]
        self.drawn.append(grey)
        finite = np.ones(grey.size, bool)
        finite[list(self._spoiled)] = False
        return SimpleNamespace(latents=grey.astype(np.uint8).ravel(), finite=finite)

    def work(self, candidates, window_start, grid):
        return Work(2.0, 3.0, candidates.latents.size)

    def decode(self, latents, grid):
        layers = np.broadcast_to(latents[:, None, None, None, None], (len(latents), 2, 32, 32, 4))
        return Decoded(jnp.asarray(layers), np.ones(len(latents), bool))


class Judge:
    """Scores candidates by their grey."""

    endpoint = None

    async def judge(self, group):
        grey = [layers.mean() / 255 for layers in group.candidates]
        return judged(grey, group_id=group.group_id)


@pytest.fixture
def evaluator(tmp_path):
    """Of five pictures."""
    write_designs(tmp_path, "A", range(5), 32, 2)
    index = scan_folder(tmp_path, make_buckets([(32, 32)]))
    with JudgeWorker(Judge()) as worker:
        yield Evaluator(
            *(None, EvalSet(index, layers=(2,)), lambda e: (np.zeros((len(e), 1, 4)), None)),
            Judging(worker, Rewards((("judge", 1.0),)), JudgeSettings()),
            *(EvaluationConfig(window_share=True), None),
            Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
        )


def test_the_evaluator_draws_every_picture_twice_and_compares_all_candidates(evaluator):
    sampler, work = Sampler(), []
    share = evaluator.window_share(sampler, "adapter", 1, 8, work.append)
    assert work == [Work(2.0, 3.0, 8 * CANDIDATES)] * 2
    first, second = (grey[:5] for grey in sampler.drawn)  # of eight rows three are blank
    assert not np.any(first == second)
    assert share == pytest.approx(window_share(np.stack([first, second], axis=1) / 255), rel=1e-6)
    assert 0 < share < 1


def test_candidates_that_are_not_finite_have_no_score(evaluator):
    """Whatever the judge saw in their zeros: candidate 1 of picture 2, and 0 of picture 4."""
    sampler = Sampler(spoiled=(2 * CANDIDATES + 1, 4 * CANDIDATES))
    share = evaluator.window_share(sampler, "adapter", 1, groups=8)
    whole = np.stack([grey[[0, 1, 3]] for grey in sampler.drawn], axis=1)
    assert share == pytest.approx(window_share(whole / 255), rel=1e-6)
    rolled = evaluator.rolled_out(sampler, "adapter", 1, groups=8)
    assert np.isnan([entry.reward for entry in rolled]).tolist() == [False] * 4 + [True]
