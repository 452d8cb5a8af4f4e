"""What an epoch spends its time on, and how much of the accelerators' peak it gets for it."""

import time

from tqdm import tqdm


class Phases:
    """Shows the phase in the progress bar; sums up seconds and operations of each."""

    def __init__(self, progress: tqdm, peak: float | None = None):
        """Begins with no phase.

        Args:
            progress: a bar of epochs.
            peak: FLOP/s of all devices together, where they are known.
        """
        self._progress, self._peak = progress, peak
        self._seconds: dict[str, float] = {}
        self._flops: dict[str, float] = {}
        self._current: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """Ends the current phase and begins another."""
        now = time.monotonic()
        if self._current:
            before, since = self._current
            self._seconds[before] = self._seconds.get(before, 0.0) + now - since
        self._current = (name, now)
        self.say(name)

    def say(self, text: str) -> None:
        """Shows a text beside the epoch."""
        epoch = min(self._progress.n + 1, self._progress.total)  # what follows belongs to the last
        self._progress.set_description(f"epoch {epoch} · {text}")

    def computed(self, flops: float) -> None:
        """Counts operations of all devices to the current phase."""
        name, _ = self._current
        self._flops[name] = self._flops.get(name, 0.0) + flops

    def finish(self) -> dict[str, float]:
        """Seconds of each phase since the last call, its share in all of them, its rate.

        `device/tflops` is 10¹² useful operations per second, and `device/mfu` their share of the
        peak (model FLOPs utilisation): those of the transformer that the algorithm asks for,
        without what is computed a second time to save memory. `…/all` is about all phases together.
        """
        self.begin("done")
        self._current = None
        seconds, flops, self._seconds, self._flops = self._seconds, self._flops, {}, {}
        total = sum(seconds.values())
        found = {f"seconds/{name}": value for name, value in seconds.items()}
        found |= {"seconds/all": total}
        found |= {f"share/{name}": value / total for name, value in seconds.items() if total}
        if flops and total:
            times = {**{name: seconds[name] for name in flops}, "all": total}
            rates = {
                name: flops.get(name, sum(flops.values())) / spent for name, spent in times.items()
            }
            found |= {f"device/tflops/{name}": rate / 1e12 for name, rate in rates.items()}
            if self._peak:
                found |= {f"device/mfu/{name}": rate / self._peak for name, rate in rates.items()}
        return found
