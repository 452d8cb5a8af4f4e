"""What every result of a soak says of itself."""

import importlib.metadata
import os
import platform

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def about(command, packages=PACKAGES):
    """Command, versions and machine."""
    return {
        "command": command,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "cpus": os.cpu_count(),
    }
