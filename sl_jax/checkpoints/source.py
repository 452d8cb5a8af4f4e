"""Where a model comes from: a folder, the tiny base in this package, or the Hugging Face hub."""

from pathlib import Path

from etils import epath

import sl_jax
from sl_jax.checkpoints.huggingface import CheckpointError

TINY = "tiny"


def resolve_model(name: str) -> epath.Path:
    """The checkpoint folder that `name` means.

    Args:
        name: a folder (local or gs://), "tiny" for the packaged tiny base, or a hub id such as
            "Qwen/Qwen-Image-Layered", which is downloaded into the hub's cache.

    Raises:
        CheckpointError: none of these.
    """
    if name == TINY:
        return epath.Path(Path(sl_jax.__file__).parent / "assets" / TINY)
    folder = epath.Path(name)
    if (folder / "model_index.json").exists():
        return folder
    if folder.exists() or name.startswith(("/", ".", "gs://")) or name.count("/") != 1:
        raise CheckpointError(
            f"model {name!r} is no checkpoint: {folder / 'model_index.json'} does not exist; "
            "please pass a folder in the diffusers layout, a hub id, or 'tiny'"
        )
    return epath.Path(_downloaded(name))


def _downloaded(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return snapshot_download(name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model {name!r} is no local folder and could not be fetched from the hub: {error}"
        ) from error
