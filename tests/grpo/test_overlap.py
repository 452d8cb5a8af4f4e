"""What runs at the same time: judging beside rolling out, and beside learning."""

import asyncio
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged import judged
from small_run import CANDIDATES, Phases, Rollout

from sl_jax.data import TrainStream, make_buckets, scan_folder, write_designs
from sl_jax.grpo import epoch
from sl_jax.grpo.config import GrpoConfig, JudgeSettings, LearnerConfig, RolloutConfig
from sl_jax.grpo.judging import Judging
from sl_jax.grpo.learner import UpdateReport
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.parallel.processes import Processes
from sl_jax.scoring import JudgeWorker, Rewards

BATCHES, LIMIT = 4, 30  # seconds


class Judge:
    """Answers about a rollout batch when it is told to."""

    endpoint = None

    def __init__(self):
        self.may_answer = [threading.Event() for _ in range(BATCHES)]
        self.answered = [threading.Event() for _ in range(BATCHES)]

    async def judge(self, group):
        batch = int(group.group_id.split(".")[0])
        allowed = await asyncio.to_thread(self.may_answer[batch].wait, LIMIT)
        assert allowed, "what the judge waits for never happened"
        self.answered[batch].set()
        return judged(np.arange(CANDIDATES) / CANDIDATES, group_id=group.group_id)


class WatchedRollout(Rollout):
    """Lets the judge answer about the batch before, and waits until it has."""

    def __init__(self, judge):
        self._judge = judge

    def __call__(self, *args):
        if self.calls:
            before = self.calls - 1
            if before < BATCHES // 2:  # the later ones are for the learner
                self._judge.may_answer[before].set()
                assert self._judge.answered[before].wait(LIMIT)
        return super().__call__(*args)

    def table(self, grid):
        return None


class WatchedLearner:
    """Lets the judge answer about the second half of the epoch when the first half is learned."""

    def __init__(self, judge):
        self._judge, self.updates = judge, 0

    def update(self, state, scored, old, kl_left, **how):
        assert len(scored) == BATCHES // 2
        if self.updates == 0:
            for batch in range(BATCHES // 2, BATCHES):
                assert not self._judge.answered[batch].is_set()
                self._judge.may_answer[batch].set()
        self.updates += 1
        return state, UpdateReport([], [], None)

    def work(self, scored, old):
        return 1.0


@pytest.fixture
def run(tmp_path):
    write_designs(tmp_path / "pictures", "A", range(9), 32, 2)
    index = scan_folder(tmp_path / "pictures", make_buckets([(32, 32)]))
    judge = Judge()
    rollout = RolloutConfig(groups=4 * BATCHES, batch_groups=4, group_size=CANDIDATES)
    with JudgeWorker(judge) as worker:
        yield SimpleNamespace(
            config=GrpoConfig("", "", 1, rollout=rollout, learner=LearnerConfig(updates=2)),
            stream=TrainStream(index, groups=4, layers=(2,), threads=0),
            rollout=WatchedRollout(judge),
            learner=WatchedLearner(judge),
            prompts=lambda examples: (np.zeros((len(examples), 1, 4)), None),
            judging=Judging(worker, Rewards((("judge", 1.0),)), JudgeSettings(max_wait=0.0)),
            judge=judge,
            layout=Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
            processes=Processes(),
        )


def test_groups_are_judged_while_others_roll_out_and_while_the_first_are_learned(run):
    """Every step waits for what it must not wait for: one after another would end in an error."""
    run.judge.may_answer[BATCHES // 2 - 1].set()
    adapter = SimpleNamespace(lora={"a": jnp.ones(2)})
    state = SimpleNamespace(adapter=adapter, updates=jnp.int32(0), skipped=jnp.int32(0))
    _, metrics = epoch.Epochs(run).run(state, 0, Phases())
    assert run.rollout.calls == BATCHES and run.learner.updates == 2
    assert metrics["judge/groups"] == 4 * BATCHES and metrics["judge/valid_share"] == 1
