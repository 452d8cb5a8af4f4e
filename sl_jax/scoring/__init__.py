"""Scoring of decompositions by a judge. No accelerator framework is imported here."""

from sl_jax.scoring.embedded import EmbeddedConfig, EmbeddedJudge
from sl_jax.scoring.judge import JudgeConfig, JudgeWorker, TwoStageJudge
from sl_jax.scoring.request import RenderConfig
from sl_jax.scoring.rewards import Reward, Rewards
from sl_jax.scoring.stats import JudgeStats, summarize
from sl_jax.scoring.types import (
    CRITERIA,
    Answer,
    BrokenAnswerError,
    BudgetError,
    Call,
    Endpoint,
    EndpointError,
    Failure,
    Group,
    GroupScores,
    JudgeError,
    JudgeRequest,
    NoJudgeError,
    PermanentJudgeError,
    TransientJudgeError,
)

__all__ = [
    "CRITERIA",
    "Answer",
    "BrokenAnswerError",
    "BudgetError",
    "Call",
    "EmbeddedConfig",
    "EmbeddedJudge",
    "Endpoint",
    "EndpointError",
    "Failure",
    "Group",
    "GroupScores",
    "JudgeConfig",
    "JudgeError",
    "JudgeRequest",
    "JudgeStats",
    "JudgeWorker",
    "NoJudgeError",
    "PermanentJudgeError",
    "RenderConfig",
    "Reward",
    "Rewards",
    "TransientJudgeError",
    "TwoStageJudge",
    "summarize",
]
