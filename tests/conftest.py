"""Every test sees eight simulated CPU devices, on which the meshes are tested."""

import logging
import os
import signal

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def interruptible():
    """Of commands that a test ends in this process, pytest keeps heeding Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def messages():
    """Those of sl_jax reach pytest, whatever a command that ran in this process has set up."""
    own = logging.getLogger("sl_jax")
    own.handlers, own.propagate = [], True
    own.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """Tests, and the commands that they start, never write the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SL_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """Commands that tests start compile each program once; this process heeds no such settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """A whole checkpoint folder in the diffusers layout: small, with random float32 weights."""
    from random_base import write_random_base

    return write_random_base(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """Environment variables of processes that are to find an emulated `gs://bucket`."""
    from emulated_bucket import emulated_bucket

    with emulated_bucket(tmp_path_factory.mktemp("bucket")) as environment:
        yield environment
