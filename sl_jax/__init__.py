"""Stable-Layers on JAX: fine-tunes layer decomposition from a vision-language judge.

Names are imported when they are used, so that parts of the package run without JAX.
"""

import importlib
import signal
import sys
from types import FrameType
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
    from sl_jax.parallel.interrupts import send_again

    sys.excepthook, sys.unraisablehook = _in_a_line, send_again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background
        signal.signal(signal.SIGINT, _stop)


def _imports_are_done() -> bool:
    return hasattr(sys.modules["__main__"], "main")


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C. Compiled modules do not bear an exception while they are imported."""
    if _imports_are_done():
        raise KeyboardInterrupt
    from sl_jax.parallel.interrupts import STOPPED, end_now

    end_now("Stopped.", STOPPED)


def _in_a_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For `sys.excepthook`: what a user can do something about, in a line."""
    if isinstance(error, KeyboardInterrupt):
        from sl_jax.parallel.interrupts import ignore_more

        ignore_more()
        print("\nStopped.", file=sys.stderr)
    elif _imports_are_done():  # and the command's own begins
        sys.excepthook = sys.__excepthook__
        sys.excepthook(kind, error, trace)
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("sl_jax"):
        print(
            f"{error.name} is not installed; please install sl_jax with the extra for this host, "
            "from its repository: pip install '.[cpu]', or cuda, tpu, or judge, which only judges",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


def _is_command() -> bool:
    """Whether Python was started by `-m sl_jax.COMMAND`, and has not come to its file yet."""
    if sys.argv[:1] != ["-m"]:  # and, after it, what follows the module's name
        return False
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith("sl_jax.")


if _is_command():
    _begin_command()
