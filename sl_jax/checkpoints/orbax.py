"""Checkpoints of a run, by Orbax: asynchronous, atomic, the last n kept."""

import asyncio
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.errors import CheckpointError

_log = logging.getLogger(__name__)
_TREE = "tree"


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
        """Starts saving `tree` and `record` as `step`; a step that exists is left as it is.

        Raises:
            CheckpointError: the disk has no room for it, or the save before this one failed.
        """
        with self._explained():
            self._require_room(tree)
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
        """Returns when everything that was saved is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saving and lets go of the directory; raises as `wait`."""
        with self._explained():
            self._manager.close()

    def _require_room(self, tree: Any) -> None:
        """Before anything is written: half a checkpoint helps nobody, and fills the disk."""
        if is_remote(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        if needed > free:
            raise OSError(f"it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What keeps Orbax from writing, in a line."""
        try:
            yield
        except (OSError, ValueError) as error:
            _silence_remains()
            full = "No space left on device" in str(error)
            reason = "no space is left" if full else " ".join(str(error).split())
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory}: {reason}; those before it "
                "are whole. Please make room or allow writing there; the same command then goes on"
            ) from error


def _silence_remains() -> None:
    """Keeps a save that failed from a traceback for each array that it left unwritten."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def without_coroutines(unraisable: Any) -> None:
        if not asyncio.iscoroutine(unraisable.object):
            hook(unraisable)

    sys.unraisablehook = without_coroutines


def find_step(folder: epath.PathLike) -> epath.Path | None:
    """The newest complete checkpoint of a work directory, or of its `checkpoints`.

    A checkpoint's own folder is found as it is; None if there is no checkpoint.
    """
    folder = epath.Path(folder)
    if (folder / _TREE).is_dir():
        return folder
    for parent in (folder / "checkpoints", folder):
        if parent.is_dir():
            steps = [p for p in parent.iterdir() if p.name.isdecimal() and (p / _TREE).is_dir()]
            if steps:
                return max(steps, key=lambda step: int(step.name))
    return None


def read_entry(step: epath.PathLike, names: Sequence[str]) -> Any:
    """One entry of a checkpoint's tree as numpy arrays, without the rest of it.

    Args:
        step: folder of the checkpoint.
        names: of the entry, the first that the checkpoint has.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has none of these.
    """
    path = (epath.Path(step) / _TREE).absolute()
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(path).tree
        name = next((name for name in names if name in tree), None)
        if name is None:
            raise CheckpointError(
                f"{step} holds {sorted(tree)}, none of {list(names)}; please pass a checkpoint of "
                "a run that trains an adapter"
            )
        item = {name: jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree[name])}
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = handler.restore(
            path,
            args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
        )
    except (OSError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{step} is damaged: {error}") from error
    return restored[name]
