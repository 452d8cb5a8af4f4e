"""The work directory of a run: whose it is, what is in it, how far it is."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from sl_jax.grpo.config import ConfigError, GrpoConfig

_FILE = "config.json"
# A run may be prolonged, moved to other machines, and watched differently without becoming another.
_FREE = frozenset(
    {
        *("workdir", "epochs", "checkpoint", "evaluation", "mesh", "learner.micro_batch"),
        *("compute.attention", "compute.remat", "judge.concurrency", "judge.max_wait"),
        *("judge.model", "judge.key_env", "judge.tries", "judge.patience", "judge.hedge_after"),
        *("judge.cool_down", "judge.max_requests", "judge.max_tokens", "judge.cache"),
        *("judge.cache_path", "judge.preflight", "judge.recorded_pictures"),
        "judge.request.timeout",
    }
)


def claim(config: GrpoConfig) -> epath.Path:
    """The work directory, made if need be, once it is known to hold no other configuration's run.

    Raises:
        ConfigError: it holds a run of another configuration; the differing fields are named.
    """
    folder = epath.Path(config.workdir)
    path = folder / _FILE
    if path.exists():
        found, wanted = (_identity(content) for content in (_read(path), _content(config)))
        differing = [name for name in _differences(found, wanted) if not _free(name)]
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
    return folder


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


def _free(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:depth]) in _FREE for depth in range(1, len(parts) + 1))


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
