"""Two models that differ anywhere have two digests, though not all of them is read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from bucket import Bucket
from safetensors.numpy import load_file, save_file

from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.huggingface import TensorFiles
from sl_jax.checkpoints.lora_modules import LoraModule
from sl_jax.checkpoints.merge import merge
from sl_jax.checkpoints.source import resolve_model
from sl_jax.inference import fingerprints
from sl_jax.inference.fingerprints import checkpoint_digest

_MODULE = "transformer_blocks.2.attn.to_q"


def _merged(folder, seed):
    draw = np.random.default_rng(seed)
    base = resolve_model("tiny")
    with TensorFiles(base / "transformer") as tensors:
        outputs, inputs = tensors.shape(f"{_MODULE}.weight")
    module = LoraModule(*(draw.normal(0, 0.3, s) for s in ((1, inputs), (outputs, 1))), 1.0)
    merge(base, {_MODULE: module}, folder)
    return str(folder)


def test_merges_of_two_adapters_are_two_models(tmp_path):
    """Of one size, with equal names, and beginning and ending with the same mebibyte."""
    one, same, other = (_merged(tmp_path / f"{n}", seed) for n, seed in enumerate((0, 0, 1)))
    contents = [
        Path(folder, "transformer", "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (one, other)
    ]
    assert contents[0][: 2**20] == contents[1][: 2**20]
    assert contents[0][-(2**20) :] == contents[1][-(2**20) :]
    assert checkpoint_digest(one) == checkpoint_digest(same)
    assert len({checkpoint_digest(model) for model in (one, other, "tiny")}) == 3


def _retyped(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: t.astype(np.float64) for name, t in load_file(file).items()}, file)


def _ended_otherwise(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def _with_another_file(folder):
    (folder / "scheduler" / "notes.txt").write_text("")


@pytest.mark.parametrize("largest", [2**26, 1000], ids=["read whole", "read at its ends"])
@pytest.mark.parametrize("change", [_retyped, _ended_otherwise, _with_another_file])
def test_every_file_counts(random_checkpoint, tmp_path, monkeypatch, change, largest):
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", largest)
    monkeypatch.setattr(fingerprints, "_HASHED_BYTES", 100)
    copy = shutil.copytree(random_checkpoint, tmp_path / "copy")
    assert checkpoint_digest(str(copy)) == checkpoint_digest(str(random_checkpoint))
    change(copy)
    assert checkpoint_digest(str(copy)) != checkpoint_digest(str(random_checkpoint))


def test_a_checkpoint_in_a_bucket_is_the_same_one(random_checkpoint, tmp_path, monkeypatch):
    Bucket.install(tmp_path, monkeypatch)
    shutil.copytree(random_checkpoint, tmp_path / "bucket" / "model")
    assert checkpoint_digest("gs://bucket/model") == checkpoint_digest(str(random_checkpoint))


def test_damaged_weights_have_none(random_checkpoint, tmp_path):
    copy = shutil.copytree(random_checkpoint, tmp_path / "copy")
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoint_digest(str(copy))
