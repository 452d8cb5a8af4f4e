"""Rewards of the reproduction's controls."""

import hashlib

import numpy as np
from jaxtyping import Float

from sl_jax.scoring import Group, GroupScores


def shuffled(group: Group, scores: GroupScores) -> Float[np.ndarray, " g"]:
    """The judge's rewards, dealt out anew within the group: equal spread, and no information.

    The order follows from the group's name, so that a run that goes on repeats it. What training
    with these still improves, the judge is not the cause of.
    """
    digest = hashlib.sha256(group.group_id.encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, "<u8"))
    return generator.permutation(scores.reward)
