"""Packaging of sl_jax; `configs/` is packaged as `sl_jax.configs`.

The core has no accelerator framework: it is what scoring and imaging need, so that
`sl_jax[judge]` serves a judge on a host without JAX. Everything else comes with the platform:
`sl_jax[cpu]`, `sl_jax[cuda]` or `sl_jax[tpu]`.
"""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py",
    "etils[epath]",
    "jaxtyping",
    "ml-collections>=1.0",
    "numpy>=2",
    "pillow>=11.3",
    "pydantic>=2.7",
    "scipy>=1.14",
    "tqdm",
]
JUDGE = [
    "h11",
    "openai>=2",
    "prometheus-client",
    "starlette",
    "uvicorn",
]
TRAINING = [
    *JUDGE,
    "array_record>=0.8.1",
    "flax>=0.12.2",
    "grain>=0.2.15",
    "huggingface_hub>=1.3",
    "importlib_resources",
    "jax>=0.10,<0.13",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.33",
    "psd-tools>=1.26",
    "pyarrow",
    "safetensors",
    "tensorboardX>=2.6.2.2",
    "tensorflow-datasets>=4.9.10",
    "transformers>=5",
]
TEST = [
    *TRAINING,
    "hypothesis",
    # Its compiler, for programs that are compiled for TPUs on hosts without any.
    "jax[tpu]>=0.10,<0.13; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "pytest>=8",
    "pytest-xdist",
    "ruff==0.17.6",
    "setuptools>=77.0.3",
]

setup(
    name="sl_jax",
    version="0.1.0",
    description="Stable-Layers on JAX: fine-tunes Qwen-Image-Layered by Flow-GRPO from a VLM judge",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["sl_jax", "sl_jax.*"]), "sl_jax.configs"],
    package_dir={"sl_jax.configs": "configs"},
    package_data={"sl_jax": ["assets/**/*", "scoring/prompts/*", "eval/templates/*"]},
    install_requires=CORE,
    extras_require={
        "cpu": TRAINING,
        "cuda": [*TRAINING, "jax[cuda12]>=0.10,<0.13"],
        "tpu": [*TRAINING, "jax[tpu]>=0.10,<0.13"],
        "gcs": ["gcsfs"],
        "judge": JUDGE,
        "wandb": ["wandb"],
        "test-without-torch": TEST,
        "test": [*TEST, "diffusers==0.42.*", "peft>=0.19", "torch"],
    },
)
