"""Where models and adapters come from: folders, the tiny base, or the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from etils import epath

import sl_jax
from sl_jax.checkpoints.byte_ranges import import_problem, is_remote
from sl_jax.checkpoints.errors import CheckpointError

TINY = "tiny"


def resolve_model(name: str, files: Sequence[str] | None = None) -> epath.Path:
    """The checkpoint folder that `name` means.

    Args:
        name: a local folder; a remote one (gs://…), of which nothing is downloaded here; "tiny" for
            the packaged tiny base; or a hub id such as "Qwen/Qwen-Image-Layered", which is
            downloaded into the hub's cache, with the token that the hub's client finds.
        files: patterns of the files that are needed, where not all are: "transformer/*".

    Raises:
        CheckpointError: none of these, or the store's package is not installed.
    """
    if name == TINY:
        return epath.Path(Path(sl_jax.__file__).parent / "assets" / TINY)
    folder = epath.Path(name).expanduser()
    try:
        found = (folder / "model_index.json").exists()
    except ImportError as error:
        raise import_problem(name, error) from error
    if found:
        return folder
    if (
        is_remote(name)
        or folder.exists()
        or name.startswith(("/", ".", "~"))
        or name.count("/") != 1
    ):
        raise CheckpointError(
            f"model {name!r} is no checkpoint: {folder / 'model_index.json'} does not exist; "
            "please pass a folder in the diffusers layout, a hub id, or 'tiny'"
        )
    patterns = None if files is None else ["model_index.json", *files]
    return _downloaded(name, allow_patterns=patterns)


def download(name: str, folder: str = "") -> epath.Path:
    """JSON and safetensors files of one folder of a hub repository, without folders inside it.

    Raises:
        CheckpointError: they cannot be fetched.
    """
    inside = f"{folder}/" if folder else ""
    local = _downloaded(
        name,
        allow_patterns=[f"{inside}*.json", f"{inside}*.safetensors"],
        ignore_patterns=[f"{inside}*/*"],
    )
    return local / folder if folder else local


def _downloaded(name: str, **patterns: list[str] | None) -> epath.Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return epath.Path(snapshot_download(name, **patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is no local folder and could not be fetched from the hub: {error}"
        ) from error
