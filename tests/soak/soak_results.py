"""What every result of a soak says of itself."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def about(command, packages=PACKAGES):
    """Command, commit, versions and machine."""
    return {
        "command": command,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "cpus": os.cpu_count(),
    }


def commit():
    """What is checked out; with "-dirty" where tracked files were changed since."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.check_output(described, cwd=Path(__file__).parent, text=True).strip()
