"""What a run prints: its own messages, above its progress bars; of libraries, warnings only."""

import logging
import os
import sys

from absl import logging as absl_logging
from tqdm import tqdm


class _AboveBars(logging.Handler):
    """Prints so that progress bars stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


def set_up_logging() -> None:
    """Shows messages of sl_jax from level INFO, of everything else from WARNING."""
    # transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = _AboveBars()
    handler.setFormatter(_Format())
    own = logging.getLogger("sl_jax")
    own.handlers = [handler]
    own.setLevel(logging.INFO)
    own.propagate = False
