"""Google Cloud Storage, emulated on loopback, for processes that tests start."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("gcsfs", "gcp-storage-emulator==2026.7.19")
# TensorStore wants to know which generation of an object it reads.
_SERVER = """
import sys
from gcp_storage_emulator.handlers import objects

download = objects.download

def with_generation(request, response, storage, *args, **options):
    download(request, response, storage, *args, **options)
    if response.status < 300:
        name = request.params["bucket_name"], request.params["object_id"]
        response["X-Goog-Generation"] = storage.get_file_obj(*name)["generation"]

objects.download = with_generation

from gcp_storage_emulator.server import create_server

create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""
_LIMIT = 120  # seconds, on a busy machine


@contextlib.contextmanager
def emulated_bucket(folder: Path) -> Iterator[dict[str, str]]:
    """Environment variables with which processes find `gs://bucket`, as long as the context lasts.

    Client and emulator are installed into `folder`, and come after what is installed here.
    """
    packages, hook = folder / "packages", folder / "hook"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*install, *_PACKAGES], check=True)
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(packages)!r})\n")
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = {
        "PYTHONPATH": str(hook),
        "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",  # of gcsfs
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the emulator does not know
    }
    with (folder / "emulator.txt").open("w") as log:
        command = [sys.executable, "-c", _SERVER, str(port)]
        emulator = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:
        _wait_for(port, emulator)
        yield environment
    finally:
        emulator.kill()
        emulator.wait()


def _wait_for(port: int, emulator: subprocess.Popen) -> None:
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline and emulator.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", port), 1).close()
            return
        time.sleep(0.1)
    raise RuntimeError("the emulator does not listen")
