"""What a run of training by reward is made of."""

from typing import NamedTuple

from etils import epath

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.data import TrainStream
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.evaluation import Evaluator
from sl_jax.grpo.judging import Judging
from sl_jax.grpo.learner import Learner
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.rollout import Rollout
from sl_jax.parallel.mesh import Layout
from sl_jax.parallel.processes import Processes
from sl_jax.training.profiling import Profiler
from sl_jax.training.status import UNWATCHED, Unwatched


class Parts(NamedTuple):
    """What a run is made of; the door builds them.

    Attributes:
        folder: the work directory, which all processes share.
        layout: how batches are split over devices.
        processes: of the run.
        profiler: traces the epochs that it was told of.
        status: is told how the run stands.
    """

    config: GrpoConfig
    folder: epath.Path
    stream: TrainStream
    prompts: PromptTable
    rollout: Rollout
    judging: Judging
    learner: Learner
    evaluator: Evaluator
    checkpoints: RunCheckpoints
    layout: Layout
    processes: Processes
    profiler: Profiler
    status: Unwatched = UNWATCHED
