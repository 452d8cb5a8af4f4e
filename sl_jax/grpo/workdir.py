"""The work directory of a run: whose it is, what is in it, how far it is."""

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from sl_jax.grpo.config import ConfigError, GrpoConfig
from sl_jax.parallel.processes import ALONE, Processes

_FILE = "config.json"
# A run may be prolonged, moved to other machines, and watched differently without becoming another.
_FREE = frozenset(
    {
        *("workdir", "epochs", "checkpoint", "evaluation", "mesh", "learner.micro_batch"),
        "distributed",
        *("compute.attention", "compute.remat", "judge.concurrency", "judge.max_wait"),
        *("judge.model", "judge.key_env", "judge.tries", "judge.patience", "judge.hedge_after"),
        *("judge.cool_down", "judge.max_requests", "judge.max_tokens", "judge.cache"),
        *("judge.cache_path", "judge.preflight", "judge.recorded_pictures"),
        "judge.request.timeout",
    }
)
# What each process of a run may have of its own.
_OWN = frozenset(
    {
        *("distributed", "judge.cache", "judge.cache_path", "judge.concurrency", "judge.cool_down"),
        *("judge.hedge_after", "judge.key_env", "judge.model", "judge.patience"),
        *("judge.preflight", "judge.request.timeout", "judge.tries"),
    }
)
_VISIBLE_WITHIN = 30.0  # seconds, on a network drive


def claim(config: GrpoConfig, processes: Processes = ALONE) -> epath.Path:
    """The work directory, made if need be, once it is known to hold no other configuration's run.

    Raises:
        ConfigError: it holds a run of another configuration, or processes have different ones, or
            do not share the directory; differing fields are named.
        ProcessError: the main process met one of these.
    """
    agree(config, processes)
    folder = epath.Path(config.workdir)
    with processes.together("claiming the work directory"):
        if processes.is_main:
            _claim(folder, config)
    with processes.together("finding the work directory"):
        _check_shared(folder, processes)
    return folder


def agree(config: GrpoConfig, processes: Processes) -> None:
    """Checks that all processes have one configuration, but for what may be their own.

    Raises:
        ConfigError: the differing fields are named; in every process.
    """
    told = processes.all_gather("comparing configurations", json.dumps(_content(config)))
    first, *others = (_identity(json.loads(content)) for content in told)
    for index, other in enumerate(others, 1):
        differing = [name for name in _differences(first, other) if not _among(_OWN, name)]
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


def _claim(folder: epath.Path, config: GrpoConfig) -> None:
    path = folder / _FILE
    if path.exists():
        found, wanted = (_identity(content) for content in (_read(path), _content(config)))
        differing = [name for name in _differences(found, wanted) if not _among(_FREE, name)]
        if differing:
            raise ConfigError(
                f"{folder} holds a run of another configuration; please choose another "
                "config.workdir, or set these fields back:\n  "
                + "\n  ".join(
                    f"config.{name}: {_at(found, name)!r} there, {_at(wanted, name)!r} here"
                    for name in differing
                )
            )
    folder.mkdir(parents=True, exist_ok=True)


def record(config: GrpoConfig) -> None:
    """Notes in the work directory whose run it holds; called when everything is ready to train.

    A start that failed, for a folder without pictures say, has then claimed nothing.
    """
    path = epath.Path(config.workdir) / _FILE
    partial = path.with_name(f"{_FILE}.partial")
    partial.write_text(json.dumps(_content(config), indent=2) + "\n")
    partial.replace(path)


def _content(config: GrpoConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _identity(content: Any) -> Any:
    """The content, in which judging models stand for their servers: those may come and go."""
    judge = content.get("judge") if isinstance(content, Mapping) else None
    if not isinstance(judge, Mapping) or not isinstance(judge.get("endpoints"), list):
        return content
    models = sorted({_at(entry, "model") or "" for entry in judge["endpoints"]})
    return {**content, "judge": {**judge, "endpoints": {"model": models}}}


def _read(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
