"""The results of an evaluation on disk: one file per system and picture, written at once.

settings.json              what was evaluated and how; a change of it is refused
results/SYSTEM/PICTURE.json  every protocol's numbers of one decomposition
layers/SYSTEM/PICTURE/     layers of models, as PNG files in the LayerD layout
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from sl_jax.checkpoints.disk import inside_name, write_whole
from sl_jax.eval.compare import Measurement
from sl_jax.eval.layerd import EditScores
from sl_jax.eval.options import EvaluationError
from sl_jax.eval.reference_free import ReferenceFree
from sl_jax.eval.stable_layers import LayerL1
from sl_jax.eval.stacks import read_stack, write_stack

_log = logging.getLogger(__name__)

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Record:
    """What is known of one decomposition.

    Attributes:
      picture, system: whose it is.
      layers: L of the reference, or the L that was asked for.
      stamp: of the layers that were measured, see `systems.System.stamp`.
      scores: by protocol, as JSON values; None where a protocol does not apply.
      wins: by name of a base, share of the grids won against it, and the stamp of its layers.
    """

    picture: str
    system: str
    layers: int
    stamp: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)
    wins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def lacking(self, protocols: Sequence[str]) -> tuple[str, ...]:
        """The protocols that have not been run."""
        return tuple(name for name in protocols if name not in self.scores)

    def won(self, base: str, stamp: str) -> float | None:
        """Share of the grids won against those layers of a base; None if it is unknown."""
        found = self.wins.get(base)
        return found["rate"] if found and found["stamp"] == stamp else None

    def with_win(self, base: str, stamp: str, rate: float) -> Record:
        """The record with a comparison added."""
        wins = {**self.wins, base: {"rate": rate, "stamp": stamp}}
        return dataclasses.replace(self, wins=wins)

    def measurement(
        self, protocols: Sequence[str], seed: int = 0, wins: float | None = None
    ) -> Measurement:
        """The numbers of some protocols, as tables take them."""
        scores = {name: self.scores.get(name) for name in protocols}
        free, l1 = scores.get("reference_free"), scores.get("stable_layers")
        layerd, judged = scores.get("layerd"), scores.get("judge") or {}
        return Measurement(
            picture=self.picture,
            model=self.system,
            layers=self.layers,
            seed=seed,
            free=ReferenceFree(**free) if free else None,
            layer_l1=LayerL1(**_tuples(l1)) if l1 else None,
            layerd=tuple(EditScores(**_tuples(edits)) for edits in layerd) if layerd else None,
            reward=judged.get("reward", math.nan),
            criteria=tuple(judged.get("criteria", ())),
            wins=math.nan if wins is None else wins,
        )


class ResultFolder:
    """Reads and writes the results of one evaluation.

    Several processes may share a folder if they work on different pictures.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder).expanduser()
        self._known: dict[tuple[str, str], Record] = {}  # a remote folder answers slowly

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder this evaluation's, or finds out that it is another one's.

        More pictures behind those that were there, further systems and a judge may be added.

        Args:
          settings: `pictures`, a digest each; `common`, settings of all; `judge`, None without
            one; and `systems`, settings by name.

        Raises:
          EvaluationError: the folder holds results of other settings; the differing fields are
            named.
        """
        path = self.folder / SETTINGS
        wanted = json.loads(json.dumps(settings))
        found = self._claimed(path) if path.exists() else wanted
        differing = list(_conflicts(found, wanted))
        if differing:
            raise EvaluationError(
                f"{self.folder} holds results of another evaluation; please choose another "
                "--output, or set these back:\n  " + "\n  ".join(differing)
            )
        merged = {
            **wanted,
            "pictures": max(found["pictures"], wanted["pictures"], key=len),
            "judge": wanted["judge"] or found["judge"],
            "systems": {**found["systems"], **wanted["systems"]},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, merged)

    def read(self, system: str, picture: str) -> Record | None:
        """A record; None if there is none, or a damaged one, which warns."""
        if (system, picture) in self._known:
            return self._known[system, picture]
        path = self._path(system, picture)
        if not path.exists():
            return None
        try:
            record = self._known[system, picture] = Record(**json.loads(path.read_text()))
            return record
        except (ValueError, TypeError, RecursionError) as error:
            _log.warning("%s is damaged (%s); it is made again", path, error)
            return None

    def write(self, record: Record) -> None:
        """Puts a record in place at once."""
        path = self._path(record.system, record.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _plain(dataclasses.asdict(record))
        _write_json(path, content)
        self._known[record.system, record.picture] = Record(**content)

    def read_layers(self, system: str, picture: str) -> np.ndarray:
        """Layers that were kept, uint8 [L, H, W, 4].

        Raises:
          StackError: they are damaged.
        """
        return read_stack(self._layers(system, picture))

    def write_layers(self, system: str, picture: str, layers: np.ndarray) -> None:
        """Keeps layers; they count once the record is written."""
        write_stack(self._layers(system, picture), layers)

    def _path(self, system: str, picture: str) -> epath.Path:
        return self.folder / "results" / file_name(system) / f"{picture}.json"

    def _layers(self, system: str, picture: str) -> epath.Path:
        return self.folder / "layers" / file_name(system) / picture

    def _claimed(self, path: epath.Path) -> Any:
        try:
            return json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"{path} is damaged ({error}), so that it is unknown what its folder holds; "
                "please choose another --output, or delete the folder"
            ) from error


def file_name(system: str) -> str:
    """A system's name as a folder's."""
    return inside_name(re.sub(r"[^\w .,+-]", "_", system))


def _conflicts(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    shared = min(len(found["pictures"]), len(wanted["pictures"]))
    for index in range(shared):
        if found["pictures"][index] != wanted["pictures"][index]:
            yield f"data: picture {index} is another one, or has another size"
            break
    yield from _fields(found, wanted, ("num_layers",))
    if found["judge"] and wanted["judge"]:
        yield from _fields(found, wanted, ("judge",))
    for name in sorted(found["systems"].keys() & wanted["systems"].keys()):
        ours, theirs = wanted["systems"][name], found["systems"][name]
        yield from _fields(theirs, ours, sorted(ours.keys() | theirs.keys()), f"{name}: ")


def _fields(
    found: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str], of: str = ""
) -> Iterator[str]:
    for name in names:
        if found.get(name) != wanted.get(name):
            yield f"{of}{name}: {found.get(name)!r} there, {wanted.get(name)!r} here"


def _write_json(path: epath.Path, content: Any) -> None:
    text = json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, text, shared=True)  # by shards of one evaluation


def _plain(value: Any) -> Any:
    """Strict JSON: numpy's numbers as Python's, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tuples(value: Any) -> Any:
    """A mapping whose values have JSON's lists as the tuples that they were."""
    if isinstance(value, Mapping):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
