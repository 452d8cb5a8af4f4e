"""What tests of manifests, containers and READMEs have in common."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from sl_jax.grpo.config import GrpoConfig, from_mapping

ROOT = Path(__file__).parents[2]
DEPLOYMENT = Path(os.environ.get("DEPLOYMENT_VENV", ROOT / ".venv-deployment"))

Manifest = dict[str, Any]


def manifests(path: Path) -> dict[str, Manifest]:
    """The documents of a file by kind; each kind stands there once."""
    documents = list(yaml.safe_load_all(path.read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined."""
    text = path.read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def blocks(path: Path) -> list[str]:
    """The blocks of commands of a README."""
    return re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)


def configured(arguments: Sequence[str], devices: int) -> GrpoConfig:
    """The run that these arguments of `sl_jax.train` configure.

    Raises:
      ConfigError: they cannot run on so many devices.
    """
    files = {"configs/grpo.py": ROOT / "configs" / "grpo.py", "grpo": ROOT / "configs" / "grpo.py"}
    file, _, variant = arguments[0].removeprefix("--config=").partition(":")
    words = ["train", f"--config={files[file]}" + (variant and f":{variant}"), *arguments[1:]]
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)  # where config_flags looks for overrides
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        values(words)
    return from_mapping(values.config.to_dict(), devices)


def deployment(program: str) -> str:
    """A program of the environments that deployments are tried in."""
    folder = DEPLOYMENT.with_name(f"{DEPLOYMENT.name}-xpk") if program == "xpk" else DEPLOYMENT
    path = folder / "bin" / program
    assert path.exists(), (
        f"{path} is missing: please run `prepare_deployment FOLDER` of launch/_env.sh, and name "
        "the folder in DEPLOYMENT_VENV"
    )
    return str(path)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
