"""The prompts of a run as one table of hidden states."""

from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from sl_jax.data import Example
from sl_jax.grpo.config import DataConfig
from sl_jax.inference.prompts import encode_prompts


class PromptTable:
    """Hidden states of every prompt that a run can meet, encoded once before training."""

    def __init__(
        self,
        model: epath.PathLike,
        config: DataConfig,
        captions: Iterable[str],
        cache: epath.PathLike,
        dtype: str,
    ):
        used = {c for c in captions if c} if config.captions else set()
        prompts = [config.prompt, *sorted(used - {config.prompt})]
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._captions = config.captions
        encoded = encode_prompts(
            model, prompts, max_tokens=config.max_text_tokens, cache_dir=cache, dtype=dtype
        )
        self._hidden = encoded.hidden
        self._lengths = encoded.lengths
        self._padded = bool(np.any(encoded.lengths != encoded.hidden.shape[1]))

    def __call__(
        self, examples: Sequence[Example]
    ) -> tuple[Float[np.ndarray, "b s e"], Int[np.ndarray, " b"] | None]:
        """Hidden states and lengths; lengths are None where no prompt of the run is padded."""
        rows = [
            self._rows[example.caption] if self._captions and example.caption else 0
            for example in examples
        ]
        return self._hidden[rows], self._lengths[rows] if self._padded else None
