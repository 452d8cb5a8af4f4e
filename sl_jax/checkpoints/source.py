"""Where models and adapters come from: folders, the tiny base, or the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from etils import epath

import sl_jax
from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.checkpoints.errors import CheckpointError

TINY = "tiny"
RELEASE_ID = "Qwen/Qwen-Image-Layered"

_INDEX = "model_index.json"


def resolve_model(name: str, files: Sequence[str] | None = None) -> epath.Path:
    """The checkpoint folder that `name` means.

    Args:
        name: a local folder; a remote one (gs://…), of which nothing is downloaded here; "tiny" for
            the packaged tiny base; or a hub id such as "Qwen/Qwen-Image-Layered", which is
            downloaded into the hub's cache, with the token that the hub's client finds. What
            exists locally comes first.
        files: patterns of the files that are needed, where not all are: "transformer/*".

    Raises:
        CheckpointError: none of these, or the store cannot be read.
    """
    if name == TINY:
        return _asset(TINY)
    folder = reachable(name)
    if (folder / _INDEX).exists():
        return folder
    if not is_hub_id(name) or folder.exists():
        found = f"it has no {_INDEX}" if folder.exists() else f"there is no folder {folder}"
        raise CheckpointError(
            f"model {name!r} is no checkpoint: {found}; please pass a folder in the diffusers "
            "layout, a hub id OWNER/NAME, or 'tiny'"
        )
    # Its index first: a repository that holds something else may be large.
    if not (_downloaded(name, allow_patterns=[_INDEX]) / _INDEX).exists():
        raise CheckpointError(
            f"model {name!r} on the hub has no {_INDEX}, and is no checkpoint in the diffusers "
            "layout; please check the name"
        )
    return _downloaded(name, allow_patterns=None if files is None else [_INDEX, *files])


def release_shapes() -> epath.Path:
    """A folder with the configuration of `RELEASE_ID`'s parts and no tensors: what plans need.

    The normalization of its latents, which no shape depends on, is left at 0 and 1.
    """
    return _asset("qwen_image_layered")


def _asset(name: str) -> epath.Path:
    return epath.Path(Path(sl_jax.__file__).parent / "assets" / name)


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a repository on the hub: OWNER/NAME, of few characters."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.startswith("~")


def download(name: str, folder: str = "") -> epath.Path:
    """JSON and safetensors files of one folder of a hub repository, without folders inside it.

    Raises:
        CheckpointError: they cannot be fetched, or there are none.
    """
    inside = f"{folder}/" if folder else ""
    local = _downloaded(
        name,
        allow_patterns=[f"{inside}*.json", f"{inside}*.safetensors"],
        ignore_patterns=[f"{inside}*/*"],
    )
    if not (local / folder).is_dir():
        raise CheckpointError(
            f"{name} on the hub holds no adapter in {folder}; please check the name"
        )
    return local / folder


def _downloaded(name: str, **patterns: list[str] | None) -> epath.Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return epath.Path(snapshot_download(name, **patterns))
    except (HFValidationError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name}, and the hub gives none: {_reason(name, error)}"
        ) from error


def _reason(name: str, error: Exception) -> str:
    """Why the hub gives nothing, and what to do, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"{name} asks for consent; please give it at https://huggingface.co/{name}, and log in "
            "by hf auth login or HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "it knows no such repository, or shows it to others only; please check the name, or "
            "log in by hf auth login or HF_TOKEN"
        )
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return (
            "it cannot be reached, and its cache lacks these files; please check name and network, "
            "or pass a local folder"
        )
    return " ".join(str(error).split())
