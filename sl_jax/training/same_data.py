"""Whether all processes of a run have found the same data: what batch n holds follows from them."""

from collections.abc import Sequence
from typing import Any

from sl_jax.data.folder import FolderError
from sl_jax.parallel.processes import Processes


def require_same(
    kind: str, fingerprints: Sequence[str], places: Sequence[Any], processes: Processes
) -> None:
    """Compares what all processes have found.

    Args:
        kind: of the data, for messages: "pictures".
        fingerprints: of what this one has found in each of the `places`.
        places: as a message names them.
        processes: of the run.

    Raises:
        FolderError: some have found other data than the main process; in all of them.
    """
    told = processes.all_gather(f"comparing {kind}", list(fingerprints))
    different = [number for number, prints in enumerate(told) if prints != told[0]]
    if different:
        raise FolderError(
            f"processes {different} find other {kind} than process 0 in "
            f"{[str(place) for place in places]}; please give all hosts the same files"
        )
