"""Stable-Layers on JAX: fine-tunes layer decomposition from a vision-language judge.

Names are imported when they are used, so that parts of the package run without JAX.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {"Decomposer": "sl_jax.inference.decomposer"}
__all__ = ["Decomposer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _begin_command() -> None:
    """What `python -m sl_jax.COMMAND` can say before its imports, which take seconds, are done."""
    if "--version" in sys.argv:
        print(f"sl_jax {__version__}")
        sys.exit()
    sys.excepthook = _in_a_line


def _in_a_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For `sys.excepthook`: what a user can do something about without a traceback."""
    if isinstance(error, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("sl_jax"):
        print(
            f"{error.name} is not installed; please install sl_jax with the extra for this host: "
            "pip install 'sl_jax[cpu]', or cuda, or tpu; or judge, for one that only judges",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # until Python knows the command's file
    _begin_command()
