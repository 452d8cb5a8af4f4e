"""The prompts of a run: encoded once, kept in the work directory, read batch by batch."""

from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int32

from sl_jax.data import Example
from sl_jax.grpo.config import DataConfig
from sl_jax.inference.prompts import PromptBatches, PromptStore
from sl_jax.inference.sampling import Guidance
from sl_jax.parallel.mesh import Layout, replicated
from sl_jax.parallel.processes import from_everywhere


class PromptTable:
    """Hidden states of every prompt that a run can meet, encoded before training.

    They are on disk, see `inference.prompts.PromptBatches`.
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
        self._batches = PromptBatches(store, prompts)
        self._prompt = config.prompt
        self._negative = None
        if negative is not None:
            store.complete([negative])
            self._negative = store.read(negative)

    def __call__(
        self, examples: Sequence[Example]
    ) -> tuple[Float[np.ndarray, "b s e"], Int32[np.ndarray, " b"] | None]:
        """Hidden states and lengths; lengths are None where no prompt of the run is padded."""
        prompts = [example.caption or self._prompt for example in examples]
        hidden, lengths = self._batches(prompts)
        return hidden, lengths if self._batches.padded else None

    def guidance(self, scale: float, layout: Layout) -> Guidance | None:
        """Guidance away from the negative prompt, on all devices; None without one."""
        if self._negative is None:
            return None
        whole = replicated(layout.mesh)
        text = from_everywhere(self._negative[None], whole)
        return Guidance(from_everywhere(np.float32(scale), whole), text, None)
