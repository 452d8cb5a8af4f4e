"""The prompts of a run: encoded once, kept in the work directory, read batch by batch."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int32

from sl_jax.data import Example
from sl_jax.grpo.config import DataConfig
from sl_jax.inference.prompts import PromptStore

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
    ):
        prompts = [config.prompt, *sorted({*captions} - {"", config.prompt})]
        store = PromptStore(model, cache, max_tokens=config.max_text_tokens, dtype=dtype)
        lengths = store.complete(prompts)
        self._read = functools.lru_cache(_HELD)(store.read)
        self._prompt = config.prompt
        self._width = max(lengths.values())  # of all batches, so that one program serves them
        self._padded = min(lengths.values()) < self._width

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
