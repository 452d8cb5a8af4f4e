"""What is kept of candidates and updates that are not finite, for a person to look at."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from sl_jax.checkpoints.disk import REMAINS, write_whole
from sl_jax.data import Example
from sl_jax.grpo.advantages import Advantages
from sl_jax.grpo.learner import UpdateReport
from sl_jax.grpo.parts import Parts
from sl_jax.grpo.rolling import Rolled, rollout_keys

FOLDER = "not_finite"  # in the work directory
_TOLD = {"picture_latents": "picture", "text": "text"}  # the model, of a group
_STATES = ("x", "x_next", "mean")  # of the trained steps of a candidate


class Spoiled(NamedTuple):
    """An update, and what it should have learned from.

    Attributes:
        rolled: its batches.
        advantages: of their groups.
        skipped: whether it was not finite itself.
        report: of the update; None where there was none.
    """

    rolled: Sequence[Rolled]
    advantages: Advantages
    skipped: bool
    report: UpdateReport | None


def keep_spoiled(parts: Parts, epoch: int, update: Spoiled) -> None:
    """Writes groups with candidates that are not finite, or all of a skipped update, for a person.

    Two files a group, such as `not_finite/epoch_000012_step_34_slot_5.npz` and `….json`, of the
    first `health.kept` groups, by the process whose devices hold them. The former, which numpy
    reads without pickle, has picture and prompt as the model got them, and of the candidates the
    latents and x, x_next and mean of the trained steps, as they are. The latter says where what is
    not finite, and what repeats it: the group's key, the window, and after which epoch the adapter
    was the one that sampled (0: the initial one). A `.json` that a kill left alone gets its `.npz`
    when the epoch is done again.
    """
    config = parts.config
    for batch, example, place in _spoiled_groups(update, config.rollout.batch_groups):
        folder = parts.folder / FOLDER
        if len(list(folder.glob("*.npz"))) >= config.health.kept:
            return
        group = _of_group(batch, example.slot)
        told = {
            **_of_picture(example, config.seed),
            **_of_update(update, epoch, config.rollout.max_staleness),
            **{n: _numbers(getattr(update.advantages, n)[place]) for n in ("advantage", "weight")},
            **_findings(group, batch.finite[example.slot]),
        }
        name = f"epoch_{epoch:06d}_step_{example.step}_slot_{example.slot}"
        _keep(folder, config.health.kept, name, told, {"picture": example.picture} | group)


def clear_up(folder: epath.Path) -> None:
    """Removes from a work directory what a kill left half written, which would stay for ever.

    A folder for people to look at may hold other hidden files: of editors, notebooks, drives.
    """
    kept = folder / FOLDER
    for path in kept.iterdir() if kept.is_dir() else ():
        if REMAINS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _spoiled_groups(update: Spoiled, size: int) -> Iterator[tuple[Rolled, Example, int]]:
    """Batch, picture, and place in the update, of each group of this process to keep."""
    for number, batch in enumerate(update.rolled):
        spoiled = update.skipped | ~batch.finite.all(axis=1)
        for example in batch.pictures.examples if spoiled.any() else ():
            if spoiled[example.slot]:
                yield batch, example, number * size + example.slot


def _keep(
    folder: epath.Path, most: int, name: str, told: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Writes both files of a group, unless others have written the most meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    text = json.dumps(told, indent=1, allow_nan=False)
    files = {f"{name}.json": text.encode(), f"{name}.npz": content.getvalue()}
    for file, whole in files.items():
        write_whole(folder / file, whole, shared=True)  # by all that hold the group
    if folder / f"{name}.npz" in sorted(folder.glob("*.npz"))[most:]:
        for file in files:
            (folder / file).unlink(missing_ok=True)


def _of_picture(example: Example, seed: int) -> dict[str, Any]:
    return {
        "picture_id": example.picture_id,
        "path": example.path,
        "caption": example.caption,
        "layers": example.layers,
        "step": example.step,
        "slot": example.slot,
        "seed": seed,
        "key": rollout_keys(seed, example.step, [example])[0].tolist(),
    }


def _of_update(update: Spoiled, epoch: int, max_staleness: int) -> dict[str, Any]:
    before = epoch - 1  # epochs that the run had behind it
    norms = jax.device_get(update.report.gradient_norms) if update.report else []
    return {
        "epoch": epoch,
        "sampled_by_the_adapter_after_epoch": before - min(before, max_staleness),
        "update_skipped": bool(update.skipped),
        "gradient_norm_by_sampling_step": {str(int(i)): _numbers([norm])[0] for i, norm in norms},
    }


def _of_group(batch: Rolled, row: int) -> dict[str, np.ndarray]:
    """What the model was told of a group, [1, ·, ·], and its candidates, [G, ·, ·] or more."""
    candidates, count = batch.candidates, batch.finite.shape[1]
    condition, window = candidates.condition, candidates.window
    states = {name: getattr(window, name) for name in _STATES}
    return {
        # float32: numpy has no bfloat16.
        name: _rows(getattr(condition, field), 0, row * count, 1).astype(np.float32)
        for name, field in _TOLD.items()
    } | {
        "latents": _rows(candidates.latents, 0, row * count, count),
        **{name: _rows(array, 1, row * count, count) for name, array in states.items()},
        "std": np.asarray(window.std),
        "index": np.asarray(window.index),
    }


def _findings(group: Mapping[str, np.ndarray], finite: Bool[np.ndarray, " g"]) -> dict[str, Any]:
    """Where what of a group is not finite."""
    index = group["index"].tolist()
    candidates = []
    for number, well in enumerate(finite.tolist()):
        fields = [("latents", None, group["latents"][number])]
        fields += [
            (name, step, group[name][place, number])
            for place, step in enumerate(index)
            for name in _STATES
        ]
        found = _not_finite(fields)
        if not (well or found):
            found = [{"field": "decoded pixels"}]  # of which no more is known
        candidates.append({"finite": well, "not_finite": found})
    return {
        "window": index,
        "told_not_finite": _not_finite([(name, None, group[name][0]) for name in _TOLD]),
        "candidates": candidates,
    }


def _not_finite(
    fields: Iterable[tuple[str, int | None, Float[np.ndarray, "tokens channels"]]],
) -> list[dict[str, Any]]:
    """How many numbers of a field at a sampling step are not finite, and token, channel of one."""
    found = []
    for name, step, values in fields:
        places = np.argwhere(~np.isfinite(values))
        if len(places):
            at = {} if step is None else {"sampling_step": step}
            sizes = {"count": len(places), "of": values.size, "first": places[0].tolist()}
            found.append({"field": name} | at | sizes)
    return found


def _numbers(values: Iterable[float]) -> list[float | None]:
    """As JSON has them."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _rows(array: jax.Array, axis: int, start: int, count: int) -> np.ndarray:
    """Rows of a global array along `axis` that a device of this process holds."""
    for shard in array.addressable_shards:
        first = shard.index[axis].start or 0
        if first <= start and start + count <= first + shard.data.shape[axis]:
            rows = range(start - first, start - first + count)
            return np.take(np.asarray(shard.data), rows, axis)
    raise ValueError(f"rows {start} to {start + count} of {array.shape} are not in this process")
