"""Where the captions of a run's pictures come from."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal

from sl_jax.data import PictureIndex, open_record
from sl_jax.imaging.words import counted
from sl_jax.parallel.processes import Processes
from sl_jax.scoring import JudgeWorker
from sl_jax.scoring.captions import CaptionConfig, captions_of

_log = logging.getLogger(__name__)


def to_caption(indices: Sequence[PictureIndex], source: Literal["files", "prompt", "vlm"]) -> int:
    """How many pictures a model will be asked about, once per content."""
    if source != "vlm":
        return 0
    return len({record.content_hash for index in indices for record in index})


def captioned(
    indices: Sequence[PictureIndex],
    source: Literal["files", "prompt", "vlm"],
    judge: JudgeWorker,
    prompts: str,
    processes: Processes,
) -> list[PictureIndex]:
    """The pictures with the captions that the configuration wants; "" where there is none.

    A model is asked by the main process, once per content; all processes get its answers.

    Args:
        indices: pictures with the captions beside them.
        source: see `DataConfig.caption`.
        judge: whose endpoint is asked.
        prompts: folder with caption.md; empty for the packaged one.
        processes: of the run.

    Raises:
        CaptionError: nobody can describe pictures.
        BudgetError: the run may ask no more.
        ProcessError: the main process met one of these.
    """
    if source == "files":
        return list(indices)
    captions: dict[str, str] = {}
    if source == "vlm":
        with processes.together("captioning pictures"):
            if processes.is_main:
                captions = _asked(indices, judge, prompts)
        captions = processes.from_main("sharing captions", captions)
    return [
        dataclasses.replace(
            index,
            records=tuple(
                dataclasses.replace(record, caption=captions.get(record.content_hash, ""))
                for record in index
            ),
        )
        for index in indices
    ]


def _asked(indices: Sequence[PictureIndex], judge: JudgeWorker, prompts: str) -> dict[str, str]:
    """Content hash → caption."""
    openers = {
        record.content_hash: partial(open_record, record.path, index.limits, record.content_hash)
        for index in indices
        for record in index
    }
    _log.info("Asking for captions of %s.", counted(len(openers), "picture"))
    config = CaptionConfig(prompts=prompts or None)
    return judge.call(captions_of(judge.endpoint, openers, config)).result()
