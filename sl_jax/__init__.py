"""Stable-Layers on JAX: fine-tunes layer decomposition from a vision-language judge.

Names are imported when they are used, so that parts of the package run without JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {"Decomposer": "sl_jax.inference.decomposer"}
__all__ = ["Decomposer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
