"""The work directory of a run: whose it is."""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from sl_jax.checkpoints.disk import require_writable, write_whole
from sl_jax.parallel.processes import ALONE, Processes
from sl_jax.training.configuration import ConfigError

_FILE = "config.json"
_VISIBLE_WITHIN = 30.0  # seconds, on a network drive


class Identity(NamedTuple):
    """What of a configuration makes a run itself. Names are dotted, and stand for all below them.

    Attributes:
        free: fields that may change from one start to the next.
        own: fields that each process of a run may have of its own.
        told: the configuration, as nested dicts, in the form in which it is compared.
    """

    free: frozenset[str]
    own: frozenset[str] = frozenset({"distributed"})
    told: Callable[[Any], Any] = lambda content: content


def claim(config: Any, identity: Identity, processes: Processes = ALONE) -> epath.Path:
    """The work directory, made if need be, once it is known to hold no other configuration's run.

    Args:
        config: a dataclass with a field `workdir`.
        identity: what of it counts.
        processes: of the run.

    Raises:
        ConfigError: it holds a run of another configuration, or processes have different ones, or
            do not share the directory; differing fields are named.
        OSError: nothing can be written there.
        ProcessError: the main process met one of these.
    """
    agree(config, identity, processes)
    folder = epath.Path(config.workdir)
    with processes.together("claiming the work directory"):
        if processes.is_main:
            _claim(folder, config, identity)
    with processes.together("finding the work directory"):
        _check_shared(folder, processes)
    return folder


def agree(config: Any, identity: Identity, processes: Processes) -> None:
    """Checks that all processes have one configuration, but for what may be their own.

    Raises:
        ConfigError: the differing fields are named; in every process.
    """
    told = processes.all_gather("comparing configurations", json.dumps(_content(config)))
    first, *others = (identity.told(json.loads(content)) for content in told)
    for index, other in enumerate(others, 1):
        differing = [name for name in _differences(first, other) if not _among(identity.own, name)]
        if differing:
            raise ConfigError(
                f"process {index} has another configuration than process 0; please start all with "
                "the same fields:\n  "
                + "\n  ".join(
                    f"config.{name}: {_at(first, name)!r} in process 0, {_at(other, name)!r} in "
                    f"process {index}"
                    for name in differing
                )
            )


def _check_shared(folder: epath.Path, processes: Processes) -> None:
    """Sees that what the main process writes is there for this one."""
    if processes.count == 1:
        return
    token = folder / f".shared.{processes.from_main('naming a file', uuid.uuid4().hex)}"
    if processes.is_main:
        token.write_text("seen by all processes")
    processes.barrier("writing a file")
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(1.0)
    missing = [i for i, s in enumerate(processes.all_gather("seeing a file", seen)) if not s]
    if processes.is_main:
        token.unlink()
    if missing:
        raise ConfigError(
            f"config.workdir is {folder}, where processes {missing} do not see what process 0 "
            "writes; please name a folder that all hosts share, or a gs:// path"
        )


def _claim(folder: epath.Path, config: Any, identity: Identity) -> None:
    path = folder / _FILE
    if path.exists():
        found, wanted = map(identity.told, (_read(path), _content(config)))
        differing = [
            name for name in _differences(found, wanted) if not _among(identity.free, name)
        ]
        if differing:
            raise ConfigError(
                f"{folder} holds a run of another configuration; please choose another "
                "config.workdir, or set these fields back:\n  "
                + "\n  ".join(
                    f"config.{name}: {_at(found, name)!r} there, {_at(wanted, name)!r} here"
                    for name in differing
                )
            )
    require_writable(folder)  # before a model is loaded
    folder.mkdir(parents=True, exist_ok=True)


def record(config: Any) -> None:
    """Notes in the work directory whose run it holds; called when everything is ready to train.

    A start that failed, for a folder without pictures say, has then claimed nothing.
    """
    path = epath.Path(config.workdir) / _FILE
    write_whole(path, json.dumps(_content(config), indent=2) + "\n")


def _content(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read(path: epath.Path) -> Any:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, Mapping):
            raise ValueError(f"a {type(content).__name__} instead of fields")
        return content
    except (ValueError, RecursionError) as error:  # ValueError: no text, no JSON
        raise ConfigError(
            f"{path} is damaged ({error}), so that it is unknown whose run its folder holds; "
            "please choose another config.workdir, or delete that file if the run is this one's"
        ) from error


def _among(names: frozenset[str], name: str) -> bool:
    """Whether a field is one of those named, or below one."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in names for depth in range(1, len(parts) + 1))


def _differences(found: Any, wanted: Any, path: str = "") -> Iterator[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted({*found, *wanted}):
            yield from _differences(found.get(name), wanted.get(name), f"{path}.{name}".lstrip("."))
    elif found != wanted:
        yield path


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
