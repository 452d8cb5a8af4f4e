"""Load once, use many times: prompts become hidden states, pictures become layers."""

from sl_jax.inference.prompts import (
    DEFAULT_PROMPT,
    PROMPT_TEMPLATE,
    PromptEmbeddings,
    encode_prompts,
    user_cache,
)

__all__ = [
    "DEFAULT_PROMPT",
    "PROMPT_TEMPLATE",
    "PromptEmbeddings",
    "encode_prompts",
    "user_cache",
]
