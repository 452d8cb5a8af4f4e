"""Where pictures without layers come from: folders, Crello, TFDS datasets with an `image`."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

from sl_jax.data.buckets import Bucket
from sl_jax.data.folder import FolderError, PictureIndex, scan_folder
from sl_jax.data.pictures import PictureLimits, shown
from sl_jax.data.tfds_pictures import open_split, parse_named, scan_tfds
from sl_jax.imaging.words import counted

_log = logging.getLogger(__name__)
_DEFAULT_LIMITS = PictureLimits()


def make_dataset(where: str | os.PathLike[str]) -> None:
    """Downloads or makes the dataset that is named, if it is not there yet; folders stay alone.

    Raises:
      FolderError: there is no such dataset or split, or it has no `image`.
    """
    if (named := parse_named(where)) is not None:
        open_split(named)


def scan_pictures(
    where: str | os.PathLike[str],
    buckets: Sequence[Bucket],
    *,
    limits: PictureLimits = _DEFAULT_LIMITS,
    verify: bool = True,
    threads: int | None = None,
) -> PictureIndex:
    """Indexes pictures wherever they are: in a folder, in Crello or in a TFDS dataset.

    Args:
      where: a folder, or `crello#SPLIT`, `crello:FOLDER#SPLIT` or `tfds:NAME#SPLIT`.
      buckets, limits, threads: as in `scan_folder` and `scan_tfds`.
      verify: as in `scan_folder`; examples of datasets are always decoded once.

    Raises:
      FolderError: as these two.
    """
    if parse_named(where) is not None:
        return scan_tfds(os.fspath(where), buckets, limits=limits, threads=threads)
    return scan_folder(where, buckets, limits=limits, verify=verify, threads=threads)


def training_and_held_out(
    where: str | os.PathLike[str],
    buckets: Sequence[Bucket],
    *,
    eval_data: str | os.PathLike[str] | None = None,
    eval_fraction: float = 0.05,
    limits: PictureLimits = _DEFAULT_LIMITS,
    verify: bool = True,
    threads: int | None = None,
) -> tuple[PictureIndex, PictureIndex]:
    """Indexes the pictures to train on and those held out, and logs a summary of each source.

    Args:
      where: pictures to train on, as for `scan_pictures`.
      buckets: static shapes.
      eval_data: held-out pictures, as for `scan_pictures`. Contents that they share with `where`
        are not trained on. If None, the share `eval_fraction` of `where` is held out by content
        hash.
      eval_fraction: 0 ≤ eval_fraction < 1; not used with `eval_data`.
      limits, verify, threads: as in `scan_folder`.

    Returns:
      (training, held-out). Where the fraction of few pictures hits no picture, the first one by
      content hash is held out.

    Raises:
      FolderError: there is no such source, it holds no usable picture, or nothing is left to train
        on.
    """
    scan = functools.partial(
        scan_pictures, buckets=buckets, limits=limits, verify=verify, threads=threads
    )
    index = scan(where)
    if eval_data is None:
        training, held_out = index.split(eval_fraction)
        if eval_fraction and len(index) == 1:
            raise FolderError(
                f"{shown(index.folder)} holds one usable picture; one to train on and another to "
                "evaluate on are needed: please add pictures, or name another folder as eval_data"
            )
        if eval_fraction and not held_out:
            training, held_out = index.split_off_first()
            _log.warning(
                "A share of %g of so few pictures is none: %s is held out, as long as no picture "
                "is added",
                eval_fraction,
                held_out.records[0].name,
            )
        _log_summary(index)
    else:
        held_out = scan(eval_data)
        training = index.without(held_out)
        _log_summary(training)
        _log_summary(held_out)
    _log.info("%s to train on, %d held out", counted(len(training), "picture"), len(held_out))
    if not training:
        every = counted(len(index), "picture")
        raise FolderError(
            f"all that {shown(index.folder)} has is held out ({every}), none are left to train on; "
            "please add pictures, lower eval_fraction, or use another eval_data"
        )
    return training, held_out


def _log_summary(index: PictureIndex) -> None:
    level = logging.WARNING if index.skipped or index.notes else logging.INFO
    _log.log(level, "%s", index.summary())
