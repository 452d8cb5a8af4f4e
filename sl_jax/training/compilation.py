"""Compiled programs, kept on disk, so that a run that is started again compiles nothing twice."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache

_FOLDER = "programs"
_DIRECTORY = "jax_compilation_cache_dir"
_SETTINGS = {
    # JAX itself keeps only what took a second to compile: a start has hundreds of smaller programs.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # XLA's own caches get the folder's path as it is: XLA opens no gs://, and the path would be
    # part of every program's key, so that a folder that was moved would hold nothing.
    "jax_persistent_cache_enable_xla_caches": "",
}


@contextmanager
def compilation_cache(place: str, workdir: epath.PathLike) -> Iterator[None]:
    """Keeps compiled programs of JAX, as long as the context lasts.

    A folder that JAX has been told of already (JAX_COMPILATION_CACHE_DIR) goes before "auto". What
    cannot be written there is compiled again at the next start; JAX warns of it.

    Args:
        place: folder, local or gs://; "auto" for `programs` in the work directory; "off" for none.
            Whoever can write there can have code run here.
        workdir: of the run.
    """
    given = jax.config.values[_DIRECTORY]
    if place == "off" or (place == "auto" and given):
        yield
        return
    folder = epath.Path(workdir) / _FOLDER if place == "auto" else epath.Path(place)
    before = {name: jax.config.values[name] for name in (_DIRECTORY, *_SETTINGS)}
    _configure({_DIRECTORY: os.fspath(folder), **_SETTINGS})
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # JAX looks at the settings once, at its first program
