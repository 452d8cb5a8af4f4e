"""What makes a run of training by reward itself; the rest may change when it is started again."""

from collections.abc import Mapping
from typing import Any

from sl_jax.training.workdir import Identity

# A run may be prolonged, moved to other machines, and watched differently without becoming another.
_FREE = frozenset(
    {
        *("workdir", "epochs", "checkpoint", "evaluation", "mesh", "learner.micro_batch"),
        *("distributed", "health", "log"),
        *("compute.attention", "compute.remat", "compute.cache"),
        *(
            "judge.concurrency",
            "judge.max_wait",
            "judge.model",
            "judge.key_env",
            "judge.tries",
            "judge.patience",
            "judge.hedge_after",
        ),
        *("judge.cool_down", "judge.max_requests", "judge.max_tokens", "judge.cache"),
        *("judge.cache_path", "judge.preflight", "judge.recorded_pictures"),
        "judge.request.timeout",
    }
)
# What each process of a run may have of its own.
_OWN = frozenset(
    {
        *(
            "compute.cache",
            "distributed",
            "judge.cache",
            "judge.cache_path",
            "judge.concurrency",
            "judge.cool_down",
        ),
        *("judge.hedge_after", "judge.key_env", "judge.model", "judge.patience"),
        *("judge.preflight", "judge.request.timeout", "judge.tries"),
    }
)


def _told(content: Any) -> Any:
    """The content, in which judging models stand for their servers: those may come and go."""
    match content:
        case {"judge": {"endpoints": [*entries]} as judge} if all(map(_is_server, entries)):
            models = sorted({entry["model"] for entry in entries})
            return {**content, "judge": {**judge, "endpoints": {"model": models}}}
    return content


def _is_server(entry: Any) -> bool:
    """Whether it is one, rather than what somebody wrote in its place."""
    return isinstance(entry, Mapping) and isinstance(entry.get("model"), str)


IDENTITY = Identity(_FREE, _OWN, _told)
