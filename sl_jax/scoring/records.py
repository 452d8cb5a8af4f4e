"""What the judge said, epoch by epoch: lines that a person can read and a program can load."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sl_jax.checkpoints.disk import write_whole
from sl_jax.imaging.words import printable, readable_json
from sl_jax.scoring import request as rendering
from sl_jax.scoring.rubric import Prompts
from sl_jax.scoring.types import CRITERIA, Call, Failure, Group, GroupScores

RECORDS = "judge"
"""Folder of the records in a work directory."""

# Of a row, what the clock and the judge's servers decide; all else a repeated run repeats.
CLOCKED_FIELDS = ("endpoints", "asks", "tokens", "seconds", "calls")

_SHOWN = Prompts("$keys", "$keys")  # the pictures alone are wanted


class Record(NamedTuple):
    """A judged group as it was read back.

    Attributes:
      epoch: it belongs to.
      picture_id: names the picture.
      caption: of the picture.
      scores: as they were, to the last bit.
    """

    epoch: int
    picture_id: str
    caption: str
    scores: GroupScores


class RecordError(ValueError):
    """A file of records that cannot be read; the message names file, line and reason."""


@dataclasses.dataclass(frozen=True)
class JudgeRecords:
    """Writes `epoch_000012.jsonl` and pictures of some judged groups into a folder.

    Attributes:
      folder: made if missing; local or gs://.
      pictures: judged groups per epoch that are kept as pictures, those with the highest and the
        lowest mean reward among them; 0 writes none, and leaves those that are there.
      render: layout of these pictures.
    """

    folder: str | os.PathLike[str]
    pictures: int = 2
    render: rendering.RenderConfig = dataclasses.field(default_factory=rendering.RenderConfig)

    def write(
        self,
        epoch: int,
        groups: Sequence[Group],
        scores: Sequence[GroupScores],
        picture_ids: Sequence[str] = (),
    ) -> epath.Path:
        """Writes an epoch at once, over any earlier try; returns the path of the lines."""
        folder = epath.Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = picture_ids or [group.group_id for group in groups]
        rows = zip(groups, scores, names, strict=True)
        lines = [
            readable_json(to_row(epoch, group, found, name), allow_nan=False)
            for group, found, name in rows
        ]
        path = folder / f"epoch_{epoch:06d}.jsonl"
        if self.pictures:
            for earlier in folder.glob(f"{path.stem}_*.png"):
                earlier.unlink()
        write_whole(path, "".join(f"{line}\n" for line in lines))
        for index in _telling(scores, self.pictures):
            picture = grid_picture(groups[index], scores[index], self.render)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            write_whole(folder / f"epoch_{epoch:06d}_{index:03d}.png", buffer.getvalue())
        return path


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a file of records, or all `epoch_*.jsonl` of a folder in order.

    Raises:
      FileNotFoundError: there is none.
      RecordError: a line is no record.
    """
    root = epath.Path(path)
    files = sorted(root.glob("epoch_*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise FileNotFoundError(f"{root} holds no epoch_*.jsonl: please name a folder of records")
    found = []
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").rstrip("\n").split("\n"), 1):
            try:
                found.append(_from_row(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RecordError(
                    f"{file}, line {number}: no record of a judgement: {error}"
                ) from error
    return found


def read_pictures(
    folder: str | os.PathLike[str], epoch: int
) -> list[tuple[Record, UInt8[np.ndarray, "h w 3"]]]:
    """The judged groups of an epoch that are kept as pictures, each with its grid; maybe none.

    Raises:
      OSError, RecordError: something of them cannot be read.
    """
    root, name = epath.Path(folder), f"epoch_{epoch:06d}"
    kept = sorted(root.glob(f"{name}_*.png"))
    if not kept:
        return []
    records = read_records(root / f"{name}.jsonl")
    return [(records[_index(path, len(records))], _pixels(path)) for path in kept]


def _index(path: epath.Path, count: int) -> int:
    number = path.stem.rpartition("_")[2]
    if not number.isdecimal() or int(number) >= count:
        raise RecordError(f"{path} is of none of the epoch's {count} judged groups")
    return int(number)


def _pixels(path: epath.Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            return np.asarray(picture.convert("RGB"))
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecordError(f"{path} cannot be decoded: {error}") from error


def to_markdown(record: Record) -> str:
    """A judged group: a table of its candidates' scores, and what the judge said of each."""
    scores = record.scores
    columns = ("reward", "stage 1", "stage 2", *CRITERIA)
    table = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    said = []
    for index in range(len(scores.valid)):
        label = rendering.label_of(index)
        row = (scores.reward[index], scores.stage1[index], scores.stage2[index])
        numbers = (f"{value:.2f}" for value in (*row, *scores.criteria[index]))
        table.append(f"| {label} | {' | '.join(numbers)} |")
        reasons = zip(CRITERIA, scores.reasons[index], strict=False)  # none of what has failed
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)
        if failure := scores.failures[index]:
            told = failure.reason
        said += [f"- {label}: {_plain(told)}"] if told else []
    title = ": ".join(filter(None, (record.picture_id, record.caption)))
    return "\n".join([_plain(title), "", *table, "", *said])


def _plain(text: str) -> str:
    """One line of Markdown that shows a text of others as it is: no markup, pictures or links."""
    line = html.escape(printable(" ".join(text.split())), quote=False)
    return re.sub(r"[\\`*_{}\[\]()#!|]", r"\\\g<0>", line).replace("://", ":&#47;/")


def grid_picture(group: Group, scores: GroupScores, render: rendering.RenderConfig) -> np.ndarray:
    """The candidates at their places in the first grid: uint8 [h, w, 3]; A is candidate 0.

    Where there was no grid, they stand in order.
    """
    shown = np.arange(len(group.candidates))
    if len(scores.permutations) and (scores.permutations[0] >= 0).any():
        place = scores.permutations[0]
        shown = np.argsort(np.where(place < 0, len(place), place))[: int((place >= 0).sum())]
    arrangement = rendering.Shuffle(shown, tuple(map(rendering.label_of, map(int, shown))))
    return rendering.grid_request(group, arrangement, None, _SHOWN, render).parts[-1]


def to_row(epoch: int, group: Group, scores: GroupScores, picture_id: str) -> dict[str, Any]:
    """A judgement as JSON values; numbers that do not exist are null."""
    return {
        "epoch": epoch,
        "picture": picture_id,
        "group": scores.group_id,
        "caption": group.caption,
        "two_stage": scores.two_stage,
        "grid_failure": _failure_row(scores.grid_failure),
        "candidates": [_candidate_row(scores, index) for index in range(len(scores.valid))],
        "permutations": scores.permutations.tolist(),
        "grid_scores": _numbers(scores.grid_scores),
        "endpoints": list(scores.endpoints),
        "asks": scores.asks,
        "tokens": scores.tokens,
        "seconds": round(scores.seconds, 4),
        "calls": [call._asdict() for call in scores.calls],
    }


def _candidate_row(scores: GroupScores, index: int) -> dict[str, Any]:
    reasons = scores.reasons[index] or ("",) * len(CRITERIA)
    told = zip(CRITERIA, scores.criteria[index], reasons, strict=True)
    return {
        "reward": _numbers(scores.reward[index]),
        "stage1": _numbers(scores.stage1[index]),
        "stage2": _numbers(scores.stage2[index]),
        "valid": bool(scores.valid[index]),
        "capped": bool(scores.capped[index]),
        "failure": _failure_row(scores.failures[index]),
        "criteria": {
            name: {"score": _numbers(score), "reason": reason} for name, score, reason in told
        },
    }


def _from_row(row: dict[str, Any]) -> Record:
    rows = row["candidates"]
    count = len(rows)
    verdicts = [[entry["criteria"][name] for name in CRITERIA] for entry in rows]
    judged = [any(verdict["score"] is not None for verdict in told) for told in verdicts]
    scores = GroupScores(
        group_id=row["group"],
        criteria=_array([[v["score"] for v in told] for told in verdicts], (count, len(CRITERIA))),
        stage1=_array([entry["stage1"] for entry in rows], (count,)),
        stage2=_array([entry["stage2"] for entry in rows], (count,)),
        reward=_array([entry["reward"] for entry in rows], (count,)),
        valid=np.array([entry["valid"] for entry in rows], bool),
        two_stage=row["two_stage"],
        reasons=tuple(
            tuple(v["reason"] for v in told) if known else ()
            for told, known in zip(verdicts, judged, strict=True)
        ),
        failures=tuple(_failure(entry["failure"]) for entry in rows),
        grid_failure=_failure(row["grid_failure"]),
        capped=np.array([entry["capped"] for entry in rows], bool),
        grid_scores=_array(row["grid_scores"], (len(row["grid_scores"]), count)),
        permutations=np.array(row["permutations"], int).reshape(-1, count),
        endpoints=tuple(row["endpoints"]),
        asks=row["asks"],
        tokens=row["tokens"],
        seconds=row["seconds"],
        calls=tuple(Call(**call) for call in row["calls"]),
    )
    return Record(row["epoch"], row["picture"], row["caption"], scores)


def _failure_row(failure: Failure | None) -> dict[str, Any] | None:
    return None if failure is None else dataclasses.asdict(failure)


def _failure(row: dict[str, Any] | None) -> Failure | None:
    return None if row is None else Failure(**row)


def _numbers(values: Any) -> Any:
    """Floats as they are, nan as None, in nested lists."""
    if np.ndim(values):
        return [_numbers(value) for value in values]
    return float(values) if np.isfinite(values) else None


def _array(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.array(values, float).reshape(shape)


def _telling(scores: Sequence[GroupScores], count: int) -> list[int]:
    """The groups of the lowest and of the highest mean reward, and some in between; in order."""
    means = [np.nanmean(s.reward) if s.valid.any() else -np.inf for s in scores]
    order = np.argsort(means)
    picks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return sorted({int(order[pick]) for pick in picks})
