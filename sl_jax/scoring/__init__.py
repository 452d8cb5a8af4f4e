"""Scoring of decompositions by a judge. No accelerator framework is imported here."""

from sl_jax.scoring.judge import JudgeConfig, JudgeWorker, TwoStageJudge
from sl_jax.scoring.request import RenderConfig
from sl_jax.scoring.types import (
    CRITERIA,
    Answer,
    BrokenAnswerError,
    Endpoint,
    Failure,
    Group,
    GroupScores,
    JudgeError,
    JudgeRequest,
    PermanentJudgeError,
    TransientJudgeError,
)

__all__ = [
    "CRITERIA",
    "Answer",
    "BrokenAnswerError",
    "Endpoint",
    "Failure",
    "Group",
    "GroupScores",
    "JudgeConfig",
    "JudgeError",
    "JudgeRequest",
    "JudgeWorker",
    "PermanentJudgeError",
    "RenderConfig",
    "TransientJudgeError",
    "TwoStageJudge",
]
