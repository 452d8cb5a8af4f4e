"""Work on many files at a time: by threads, in order, with a bar if it takes long."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

_SILENT_SECONDS = 2.0


def in_threads(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    title: str,
    threads: int | None = None,
) -> list[Result]:
    """What `work` returns for each item, in the order of the items.

    Args:
      work: called by several threads; the first error that it raises ends all.
      items: a few of them are in work at a time.
      title: of the progress bar, which shows itself after two seconds.
      threads: default: four a core, at most 32.
    """
    with (
        ThreadPoolExecutor(threads or min(4 * (os.cpu_count() or 1), 32)) as pool,
        tqdm(total=len(items), desc=title, unit="file", delay=_SILENT_SECONDS) as progress,
    ):
        results = []
        try:
            for result in pool.map(work, items):
                results.append(result)
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return results
