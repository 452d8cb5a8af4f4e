"""Checkpoints of a run, by Orbax: asynchronous, atomic, the last n kept."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sl_jax.checkpoints.huggingface import CheckpointError

_log = logging.getLogger(__name__)


class RunCheckpoints:
    """The numbered checkpoints of one work directory.

    Every checkpoint holds one pytree of arrays and a small JSON object (positions, counters).
    Saving returns at once and is finished in the background; a step appears when it is whole.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.directory = epath.Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, record: Mapping[str, Any] | None = None) -> None:
        """Starts saving `tree` and `record` as `step`; a step that exists is left as it is."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(dict(record or {}))
            ),
        )

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Step, tree and record of the newest checkpoint that can be read, or of `step`.

        Damaged checkpoints that are newer are passed over with an error in the log, and set aside
        as `damaged-STEP`, so that those steps can be saved again.

        Args:
            like: a tree with the shapes, dtypes and shardings to restore to.

        Raises:
            CheckpointError: there is no readable checkpoint.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = [step] if step is not None else sorted(self._manager.all_steps(), reverse=True)
        for number in steps:
            try:
                found = self._manager.restore(
                    number,
                    args=ocp.args.Composite(
                        tree=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
                    ),
                )
            except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
                _log.error(
                    "Checkpoint %s of %s is damaged and is passed over: %s",
                    number,
                    self.directory,
                    error,
                )
                continue
            self._set_aside([damaged for damaged in steps if damaged > number])
            return number, found["tree"], found["record"]
        raise CheckpointError(
            f"{self.directory} holds no readable checkpoint among {steps}; please restore one from "
            "a copy, or delete the folder to begin anew"
        )

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            aside = self.directory / f"damaged-{step}"
            if aside.exists():
                aside.rmtree()
            (self.directory / str(step)).rename(aside)
        if steps:
            self._manager.reload()

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saving and lets go of the directory."""
        self._manager.close()
