"""What an epoch spends its time on, and how much of the accelerators' peak it gets for it."""

import time
from typing import NamedTuple

from tqdm import tqdm

from sl_jax.training.status import UNWATCHED, Unwatched


class Work(NamedTuple):
    """What a phase computed, on all devices together.

    Attributes:
        flops: operations of the transformer that the algorithm asks for.
        tokens: that the transformer read, padding included, once for each velocity.
        candidates: that were sampled, those of held-out pictures included.
    """

    flops: float
    tokens: float = 0.0
    candidates: int = 0


class Phases:
    """Shows the phase in progress bar and status; sums up seconds and work of each."""

    def __init__(self, progress: tqdm, peak: float | None = None, status: Unwatched = UNWATCHED):
        """Begins with no phase.

        Args:
            progress: a bar of epochs.
            peak: FLOP/s of all devices together, where they are known.
            status: is told of every phase.
        """
        self._progress, self._peak, self._status = progress, peak, status
        self._seconds: dict[str, float] = {}
        self._work: dict[str, Work] = {}
        self._current: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """Ends the current phase and begins another."""
        self._end()
        self._current = (name, time.monotonic())
        self._say(name)
        self._status.begin(name)

    def wait(self, reason: str) -> None:
        """Shows that the current phase waits, and why; with an empty reason, that it does not."""
        name, _ = self._current
        self._say(reason or name)
        self._status.wait(reason)

    def computed(self, work: Work) -> None:
        """Counts work to the current phase."""
        name, _ = self._current
        before = self._work.get(name, Work(0.0))
        self._work[name] = Work(*(sum(parts) for parts in zip(before, work, strict=True)))

    def finish(self) -> dict[str, float]:
        """Seconds of each phase since the last call, its share in all of them, its rate.

        `device/tflops` is 10¹² useful operations per second, and `device/mfu` their share of the
        peak (model FLOPs utilisation): those of the transformer that the algorithm asks for,
        without what is computed a second time to save memory. `device/tokens_per_second` and
        `device/candidates_per_second` count as `Work` does. `…/all` is about all phases together.
        """
        self._end()
        self._current = None
        seconds, work, self._seconds, self._work = self._seconds, self._work, {}, {}
        total = sum(seconds.values())
        found = {f"seconds/{name}": value for name, value in seconds.items()}
        found |= {"seconds/all": total}
        found |= {f"share/{name}": value / total for name, value in seconds.items() if total}
        if not work or not total:
            return found
        times = {**{name: seconds[name] for name in work}, "all": total}
        work["all"] = Work(*(sum(parts) for parts in zip(*work.values(), strict=True)))
        for name, spent in times.items():
            rate = Work(*(amount / spent for amount in work[name]))
            found[f"device/tflops/{name}"] = rate.flops / 1e12
            if self._peak:
                found[f"device/mfu/{name}"] = rate.flops / self._peak
            for what in ("tokens", "candidates"):
                if value := getattr(rate, what):
                    found[f"device/{what}_per_second/{name}"] = value
        return found

    def _end(self) -> None:
        if self._current:
            name, since = self._current
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - since

    def _say(self, text: str) -> None:
        epoch = min(self._progress.n + 1, self._progress.total)  # what follows belongs to the last
        self._progress.set_description(f"epoch {epoch} · {text}")
