"""Whether a run is well: updates that are not finite, rewards without spread, a policy that drifts.

What is wrong is counted, said with advice, and where it goes on stops the run.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from sl_jax.grpo.advantages import Advantages
from sl_jax.grpo.config import HealthConfig
from sl_jax.grpo.spoiled import FOLDER
from sl_jax.training.health import NotFiniteError

_log = logging.getLogger(__name__)

IN_A_ROW = "learner/not_finite_in_a_row"
_DRIFT = {
    "kl": ("learner/kl_old/all", "The KL per latent scalar from the policy that rolled out"),
    "clip_fraction": ("learner/clip_fraction/all", "The share of samples beyond the clip range"),
}


class Health:
    """What of a run's past its health depends on; part of its checkpoints."""

    def __init__(self, config: HealthConfig):
        self._config = config
        self._not_finite = self._tied = 0  # updates, epochs, in a row
        self._longest = 0  # updates in a row that were not finite, some of them of the last epoch
        self._drifting: set[str] = set()

    def position(self) -> dict[str, int]:
        """For a checkpoint: the same in all processes."""
        return {"not_finite": self._not_finite, "tied": self._tied}

    def restore(self, position: Mapping[str, int]) -> None:
        """Goes on from what `position` gave."""
        self._not_finite = position.get("not_finite", 0)
        self._tied = position.get("tied", 0)

    def look(
        self, updates: Sequence[bool | None], advantages: Sequence[Advantages]
    ) -> dict[str, float]:
        """Takes an epoch into account; returns metrics.

        What is not finite is counted over epochs, up to the worst of this one: that a good update
        follows does not undo it.

        Args:
            updates: whether each was finite; None where there was nothing to update by.
            advantages: of each.
        """
        self._longest = 0
        for finite in updates:
            if finite is not None:
                self._not_finite = 0 if finite else self._not_finite + 1
                self._longest = max(self._longest, self._not_finite)
        effective, tied = (
            sum(getattr(a, name) for a in advantages)
            for name in ("effective_groups", "tied_groups")
        )
        self._tied = self._tied + 1 if tied and not effective else 0
        in_a_row = max(self._longest, self._not_finite)
        return {IN_A_ROW: in_a_row, "advantage/tied_epochs_in_a_row": self._tied}

    def warn(self, metrics: Mapping[str, float]) -> None:
        """Says what is wrong when it begins to be, with advice."""
        if self._tied == self._config.tied_epochs:
            _log.warning(
                "For %d epochs no group's rewards have differed: nothing is learned. Please look "
                "at judge/reward_spread and the records of the judge; a judge with finer scores "
                "(python -m sl_jax.judge --audit), more rollout.noise_level, or an earlier "
                "checkpoint, if the candidates have become the same, may help.",
                self._tied,
            )
        for name, (metric, told) in _DRIFT.items():
            value, bound = metrics.get(metric, np.nan), getattr(self._config, name)
            if value > bound and name not in self._drifting:
                _log.warning(
                    "%s is %.2g, more than config.health.%s = %g: the policy leaves what it "
                    "learns from within an epoch. Please use a lower optimizer.learning_rate, "
                    "fewer learner.updates, or bounds (learner.stop).",
                    *(told, value, name, bound),
                )
                self._drifting.add(name)
            elif value <= bound:
                self._drifting.discard(name)

    def require(self) -> None:
        """Ends a run that does not recover.

        Started again, it goes on counting where it stopped. If the last update was not finite, the
        next one decides: not finite either, it stops the run again. If a finite one came last, it
        takes as many as it took before. An epoch that updated nothing stops nothing.

        Raises:
            NotFiniteError: this many updates in a row were not finite, some of the last epoch's
                among them.
        """
        if self._longest >= self._config.not_finite:
            raise NotFiniteError(
                f"{self._longest} updates in a row were not finite and were skipped; samples of "
                f"them are in {FOLDER} in the work directory. The run stops with a checkpoint. "
                "Please look at them, and start another run from an earlier checkpoint's adapter "
                "(config.init_adapter) with a lower optimizer.learning_rate; started again as it "
                "is, this one goes on"
            )
