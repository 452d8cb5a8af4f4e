"""The command, and decomposing from Python: equal to PyTorch, and the same on any devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from etils import epath
from PIL import Image
from psd_tools import PSDImage

import sl_jax
from sl_jax import decompose
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_params, make_model
from sl_jax.flow.sampler import initial_noise
from sl_jax.inference import prompts
from sl_jax.inference.decomposer import Sampling
from sl_jax.inference.folder import Job, Outcome, decompose_pictures, find_pictures
from sl_jax.inference.prompts import DEFAULT_PROMPT, encode_prompts
from sl_jax.models.lora import Adapter, LoRAConfig, init_adapter
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SHORT = Sampling(layers=2, steps=2, size=32)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint, tmp_path_factory):
    """The random checkpoint with the real model's σ grid, which depends on the size."""
    folder = tmp_path_factory.mktemp("decompose") / "model"
    shutil.copytree(random_checkpoint, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"use_dynamic_shifting": True}
    path.write_text(json.dumps(scheduler))
    return folder


@pytest.fixture(scope="module")
def decomposer(checkpoint):
    return sl_jax.Decomposer.from_pretrained(str(checkpoint), dtype="float32")


def _picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def test_prompts_are_encoded_once(decomposer, checkpoint, user_cache, monkeypatch):
    assert len(list((user_cache / "prompts").iterdir())) >= 2
    monkeypatch.setattr(prompts, "_loaded", None)
    again = sl_jax.Decomposer.from_pretrained(str(checkpoint), dtype="float32")
    np.testing.assert_array_equal(again._prompts.hidden, decomposer._prompts.hidden)


def _keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(np.array(seeds))


def test_from_python(decomposer):
    picture = _picture(20, 32)
    picture[..., 3] = 255
    layers = decomposer(Image.fromarray(picture[..., :3]), layers=2, steps=2, size=32)
    assert [(layer.mode, layer.size) for layer in layers] == [("RGBA", (32, 16))] * 2
    frames = np.stack([SHORT.frame(picture)] * 2)
    stacks = decomposer.decompose(frames, _keys(42, 43), SHORT)
    np.testing.assert_array_equal(np.stack([np.asarray(layer) for layer in layers]), stacks[0])
    assert np.abs(stacks[0].astype(int) - stacks[1]).max() > 2


def test_from_python_pictures_are_read_like_files(decomposer, tmp_path):
    """Lying on their side by EXIF, and of 16 bits."""
    settings = {"layers": 1, "steps": 1, "size": 32}
    lying = Image.fromarray(_picture(32, 20)[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    (found,) = decomposer(Image.open(tmp_path / "lying.png"), **settings)
    (wanted,) = decomposer(upright, **settings)
    assert found.size == (32, 16)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    grey = _picture(16, 32)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    (found,) = decomposer(Image.open(tmp_path / "deep.png"), **settings)
    (wanted,) = decomposer(Image.fromarray(grey), **settings)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_seeds_beyond_31_bits(decomposer):
    image = Image.fromarray(_picture(16, 16))
    settings = {"layers": 1, "steps": 1, "size": 16}
    first, last = (decomposer(image, seed=s, **settings)[0] for s in (2**31, 2**32 - 1))
    assert np.abs(np.asarray(first, int) - np.asarray(last, int)).max() > 2
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="please use 0 to 4294967295"):
            decomposer(image, seed=seed, **settings)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Flags → (inputs, job, arguments of the loader), with nothing loaded or decomposed."""
    for name in ("a.png", "b.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"not opened")
    seen = {}

    def pictures(entries, job, load):
        seen.update(names=[entry.path.name for entry in entries], job=job)
        load()
        return Outcome([], [], [])

    def loaded(*arguments, **settings):
        seen["load"] = (*arguments, settings)

    monkeypatch.setattr(decompose, "decompose_pictures", pictures)
    monkeypatch.setattr(decompose.Decomposer, "from_pretrained", loaded)
    monkeypatch.setattr(decompose, "checkpoint_digest", lambda name: f"of {name}")
    monkeypatch.setattr(decompose, "adapter_digest", lambda name: f"of {name}")

    def ask(*arguments):
        command = ["decompose", "--input", f"{tmp_path}", "--output", "out", *map(str, arguments)]
        with flagsaver.flagsaver():
            flags.FLAGS(command)
            assert decompose.run() == 0
        return seen["names"], seen["job"], seen["load"]

    return ask


def test_defaults_are_those_of_the_release(asked):
    names, job, load = asked()
    assert names == ["a.png", "b.jpg"]
    made_by = job.made_by
    assert job == Job(
        epath.Path("out"), Sampling(4, 50, "heun", 640, "longest", 1.0), made_by=made_by
    )
    assert (job.seed, job.transparent, job.recurse, job.overwrite) == (42, False, None, False)
    model, adapter, settings = load
    assert (model, adapter) == ("Qwen/Qwen-Image-Layered", None)
    assert settings["prompt"] == "a clean, well composed image"
    assert (made_by["model_sha256"], made_by["adapter_sha256"]) == (f"of {model}", None)


@pytest.mark.parametrize(
    "names",
    [
        ("model", "adapter", "layers", "guidance", "negative_prompt", "batch_size"),
        ("base-model", "lora", "num-layers", "guidance-scale", "negative-prompt", "batch-size"),
    ],
    ids=["own", "of the release"],
)
def test_every_flag_counts(asked, tmp_path, names):
    values = dict(zip(names, ("base", "some/adapter", 3, 2.5, "blurry", 6), strict=True))
    values |= {"steps": 20, "sampler": "euler", "size": 512, "resize": "area", "prompt": "a poster"}
    values |= {"seed": 7, "recurse": 2, "dtype": "float32"}
    given = (part for name, value in values.items() for part in (f"--{name}", value))
    switches = ("--transparent", "--overwrite", "--nocfg_normalize")
    found, job, load = asked(*given, *switches, "--input", tmp_path / "*.png")
    assert found == ["a.png"]
    assert job.sampling == Sampling(3, 20, "euler", 512, "area", 2.5, normalize=False)
    assert (job.seed, job.batch, job.recurse) == (7, 6, 2) and job.transparent and job.overwrite
    told = {"prompt": "a poster", "negative_prompt": "blurry", "dtype": "float32"}
    assert load == ("base", "some/adapter", told)
    told |= {"model": "base", "model_sha256": "of base"}
    told |= {"adapter": "some/adapter", "adapter_sha256": "of some/adapter"}
    assert job.made_by == told


def test_names_that_are_empty(asked):
    """As those of shell variables that are not set: the working directory is not meant."""
    for name in ("--input", "--output", "--model", "--base-model"):
        with pytest.raises(flags.IllegalFlagValueError, match="is empty; please name a path"):
            asked(name, "")
    _, job, load = asked("--adapter", "")
    assert job.made_by["adapter"] is None and load[1] is None


def test_sizes_have_one_program_each(decomposer, tmp_path):
    """Five pictures of two sizes in batches, one of them not full, and a sixth of its own."""
    for index, side in enumerate((32, 16, 32, 16, 32, 32)):
        picture = Image.fromarray(_picture(side, 32, index)[..., :3])
        picture.save(tmp_path / f"{index}.png")
    program = decomposer._decomposer._program
    program.clear_cache()
    job = Job(epath.Path(tmp_path / "out"), Sampling(layers=1, steps=1, size=32), batch=3)
    outcome = decompose_pictures(find_pictures(str(tmp_path)), job, lambda: decomposer)
    assert len(outcome.written) == 6 and program._cache_size() == 2
    again = Job(epath.Path(tmp_path / "again"), job.sampling, seed=9, batch=3)
    decompose_pictures(find_pictures(str(tmp_path)), again, lambda: decomposer)
    assert program._cache_size() == 2


@pytest.mark.slow
def test_the_example_of_the_readme(checkpoint, adapter, tmp_path):
    """Word for word, but for a model that is small and the number of steps."""
    readme = (ROOT / "README.md").read_text().split("From Python:")[1]
    example = readme.split("```python\n")[1].split("```")[0]
    assert example.count(">>>") == 5
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen-Image-Layered").symlink_to(checkpoint)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "adapter").symlink_to(adapter)
    Image.fromarray(_picture(1200, 1600)[..., :3]).save(tmp_path / "photo.jpg")
    (tmp_path / "example.txt").write_text(example)
    program = (
        "import doctest, sys\n"
        "from sl_jax.inference.decomposer import PictureDecomposer\n"
        "PictureDecomposer.__call__.__kwdefaults__['steps'] = 1\n"
        "failed, tried = doctest.testfile('example.txt', module_relative=False)\n"
        "sys.exit(failed or tried != 5)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A PEFT folder whose update is not zero."""
    model = make_model(checkpoint, ComputeConfig("float32"), Layout(make_mesh(MeshConfig())))
    fresh = init_adapter(
        jax.random.key(3), nn.unbox(abstract_params(model)), LoRAConfig(rank=4, alpha=8.0)
    )
    moved = jax.tree.map(lambda x: x + 0.2, fresh.lora)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_peft(folder, Adapter(moved, fresh.lora_scale), str(checkpoint))
    return folder


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sl_jax.decompose", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_command(checkpoint, adapter, tmp_path):
    for index, name in enumerate("ab"):
        picture = Image.fromarray(_picture(32, 32, index)[..., :3])
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    output = tmp_path / "out"
    flags = (
        *("--input", tmp_path, "--output", output, "--base-model", checkpoint, "--lora", adapter),
        *("--num-layers", 2, "--guidance-scale", 1.0, "--steps", 2, "--size", 32),
        *("--transparent", "--dtype", "float32"),
    )
    first = _run(*flags)
    assert first.returncode == 1, first.stderr
    assert "bad.jpg" in first.stderr and "2 decomposed, 0 there before, 1 failed" in first.stderr
    assert "garble" in first.stderr
    assert sorted(folder.name for folder in output.iterdir()) == ["a", "b"]
    loaded = sl_jax.Decomposer.from_pretrained(str(checkpoint), str(adapter), dtype="float32")
    for name, seed in (("a", 42), ("b", 43)):
        image = Image.open(tmp_path / f"{name}.png")
        layers = loaded(image, layers=2, steps=2, size=32, seed=seed)
        document = PSDImage.open(output / name / "layers.psd")
        for index, layer in enumerate(layers):
            saved = Image.open(output / name / f"layer_{index}.png")
            np.testing.assert_array_equal(np.asarray(saved), np.asarray(layer))
            np.testing.assert_array_equal(np.asarray(document[index].topil()), np.asarray(layer))
        assert len(document) == len(layers) == 2

    (tmp_path / "bad.jpg").unlink()
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = _run(*flags)
    assert again.returncode == 0, again.stderr
    assert "0 decomposed, 2 there before, 0 failed" in again.stderr
    assert written == {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    config = checkpoint / "transformer" / "config.json"
    before = config.read_text()
    config.write_text(before + "\n")  # another model, as far as one can tell
    other = _run(*flags)
    config.write_text(before)
    assert other.returncode == 1 and "was made with model_sha256" in other.stderr
    assert written == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


@pytest.mark.slow
def test_an_adapter_changes_the_layers(checkpoint, adapter, decomposer):
    adapted = sl_jax.Decomposer.from_pretrained(str(checkpoint), str(adapter), dtype="float32")
    frame = SHORT.frame(_picture(32, 32))[None]
    base, changed = (d.decompose(frame, _keys(42), SHORT) for d in (decomposer, adapted))
    assert np.abs(base.astype(int) - changed).mean() > 2


def test_command_says_what_is_wrong(tmp_path):
    missing = _run("--input", tmp_path / "no.png", "--output", tmp_path / "out")
    assert missing.returncode == 1
    assert "FolderError: no picture at" in missing.stderr
    (tmp_path / "taken").write_text("no folder")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for output in ("taken", "taken/inside"):
        taken = _run("--input", tmp_path, "--output", tmp_path / output, "--model", "tiny")
        assert taken.returncode == 1 and "Traceback" not in taken.stderr
        said = taken.stderr.splitlines()[-1]
        assert said.startswith(f"{tmp_path / output}: ") and "please choose another place" in said
    unnamed = _run("--input", tmp_path)
    assert unnamed.returncode != 0 and "--output" in unnamed.stderr


@pytest.mark.slow
def test_results_do_not_depend_on_batch_and_devices(checkpoint, decomposer):
    frames = np.stack([SHORT.frame(_picture(32, 32, seed)) for seed in range(3)])
    together = decomposer.decompose(frames, _keys(5, 6, 7), SHORT)
    reverse = decomposer.decompose(frames[::-1], _keys(7, 6, 5), SHORT)[::-1]
    np.testing.assert_array_equal(together, reverse)
    np.testing.assert_array_equal(
        together[1:2], decomposer.decompose(frames[1:2], _keys(6), SHORT, batch=8)
    )
    wide = decomposer.decompose(frames[2:], _keys(7), SHORT, batch=9)
    assert np.abs(together[2:].astype(int) - wide).max() <= 1
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)
    spread = sl_jax.Decomposer.from_pretrained(str(checkpoint), dtype="float32", mesh=mesh)
    assert (decomposer.batch_multiple, spread.batch_multiple) == (8, 2)
    alone = spread.decompose(frames[2:], _keys(7), SHORT)
    assert np.abs(together[2:].astype(int) - alone).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(layers=3, steps=8, size=96),
        Sampling(layers=2, steps=6, size=64, resize="area", guidance=4.0),
        Sampling(layers=2, steps=6, size=64, resize="area", guidance=2.5, normalize=False),
    ],
    ids=("longest", "area, guided", "area, guided without norm"),
)
def test_heun_equals_pytorch(checkpoint, decomposer, sampling):
    frame = sampling.frame(_picture(41, 100))
    assert frame.shape == (32, 96, 4)
    assert (frame[..., 3] == 255).all() == (sampling.resize == "longest")
    key = _keys(42)
    (ours,) = decomposer.decompose(frame[None], key, sampling)
    noise = initial_noise(key, (sampling.layers + 1) * 2 * 6, 64)
    theirs = _pytorch_layers(checkpoint, frame, np.array(noise), sampling)
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    assert theirs.std() > 10


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["longest", "area"])
def test_pictures_and_prompts_equal_diffusers(checkpoint, monkeypatch, resize):
    """diffusers' pipeline from picture and prompt to layers, as its users call it."""
    prompt, negative = "a poster with «Grüße»", "blurry"
    sampling = Sampling(2, 5, "euler", 64, resize, 3.0 if resize == "area" else 1.0)
    ours = sl_jax.Decomposer.from_pretrained(
        str(checkpoint), prompt=prompt, negative_prompt=negative, dtype="float32"
    )
    image = Image.fromarray(_picture(41, 100))
    shown = image
    if resize == "longest":  # which diffusers lacks, as it does the white behind
        shown = Image.new("RGBA", image.size, "white")
        shown.alpha_composite(image)
    rule = pipeline_qwenimage_layered.calculate_dimensions
    sides = {
        "longest": lambda area, ratio: (64, 32),  # 64 / 100 · 41 = 26.2, rounded to 2 · 16
        "area": lambda area, ratio: rule(64 * 64, ratio),
    }
    monkeypatch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", sides[resize])
    found = ours(
        image,
        **{"layers": 2, "steps": 5, "sampler": "euler", "size": 64, "resize": resize, "seed": 9},
        guidance=sampling.guidance,
    )
    width, height = found[0].size
    noise = initial_noise(_keys(9), 3 * (height // 16) * (width // 16), 64)
    peer = QwenImageLayeredPipeline.from_pretrained(checkpoint, processor=None, dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    wanted = peer(
        shown,
        prompt=prompt,
        negative_prompt=negative,
        true_cfg_scale=sampling.guidance,
        cfg_normalize=True,
        layers=2,
        num_inference_steps=5,
        latents=torch.from_numpy(np.array(noise)),
    ).images[0]
    found, wanted = (np.stack([np.asarray(layer, int) for layer in s]) for s in (found, wanted))
    assert np.abs(found - wanted).max() <= 2
    assert wanted.shape[1:3] == {"longest": (32, 64), "area": (32, 96)}[resize]
    assert wanted.std() > 10


@torch.no_grad()
def _pytorch_layers(
    folder: Path, frame: np.ndarray, noise: np.ndarray, sampling: Sampling
) -> np.ndarray:
    """Heun as the Stable-Layers release describes it, on diffusers' modules."""
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    condition = (vae.encode(pixels).latent_dist.mode() - mean) / std
    height, width = frame.shape[0] // 16, frame.shape[1] // 16
    patches = condition[:, :, 0].reshape(1, -1, height, 2, width, 2)
    condition = patches.permute(0, 2, 4, 1, 3, 5).reshape(1, height * width, 64)

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    grid = np.linspace(1.0, 0, sampling.steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=grid, mu=(height * width / 256) ** 0.5)
    texts = [
        torch.from_numpy(encode_prompts(folder, [prompt], dtype=np.float32).hidden)
        for prompt in (DEFAULT_PROMPT, " ")
    ]

    def forward(x, sigma, text):
        return transformer(
            hidden_states=torch.cat([x, condition], 1),
            timestep=sigma[None],
            encoder_hidden_states=text,
            encoder_hidden_states_mask=torch.ones(text.shape[:2], dtype=torch.long),
            img_shapes=[[(1, height, width)] * (sampling.layers + 2)],
            additional_t_cond=torch.zeros(1, dtype=torch.long),
            return_dict=False,
        )[0][:, : x.shape[1]]

    def velocity(x, sigma):
        wanted = forward(x, sigma, texts[0])
        if sampling.guidance == 1:
            return wanted
        unwanted = forward(x, sigma, texts[1])
        mixed = unwanted + sampling.guidance * (wanted - unwanted)
        if sampling.normalize:
            mixed = mixed * (wanted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return mixed

    x = torch.from_numpy(noise)
    for sigma, following in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        first = velocity(x, sigma)
        guess = x + (following - sigma) * first
        if following > 0:
            guess = x + (following - sigma) * (first + velocity(guess, following)) / 2
        x = guess

    frames = x.reshape(-1, height, width, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = frames.reshape(-1, 16, 1, 2 * height, 2 * width)[1:] * std + mean
    decoded = vae.decode(latents, return_dict=False)[0][:, :, 0].clamp(-1, 1)
    return ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
