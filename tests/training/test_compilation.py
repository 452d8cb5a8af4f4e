"""Compiled programs are kept, and found again."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax._src import compiler

from sl_jax.training.compilation import compilation_cache

_HITS, _MISSES = ("/jax/compilation_cache/cache_" + end for end in ("hits", "misses"))


@pytest.fixture
def events():
    """Names of what JAX says of its caches."""
    seen = []

    def listen(event, **_):
        seen.append(event)

    jax.monitoring.register_event_listener(listen)
    yield seen
    jax.monitoring.unregister_event_listener(listen)


@pytest.fixture(autouse=True)
def _nothing_given():
    given = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", given)


def _compile(place, workdir):
    jax.clear_caches()  # as in another process
    with compilation_cache(place, workdir):
        jax.jit(lambda x: jnp.sin(x) * 41)(jnp.ones(3)).block_until_ready()


def test_a_second_start_compiles_nothing(tmp_path, events):
    _compile("auto", tmp_path)
    assert events.count(_MISSES) >= 1
    assert any((tmp_path / "programs").iterdir())
    events.clear()
    _compile("auto", tmp_path)
    assert events.count(_MISSES) == 0 and events.count(_HITS) >= 1


def test_a_folder_of_ones_own(tmp_path, events):
    _compile(str(tmp_path / "mine"), tmp_path / "run")
    _compile(str(tmp_path / "mine"), tmp_path / "another")
    assert _HITS in events
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_programs_are_found_where_the_folder_was_moved_to(tmp_path, events):
    _compile(str(tmp_path / "one"), tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "another")
    events.clear()
    _compile(str(tmp_path / "another"), tmp_path)
    assert events.count(_MISSES) == 0 and events.count(_HITS) >= 1


def test_xla_is_told_of_no_folder(tmp_path):
    """It opens local files alone, and keeps nothing on a bucket."""
    with compilation_cache("auto", tmp_path):
        options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    assert os.fsencode(tmp_path) not in options.SerializeAsString()


def test_none(tmp_path, events):
    _compile("off", tmp_path)
    assert not events.count(_MISSES) and not any(tmp_path.iterdir())


def test_a_folder_that_jax_was_told_of_goes_before_the_default(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    _compile("auto", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    _compile(str(tmp_path / "mine"), tmp_path / "run")
    assert any((tmp_path / "mine").iterdir())
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "told")


def test_settings_are_put_back(tmp_path, events):
    _compile("auto", tmp_path)
    events.clear()
    jax.clear_caches()
    jax.jit(lambda x: jnp.sin(x) * 43)(jnp.ones(3))
    assert _MISSES not in events
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] > 0


def test_a_full_disk_costs_the_cache_alone(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path()), "write_bytes", full)
    with pytest.warns(UserWarning, match="No space left"):
        _compile("auto", tmp_path)
