"""The prompts of a run: encoded once, kept in the work directory, read batch by batch."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int32

from sl_jax.data import Example
from sl_jax.grpo.config import DataConfig
from sl_jax.inference.prompts import PromptStore
from sl_jax.inference.sampling import Guidance
from sl_jax.parallel.mesh import Layout, replicated
from sl_jax.parallel.processes import from_everywhere

_HELD = 64  # Prompts that stay in memory: a run without captions reads its only one once.


class PromptTable:
    """Hidden states of every prompt that a run can meet, encoded before training.

    They are on disk; memory holds the lengths, and what the last few batches needed.
    """

    def __init__(
        self,
        model: epath.PathLike,
        config: DataConfig,
        captions: Iterable[str],
        cache: epath.PathLike,
        dtype: str,
        negative: str | None = None,
    ):
        """Encodes what is not in `cache`; `negative` is what guidance leads away from, if any."""
        prompts = [config.prompt, *sorted({*captions} - {"", config.prompt})]
        store = PromptStore(model, cache, max_tokens=config.max_text_tokens, dtype=dtype)
        lengths = store.complete(prompts)
        self._read = functools.lru_cache(_HELD)(store.read)
        self._prompt = config.prompt
        self._width = max(lengths.values())  # of all batches, so that one program serves them
        self._padded = min(lengths.values()) < self._width
        self._negative = negative
        if negative is not None:
            store.complete([negative])

    def __call__(
        self, examples: Sequence[Example]
    ) -> tuple[Float[np.ndarray, "b s e"], Int32[np.ndarray, " b"] | None]:
        """Hidden states and lengths; lengths are None where no prompt of the run is padded."""
        rows = [self._read(example.caption or self._prompt) for example in examples]
        hidden = np.zeros((len(rows), self._width, rows[0].shape[1]), rows[0].dtype)
        for target, row in zip(hidden, rows, strict=True):
            target[: len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        return hidden, lengths if self._padded else None

    def guidance(self, scale: float, layout: Layout) -> Guidance | None:
        """Guidance away from the negative prompt, on all devices; None without one."""
        if self._negative is None:
            return None
        hidden, whole = self._read(self._negative), replicated(layout.mesh)
        return Guidance(
            from_everywhere(np.float32(scale), whole), from_everywhere(hidden[None], whole), None
        )
