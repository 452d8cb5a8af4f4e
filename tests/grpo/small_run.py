"""Parts of a run of which only the stream, the judging's pool and its records are real."""

from contextlib import contextmanager
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from judged import judged

from sl_jax.data import TrainStream, make_buckets, scan_folder, write_designs
from sl_jax.grpo.config import GrpoConfig, JudgeSettings, RolloutConfig
from sl_jax.grpo.judging import Judging
from sl_jax.grpo.rollout import Decoded
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.parallel.processes import Processes
from sl_jax.scoring import Failure, JudgeWorker, Rewards
from sl_jax.scoring.records import JudgeRecords

CANDIDATES, GROUPS = 2, 4


class Judge:
    """Scores candidates by their number, and refuses some pictures.

    Attributes:
        refused: picture ids.
        asked: names of the groups, in the order of asking.
    """

    endpoint = None

    def __init__(self):
        self.refused, self.asked = set(), []

    async def judge(self, group):
        self.asked.append(group.group_id)
        picture_id = group.group_id.split(".")[-1]
        failure = Failure(True, "I cannot help") if picture_id in self.refused else None
        reward = np.full(CANDIDATES, np.nan) if failure else np.arange(CANDIDATES) / CANDIDATES
        return judged(reward, group_id=group.group_id, failures=(failure,) * len(reward))


class Rollout:
    """Candidates are the picture itself; counts how often it was called."""

    calls = 0
    finite = np.ones(GROUPS, bool)

    def __call__(self, adapter, pictures, start, grid):
        self.calls += 1
        finite = np.repeat(self.finite, CANDIDATES)
        return SimpleNamespace(latents=pictures.pixels, finite=finite)

    def work(self, candidates, start, grid):
        return 1.0

    def decode(self, latents, grid):
        latents = np.asarray(latents)
        alpha = np.full((*latents.shape[:3], 1), 255, np.uint8)
        layers = np.concatenate([latents, alpha], axis=-1)
        stacks = jnp.asarray(np.repeat(np.stack([layers, layers], axis=1), CANDIDATES, axis=0))
        return Decoded(stacks, np.ones(len(stacks), bool))


class Phases:
    def begin(self, name):
        pass

    def wait(self, reason):
        pass

    def computed(self, work):
        pass


@contextmanager
def opened(folder):
    """Parts of a run of one rollout batch per epoch, and its judge."""
    write_designs(folder / "pictures", "A", range(7), 32, 2)
    index = scan_folder(folder / "pictures", make_buckets([(32, 32)]))
    judge = Judge()
    with JudgeWorker(judge) as worker:
        judging = Judging(
            worker,
            Rewards((("judge", 1.0),)),
            JudgeSettings(min_valid=1.0, max_wait=0.0),
            JudgeRecords(folder / "judge", pictures=0),
        )
        yield SimpleNamespace(
            config=GrpoConfig("", "", 1, rollout=RolloutConfig(batch_groups=GROUPS)),
            stream=TrainStream(index, groups=GROUPS, layers=(2,), threads=0),
            rollout=Rollout(),
            prompts=lambda examples: (np.zeros((len(examples), 1, 4)), None),
            judging=judging,
            judge=judge,
            records=folder / "judge",
            layout=Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
            processes=Processes(),
        )
