"""Batches of pictures, from the rows that each process reads to arrays over all devices."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, UInt32

from sl_jax.data import (
    Example,
    PictureIndex,
    make_buckets,
    make_dataset,
    training_and_held_out,
)
from sl_jax.grpo.config import DataConfig, GrpoConfig
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.rollout import Pictures
from sl_jax.parallel.mesh import Layout, batch_sharding
from sl_jax.parallel.processes import BatchRows, Processes, batch_rows, from_local
from sl_jax.training.configuration import ConfigError
from sl_jax.training.same_data import require_same


def rows_here(config: GrpoConfig, layout: Layout, processes: Processes) -> BatchRows:
    """Which groups of a rollout batch this process holds and judges.

    Raises:
        ConfigError: the mesh does not fit the processes.
    """
    try:
        return batch_rows(layout.mesh, config.rollout.batch_groups, processes.index)
    except ValueError as error:
        raise ConfigError(f"config.mesh is {config.mesh}: {error}") from error


def pictures_of(data: DataConfig, processes: Processes) -> tuple[PictureIndex, PictureIndex]:
    """The pictures to train on and those held out, the same in all processes.

    Raises:
        FolderError: there are none, or processes find different ones.
    """
    with processes.together("opening the pictures"):
        if processes.is_main:  # which makes a dataset, if need be, before the others look for it
            for where in filter(None, (data.path, data.eval_data)):
                make_dataset(where)
    found = training_and_held_out(
        data.path,
        make_buckets(data.buckets, "config.data.buckets"),
        eval_data=data.eval_data or None,
        eval_fraction=data.eval_fraction,
    )
    prints, folders = zip(*((index.fingerprint, index.folder) for index in found), strict=True)
    require_same("pictures", prints, folders, processes)
    return found


def group_keys(root: PRNGKeyArray, slots: Sequence[int]) -> UInt32[np.ndarray, "n words"]:
    """Data of one key per group, from its slot and nothing else."""
    keys = jax.vmap(lambda slot: jax.random.fold_in(root, slot))(np.asarray(slots, np.uint32))
    return np.asarray(jax.random.key_data(keys))


def laid_out(
    layout: Layout,
    examples: Sequence[Example],
    prompts: PromptTable,
    keys: UInt32[np.ndarray, "n words"],
    rows: int,
) -> Pictures:
    """The pictures of a batch, split over data × fsdp.

    Args:
        layout: of the devices.
        examples: of the rows that this process holds.
        prompts: of the run.
        keys: data of the key of each example.
        rows: of the whole batch.
    """
    sharding = batch_sharding(layout.mesh)
    text, lengths = prompts(examples)
    pixels = np.stack([example.picture for example in examples])
    return Pictures(
        from_local(pixels, sharding, rows),
        from_local(text, sharding, rows),
        None if lengths is None else from_local(lengths, sharding, rows),
        jax.random.wrap_key_data(from_local(keys, sharding, rows)),
    )
