"""The work directory of a run: whose it is, what is in it, how far it is."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from sl_jax.grpo.config import ConfigError, GrpoConfig

_FILE = "config.json"
# A run may be prolonged, moved, and watched differently without becoming another one.
_FREE = ("workdir", "epochs", "checkpoint", "evaluation")


def claim(config: GrpoConfig) -> epath.Path:
    """Makes the work directory, or checks that it belongs to this configuration.

    Raises:
        ConfigError: it holds a run of another configuration; the differing fields are named.
    """
    folder = epath.Path(config.workdir)
    path = folder / _FILE
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        found = json.loads(path.read_text())
        differing = [d for d in _differences(found, wanted) if d.split(".")[0] not in _FREE]
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
    path.write_text(json.dumps(wanted, indent=2) + "\n")
    return folder


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
