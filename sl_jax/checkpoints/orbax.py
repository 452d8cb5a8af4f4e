"""Checkpoints of a run, by Orbax: asynchronous, atomic, the last n and the best kept.

Orbax takes an array for what it reads, whatever became of the bytes; checksums of all arrays are
part of a checkpoint, and are compared when it is restored.
"""

import asyncio
import json
import logging
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import keystr
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.checksums import checksums
from sl_jax.checkpoints.disk import error_number, storage_failed
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.lock import sole_writer
from sl_jax.parallel.processes import ALONE, ProcessError, Processes

_log = logging.getLogger(__name__)
_TREE = "tree"
_RECORD = "record/metadata"  # where Orbax keeps the JSON object
_PARTS = {"record", "reward", "checksums", "checksum"}  # of the latter
_UNFINISHED = ".orbax-checkpoint-tmp"
_REASONS = {
    "No space left on device": "no space is left",
    "Read-only file system": "it is read-only",
}
_MISFIT = "of another configuration"  # begins the reason why such a checkpoint is not read
_IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError)
_NAMED = 3  # damaged arrays in a message
_PAUSES = (1.0, 5.0)  # seconds, where storage fails
_UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError)


def _absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants it; epath would put the current folder before gs://."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def _require_text(folder: epath.Path) -> None:
    """Makes sure that Orbax, which takes names for UTF-8, can write there.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise CheckpointError(
            f"{name} is no UTF-8, which checkpoints need; please choose another name"
        ) from error


class RunCheckpoints:
    """The numbered checkpoints of one work directory.

    Every checkpoint holds one pytree of arrays and a small JSON object (positions, counters).
    Saving returns at once and is finished in the background; a step appears when it is whole.
    Until it is closed, nobody else's are in that directory; see `checkpoints.lock`.

    Args:
        directory: made if missing; local or gs://.
        keep: how many of the last are kept; that with the highest reward is kept as well.
        processes: of the run, which save and restore together.

    Raises:
        CheckpointError: another run writes to the directory, or this one cannot.
        ProcessError: likewise, of the main process; or processes see different checkpoints.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 3, processes: Processes = ALONE):
        self.directory = _absolute(directory)
        self._processes = processes
        self._rewards: dict[int, float] = {}
        _require_text(self.directory)
        _silence(_is_late_answer)
        with ExitStack() as stack:
            with processes.together("opening checkpoints"), self._explained():
                if processes.is_main:
                    stack.enter_context(sole_writer(self.directory))
                    _clear_up(self.directory)
            options = ocp.CheckpointManagerOptions(
                create=True, preservation_policy=_LastAndBest(keep, self._best_of)
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            self._require_agreement()
            for step in self._manager.all_steps():
                self._note(step, _reward(self.directory / str(step)))
            self._lock = stack.pop_all()

    def _require_agreement(self) -> None:
        """From what one process sees and another does not, they would go on apart."""
        steps = sorted(self._manager.all_steps())
        found = self._processes.all_gather("finding checkpoints", steps)
        if any(other != steps for other in found):
            raise ProcessError(
                f"processes see different checkpoints ({found}) in {self.directory}; please let "
                "the shared drive settle, and start again"
            )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the highest reward, the newest of equal ones, and the reward; or None."""
        step = self._best_of(self._manager.all_steps())
        return None if step is None else (step, self._rewards[step])

    def save(
        self,
        step: int,
        tree: Any,
        record: Mapping[str, Any] | None = None,
        reward: float | None = None,
    ) -> None:
        """Starts saving `tree` and `record` as `step`; a step that exists is left as it is.

        Args:
            step: number.
            tree: arrays.
            record: JSON values.
            reward: of an evaluation, where there was one; not finite counts as none.

        Raises:
            CheckpointError: the disk has no room for it, or the save before this one failed.
        """
        with self._explained():
            self._require_room(tree)
            known = reward if reward is not None and math.isfinite(reward) else None
            content = {"record": dict(record or {}), "reward": known, "checksums": checksums(tree)}
            self._note(step, known)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(tree),
                    record=ocp.args.JsonSave({**content, "checksum": _checksum(content)}),
                ),
            )

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Step, tree and record of the newest checkpoint that can be read, or of `step`.

        Damaged checkpoints that are newer are passed over with an error in the log, and set aside
        as `damaged-STEP`, so that those steps can be saved again. What one process cannot read,
        all pass over. Storage that fails is no damage: it is tried again for a while.

        Args:
            like: a tree with the shapes, dtypes and shardings to restore to.

        Raises:
            CheckpointError: there is no readable checkpoint, or those that are there have other
                arrays.
            OSError: storage fails.
            ProcessError: it fails in another process.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = [step] if step is not None else sorted(self._manager.all_steps(), reverse=True)
        passed_over: dict[int, str] = {}  # and why
        for number in steps:
            with self._processes.together("reading a checkpoint"):
                tree, record, damage = self._read(number, abstract)
            told = self._processes.all_gather("comparing what was read", damage)
            damage = next((text for text in told if text is not None), None)
            if damage is None:
                damage = _damage(checksums(tree), record["checksums"])
            if damage is None:
                self._warn_of(passed_over)
                self._set_aside(list(passed_over))
                return number, tree, record["record"]
            passed_over[number] = damage
            tree = None  # no room for two
        misfit = next((why for why in passed_over.values() if why.startswith(_MISFIT)), None)
        if misfit is not None:
            raise CheckpointError(
                f"{self.directory} holds checkpoints {misfit}; please use the configuration that "
                "they were made with, or another work directory"
            )
        self._warn_of(passed_over)
        raise CheckpointError(
            f"{self.directory} holds no readable checkpoint among {steps}; please restore one from "
            "a copy, or begin anew in another work directory"
        )

    def _warn_of(self, damaged: Mapping[int, str]) -> None:
        for step, damage in damaged.items():
            _log.error(
                "Checkpoint %s of %s is damaged and is passed over: %s. What came after the one "
                "before it is done again.",
                *(step, self.directory, damage),
            )

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any], str | None]:
        """Tree and record as they are there, or what keeps this process from reading them."""
        path = self.directory / str(step)
        try:
            return _patiently(path, abstract)
        except Exception as error:
            if storage_failed(error):
                told = f"a checkpoint cannot be read, and is left as it is: {_reason(error)}"
                raise OSError(error_number(error), told, os.fspath(path)) from error
            if not _is_damage(error):
                raise
            return None, {}, _reason(error)

    def _set_aside(self, steps: Sequence[int]) -> None:
        with self._processes.together("setting damaged checkpoints aside"):
            for step in steps if self._processes.is_main else ():
                aside = self.directory / f"damaged-{step}"
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(step)).rename(aside)
        if steps:
            self._manager.reload()

    def _note(self, step: int, reward: float | None) -> None:
        self._rewards.pop(step, None)
        if reward is not None:
            self._rewards[step] = reward

    def _best_of(self, steps: Sequence[int]) -> int | None:
        judged = [step for step in steps if step in self._rewards]
        return max(judged, key=lambda step: (self._rewards[step], step), default=None)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saving and lets go of the directory; raises as `wait`."""
        with self._lock, self._explained():
            self._manager.close()

    def _require_room(self, tree: Any) -> None:
        """Before anything is written: half a checkpoint helps nobody, and fills the disk.

        All go by what the main process finds: who began to save alone would wait for the others.
        """
        if is_remote(self.directory):
            return
        found = shutil.disk_usage(self.directory).free if self._processes.is_main else None
        free = self._processes.from_main("looking for room", found)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        if needed > free:
            raise OSError(f"it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What keeps Orbax from writing, in a line; defects of a program come through as they are.

        TensorStore's errors are ValueErrors.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            if not _is_of_the_disk(error):
                raise
            _silence_remains()
            known = (text for words, text in _REASONS.items() if words in str(error))
            reason = next(known, " ".join(str(error).split()))
            advice = "make room or allow writing there"
            if isinstance(error, _IN_THE_WAY):
                advice = "take away what is in the way"
            elif isinstance(error, FileNotFoundError):
                advice = "see to it that this path leads somewhere"
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory}: {reason}; those before it "
                f"are whole. Please {advice}; the same command then goes on"
            ) from error


def donated(tree: Any) -> Any:
    """Shapes, dtypes and shardings to restore to, of arrays, which are deleted to make room."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
    return like


class _LastAndBest(preservation_policy.PreservationPolicy):
    def __init__(self, keep: int, best_of: Callable[[Sequence[int]], int | None]):
        self._keep, self._best_of = keep, best_of

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> Sequence[bool]:
        """For each checkpoint, oldest first."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], self._best_of(steps)}
        return [step in kept for step in steps]


def _clear_up(folder: epath.Path) -> None:
    """Removes what a save that was killed left half written, which would stay for ever."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED in path.name or (path.name.isdecimal() and not _is_whole(path)):
            try:
                path.rmtree()
            except FileNotFoundError:  # a lock that TensorStore itself has just removed, or all
                if path.exists():
                    path.rmtree()


def _is_whole(step: epath.Path) -> bool:
    """Whether a checkpoint has been written to its end.

    On a disk it then gets its name; in a bucket, where it has it from the beginning, a last file.
    """
    return ocp.utils.is_checkpoint_finalized(step)


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _content(found: Any) -> dict[str, Any]:
    """What was saved beside the arrays, once it is known to be that.

    Raises:
        ValueError: it is not.
        TypeError: likewise.
    """
    content = dict(found)
    if not content.keys() & _PARTS:  # of a version that made no checksums
        _log.warning("A checkpoint has no checksums: it is taken as it is.")
        return {"record": content, "reward": None, "checksums": None}
    if content.pop("checksum", None) != _checksum(content):
        raise ValueError("its record differs from what was saved")
    return content


def _patiently(path: epath.Path, abstract: Any) -> tuple[Any, dict[str, Any], str | None]:
    """A checkpoint's tree and record, or why it does not fit; again where storage fails."""
    for pause in _PAUSES:
        try:
            return _found(path, abstract)
        except Exception as error:
            if not storage_failed(error):
                raise
            _log.warning("%s cannot be read (%s); in %.0f s again.", path, _reason(error), pause)
        time.sleep(pause)
    return _found(path, abstract)


def _found(path: epath.Path, abstract: Any) -> tuple[Any, dict[str, Any], str | None]:
    """By the handler, which waits for nobody; Orbax's manager would, for who cannot read a part."""
    misfit = _misfit(abstract, path / _TREE)
    if misfit is not None:
        return None, {}, misfit
    args = ocp.args.StandardRestore(abstract)
    tree = ocp.StandardCheckpointHandler().restore(path / _TREE, args=args)
    return tree, _content(json.loads((path / _RECORD).read_text())), None


def _misfit(wanted: Any, path: epath.Path) -> str | None:
    """The first array of which a checkpoint's tree has another shape than wanted; None if none."""
    here, there = _shapes(wanted), _shapes(ocp.PyTreeCheckpointHandler().metadata(path).tree)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            shapes = (there.get(name, "missing"), here.get(name, "missing"))
            return f"{_MISFIT}: {name} is {shapes[0]} there and {shapes[1]} here"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in paths}


def _is_damage(error: Exception) -> bool:
    """Whether reading a damaged checkpoint may end in it, and no mistake of ours is likely to.

    Of an array that cannot be decoded Orbax raises an `Exception` of no kind; its own JSON it takes
    for what it should be.
    """
    return isinstance(error, _UNREADABLE) or type(error) is Exception


def _reason(error: Exception) -> str:
    """What an error says, in a line; of Orbax's, which are of no kind, what caused it."""
    told = error.__cause__ if type(error) is Exception and error.__cause__ else error
    return " ".join(str(told).split()) or type(told).__name__


def _damage(found: Mapping[str, str], saved: Mapping[str, str] | None) -> str | None:
    """Which arrays are not what was saved; None if all are, or if nobody knows."""
    if saved is None:
        return None
    differing = [name for name, value in found.items() if saved.get(name) != value]
    if not differing:
        return None
    others = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return f"{', '.join(differing[:_NAMED])}{others} differ from what was saved (checksums)"


def _reward(step: epath.Path) -> float | None:
    """Of a checkpoint; None if it has none, or cannot be read."""
    try:
        return _content(json.loads((step / _RECORD).read_text()))["reward"]
    except _UNREADABLE:
        return None  # `restore`, which needs it whole, says why


def _is_of_the_disk(error: OSError | ValueError) -> bool:
    told = any(words in str(error) for words in _REASONS)
    return isinstance(error, OSError) or told or error_number(error) is not None


def _silence_remains() -> None:
    """Keeps a save that failed from a traceback for each array that it left unwritten."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    _silence(_is_coroutine)


def _silence(is_silent: Callable[[Any], bool]) -> None:
    """Keeps what Python can raise nowhere from being told, where it is of a kind."""
    hook = sys.unraisablehook
    if getattr(hook, "is_silent", None) is is_silent:
        return

    def without(unraisable: Any) -> None:
        if not is_silent(unraisable):
            hook(unraisable)

    without.is_silent = is_silent
    sys.unraisablehook = without


def _is_coroutine(unraisable: Any) -> bool:
    return asyncio.iscoroutine(unraisable.object)


def _is_late_answer(unraisable: Any) -> bool:
    """TensorStore's for the other arrays, after the event loop that asked was closed.

    It comes in a thread of its own, and belongs to no object.
    """
    error = unraisable.exc_value
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    return closed and unraisable.object is None


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
            for step in sorted(steps, key=lambda step: int(step.name), reverse=True):
                if _is_whole(step):
                    return step
    return None


def read_entry(step: epath.PathLike, names: Sequence[str]) -> Any:
    """One entry of a checkpoint's tree as numpy arrays, without the rest of it.

    Args:
        step: folder of the checkpoint.
        names: of the entry, the first that the checkpoint has.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has none of these.
    """
    handler, path = ocp.PyTreeCheckpointHandler(), _absolute(step) / _TREE
    found = damage = None
    try:
        tree = handler.metadata(path).tree
        name = next((name for name in names if name in tree), None)
        if name is not None:
            found = _restored(handler, path, {name: tree[name]})
            content = _content(json.loads((epath.Path(step) / _RECORD).read_text()))
            damage = _damage(checksums(found), content["checksums"])
    except Exception as error:
        if not _is_damage(error):
            raise
        raise CheckpointError(f"{step} is damaged: {_reason(error)}") from error
    if found is None:
        raise CheckpointError(
            f"{step} holds {sorted(tree)}, none of {list(names)}; please pass a checkpoint of a "
            "run that trains an adapter"
        )
    if damage is not None:
        raise CheckpointError(f"{step} is damaged: {damage}")
    return found[name]


def _restored(
    handler: ocp.PyTreeCheckpointHandler, path: epath.Path, part: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Numpy arrays of that part of a tree of which `part` has the metadata."""
    item = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), part)
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=numpy, partial_restore=True)
    return handler.restore(path, args=args)
