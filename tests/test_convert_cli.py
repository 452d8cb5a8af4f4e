"""The command: adapters out and in, merged checkpoints, and what it says of mistakes."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import PeftModel
from PIL import Image
from safetensors.numpy import load_file, save_file

import sl_jax
from sl_jax import convert
from sl_jax.checkpoints import merge as merging
from sl_jax.checkpoints import verify as verifying
from sl_jax.checkpoints.adapters import load_adapter, read_adapter
from sl_jax.checkpoints.huggingface import CheckpointError, TensorFiles
from sl_jax.checkpoints.lora_modules import LoraModule
from sl_jax.checkpoints.merge import merge
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.checkpoints.peft import write_peft
from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.flow.sampler import initial_noise
from sl_jax.inference.decomposer import Sampling

torch.set_num_threads(1)

NAMES = [
    f"transformer_blocks.{i}.{name}"
    for i, names in enumerate(
        (("attn.to_q", "attn.to_out.0", "txt_mlp.net.2"), ("attn.to_q", "img_mlp.net.0.proj"))
    )
    for name in names
] + ["proj_out"]


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    return str(stopped.value)


@pytest.fixture(scope="module")
def modules(random_checkpoint):
    """An adapter of the random checkpoint with several ranks and scales."""
    draw = np.random.default_rng(0)
    made = {}
    with TensorFiles(random_checkpoint / "transformer") as files:
        for number, name in enumerate(NAMES):
            outputs, inputs = files.shape(f"{name}.weight")
            rank = 1 + number % 3
            down = draw.normal(0, 0.3, (rank, inputs)).astype(np.float32)
            up = draw.normal(0, 0.3, (outputs, rank)).astype(np.float32)
            made[name] = LoraModule(down, up, (1 + number) / 4)
    return made


@pytest.fixture(scope="module")
def peft_folder(modules, random_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    write_peft(folder, modules, str(random_checkpoint))
    return folder


@pytest.fixture(scope="module")
def workdir(peft_folder, random_checkpoint, tmp_path_factory):
    """A work directory as training leaves it, as far as its adapter goes."""
    folder = tmp_path_factory.mktemp("run")
    average = load_adapter(peft_folder, parameter_shapes(random_checkpoint))
    other = jax.tree.map(np.zeros_like, average)
    checkpoints = RunCheckpoints(folder / "checkpoints")
    checkpoints.save(3, {"adapter": other, "ema": average, "updates": np.int32(7)})
    checkpoints.close()
    configured(folder, model=str(random_checkpoint))
    return folder


def configured(folder, guidance=1.0, **fields):
    """Writes the configuration of a run by reward, as far as its adapter goes."""
    rollout = {"guidance": guidance, "negative_prompt": "much | of <b>it</b>"}
    (folder / "config.json").write_text(json.dumps({"rollout": rollout, **fields}))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, module in wanted.items():
        np.testing.assert_array_equal(found[name].down, module.down)
        np.testing.assert_array_equal(found[name].up, module.up)
        assert np.float32(found[name].scale) == np.float32(module.scale)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_a_run_goes_to_pytorch_and_back(workdir, modules, random_checkpoint, tmp_path, form):
    run("to-peft", workdir, tmp_path / "out", "--format", form)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"peft": {"adapter_config.json", "adapter_model.safetensors"}}
    weights = own.get(form, {"pytorch_lora_weights.safetensors"})
    assert files == weights | {"README.md", "infer.py"}
    assert_same(read_adapter(tmp_path / "out").modules, modules)
    run("from-peft", tmp_path / "out", tmp_path / "back", "--model", random_checkpoint)
    assert_same(read_adapter(tmp_path / "back").modules, modules)
    run("to-peft", tmp_path / "back", tmp_path / "again", "--base-model", "some/base")
    assert_same(read_adapter(tmp_path / "again").modules, modules)
    assert read_adapter(tmp_path / "again").base_model == "some/base"


def test_the_card_tells_how_to_sample(workdir, random_checkpoint, tmp_path):
    run("to-peft", workdir, tmp_path)
    card = (tmp_path / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert f"base_model: {random_checkpoint}\n" in front and "library_name: peft\n" in front
    for part in (
        "Heun, 50 steps (99 evaluations",
        "guidance | 1.0, that is none, as",
        "640 pixels",
        "layers | 4",
    ):
        assert part in text
    assert "PeftModel.from_pretrained" in text and "Flow-GRPO" in text
    (tmp_path / "config.json").write_text("{}")  # not of a run
    run("from-peft", tmp_path, tmp_path / "step", "--model", random_checkpoint)
    run("to-peft", tmp_path / "step", tmp_path / "file", "--format", "diffusers")
    card = (tmp_path / "file" / "README.md").read_text()
    assert "load_lora_weights" in card and "Flow-GRPO" not in card
    assert "| guidance | unknown: the adapter does not say" in card
    assert not re.search(r"\$\w", card + (tmp_path / "infer.py").read_text())


def test_the_card_and_the_script_take_the_guidance_of_the_run(workdir, tmp_path):
    """Also of the adapter that a run exports into its work directory."""
    run_folder = tmp_path / "run"
    shutil.copytree(workdir, run_folder)
    configured(run_folder, 4.0)
    run("to-peft", run_folder, run_folder / "adapter")
    for source in (run_folder, run_folder / "adapter"):
        run("to-peft", source, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        (row,) = re.findall(r"^\| guidance \| (.*) \|$", card, re.M)
        assert row.startswith("4 away from the prompt") and "|" not in row
        script = runpy.run_path(str(tmp_path / "out" / "infer.py"))
        assert (script["GUIDANCE"], script["NEGATIVE_PROMPT"]) == (4.0, "much | of <b>it</b>")
    (run_folder / "config.json").write_text('{"model": "base"}')  # supervised
    run("to-peft", run_folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "guidance | 1.0, that is none" in card and "true layers" in card
    configured(run_folder, "4")
    assert "does not tell its guidance" in refused("to-peft", run_folder, tmp_path / "out")


@pytest.fixture(scope="module")
def decomposer(random_checkpoint, peft_folder):
    return sl_jax.Decomposer.from_pretrained(
        str(random_checkpoint), str(peft_folder), dtype="float32"
    )


def test_the_script_runs(workdir, random_checkpoint, tmp_path):
    """One step of one layer in diffusers, without and with the adapter."""
    run("to-peft", workdir, tmp_path)
    script = runpy.run_path(str(tmp_path / "infer.py"))
    pipe = script["load"](str(random_checkpoint), dtype=torch.float32)
    image = script["resized"](Image.new("RGBA", (30, 50), (200, 10, 10, 128)), 32)
    assert (image.mode, image.size) == ("RGB", (16, 32))
    (found,) = script["decompose"](pipe, image, 1, 1, seed=3)
    (again,) = script["decompose"](pipe, image, 1, 1, seed=3)
    assert (found.mode, found.size) == ("RGBA", (16, 32))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
    pipe.transformer.disable_adapter_layers()
    (base,) = script["decompose"](pipe, image, 1, 1, seed=3)
    assert np.abs(np.asarray(base, int) - found).mean() > 2


def test_the_script_integrates_to_second_order(workdir, tmp_path):
    """dx/dσ = x from σ = 1 to 0, the last step by Euler."""
    run("to-peft", workdir, tmp_path)
    heun = runpy.run_path(str(tmp_path / "infer.py"))["heun"]
    evaluated = []

    def velocity(x, sigma):
        evaluated.append(float(sigma))
        return x

    errors = []
    for steps in (16, 32):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = heun(velocity, torch.ones((), dtype=torch.float64), sigmas)
        exact = torch.exp(-1 + sigmas[-2]) * (1 - sigmas[-2])
        errors.append(float((end - exact).abs()))
    assert errors[1] < errors[0] / 3.8
    assert evaluated[:4] == [1, 15 / 16, 15 / 16, 14 / 16] and len(evaluated) == 31 + 63


@pytest.mark.slow
@pytest.mark.parametrize(("form", "guidance"), [("peft", 1.0), ("diffusers", 3.0)])
def test_the_script_gives_the_layers_of_decompose(
    decomposer, workdir, random_checkpoint, tmp_path, form, guidance
):
    """Same noise: the same layers as here, and others than without the adapter."""
    run("to-peft", workdir, tmp_path, "--format", form)
    script = runpy.run_path(str(tmp_path / "infer.py"))
    assert (script["LAYERS"], script["STEPS"], script["SIZE"]) == (4, 50, 640)
    draw = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(draw).resize((100, 41), Image.Resampling.BICUBIC)
    sampling = Sampling(layers=2, steps=3, size=64, guidance=guidance)
    resized = script["resized"](image, 64)
    frame = sampling.frame(np.asarray(image))
    assert np.abs(np.asarray(resized, int) - frame[..., :3]).max() <= 1
    key = jax.vmap(jax.random.key)(np.array([42]))
    tokens = (sampling.layers + 1) * (frame.shape[0] // 16) * (frame.shape[1] // 16)
    noise = torch.from_numpy(np.array(initial_noise(key, tokens, 64)))
    pipe = script["load"](str(random_checkpoint), dtype=torch.float32)
    options = {"guidance": guidance, "negative_prompt": " ", "noise": noise}
    theirs = script["decompose"](pipe, Image.fromarray(frame[..., :3]), 2, 3, **options)
    (ours,) = decomposer.decompose(frame[None], key, sampling)
    found = np.stack([np.asarray(layer) for layer in theirs])
    assert np.abs(found.astype(int) - ours).max() <= 2
    pipe.transformer.disable_adapter_layers() if form == "peft" else pipe.disable_lora()
    base = script["decompose"](pipe, Image.fromarray(frame[..., :3]), 2, 3, **options)
    assert np.abs(np.asarray(base[1], int) - found[1]).mean() > 2


@pytest.mark.slow
def test_the_script_runs_alone(workdir, random_checkpoint, tmp_path):
    run("to-peft", workdir, tmp_path / "adapter")
    Image.new("RGBA", (30, 50), (200, 10, 10, 128)).save(tmp_path / "picture.png")
    command = [sys.executable, "adapter/infer.py", "picture.png", "out", "--layers", "2"]
    command += ["--steps", "2", "--size", "48", "--dtype", "float32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["composite.png", "layer_0.png", "layer_1.png"]
    for name in names:
        image = Image.open(tmp_path / "out" / name)
        assert (image.mode, image.size) == ("RGBA", (32, 48))


@pytest.fixture(scope="module")
def merged(peft_folder, random_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "new" / "model"
    run("merge", peft_folder, output, "--model", random_checkpoint)
    return output


def test_a_merged_checkpoint_equals_base_and_adapter(
    merged, modules, peft_folder, random_checkpoint
):
    """Its weights are PEFT's, everything else is the base's, byte for byte."""
    base = QwenImageTransformer2DModel.from_pretrained(random_checkpoint / "transformer")
    wanted = PeftModel.from_pretrained(base, peft_folder).merge_and_unload().state_dict()
    found = load_file(merged / "transformer" / "diffusion_pytorch_model.safetensors")
    before = load_file(random_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, wanted[name].numpy(), rtol=1e-5, atol=1e-6)
        assert np.array_equal(tensor, before[name]) == (name.removesuffix(".weight") not in modules)
    files = {p.relative_to(random_checkpoint) for p in random_checkpoint.rglob("*") if p.is_file()}
    assert files == {path.relative_to(merged) for path in merged.rglob("*") if path.is_file()}
    for file in files:
        if file.name != "diffusion_pytorch_model.safetensors" or file.parts[0] != "transformer":
            assert (merged / file).read_bytes() == (random_checkpoint / file).read_bytes()


def sharded(base, folder, kind, shards=3):
    """The base's transformer, in several files with an index, and in another type."""
    shutil.copytree(base, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.astype(kind) for name, tensor in load_file(path).items()}
    path.unlink()
    index = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in sorted(tensors)[number::shards]}
        save_file(part, path.with_name(name), {"format": "pt"})
        index |= dict.fromkeys(part, name)
    content = json.dumps({"metadata": {}, "weight_map": index})
    path.with_name(f"{path.name}.index.json").write_text(content)
    return tensors


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_a_merge_keeps_shards_and_types(modules, random_checkpoint, tmp_path, kind):
    before = sharded(random_checkpoint, tmp_path / "base", kind)
    result = merge(tmp_path / "base", modules, tmp_path / "merged")
    assert (result.changed, result.tensors) == (len(modules), len(before))
    names = [
        sorted(p.name for p in (tmp_path / f / "transformer").iterdir()) for f in ("base", "merged")
    ]
    assert names[0] == names[1] and len(names[0]) == 5
    with TensorFiles(tmp_path / "merged" / "transformer") as files:
        for name, tensor in before.items():
            found = files.read(name)
            assert found.dtype == kind
            module = modules.get(name.removesuffix(".weight"))
            if module:
                update = module.scale * (module.up.astype(np.float64) @ module.down)
                tensor = (tensor.astype(np.float64) + update).astype(kind)
                steps = found.view(np.int16).astype(int) - tensor.view(np.int16)
                assert np.abs(steps).max() <= 1 and (steps != 0).mean() < 0.01
            else:
                np.testing.assert_array_equal(found, tensor)


def test_a_merge_holds_one_tensor_at_a_time(tmp_path):
    """64 MB of weights, in pieces of 1 MB."""
    transformer = tmp_path / "base" / "transformer"
    transformer.mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    tensors = {f"layers.{i}.weight": np.full((512, 512), i, np.float32) for i in range(64)}
    save_file(tensors, transformer / "model.safetensors")
    pair = np.ones((1, 512), np.float32), np.ones((512, 1), np.float32)
    modules = {f"layers.{i}": LoraModule(*pair, 0.5) for i in range(64)}
    tracemalloc.start()
    merge(tmp_path / "base", modules, tmp_path / "merged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6
    found = load_file(tmp_path / "merged" / "transformer" / "model.safetensors")
    assert all((found[name] == tensor + 0.5).all() for name, tensor in tensors.items())


def test_merges_that_cannot_be(
    modules, peft_folder, merged, random_checkpoint, tmp_path, monkeypatch
):
    assert "exists; please name a folder" in refused(
        "merge", peft_folder, merged, "--model", random_checkpoint
    )
    with pytest.raises(CheckpointError, match="is inside the base"):
        merge(random_checkpoint, modules, random_checkpoint / "merged")
    problems = {
        "no.such": LoraModule(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 1.0),
        "proj_out": modules["proj_out"]._replace(up=np.ones((3, 1), np.float32)),
    }
    with pytest.raises(CheckpointError) as error:
        merge(random_checkpoint, problems, tmp_path / "merged")
    assert "no.such is adapted, but the base has no such module" in str(error.value)
    assert "proj_out is adapted as (3, " in str(error.value)
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda _: small)
        with pytest.raises(CheckpointError, match="on a larger disk"):
            merge(random_checkpoint, modules, tmp_path / "merged")
    base = tmp_path / "whole"
    sharded(random_checkpoint, base, np.float64)
    with pytest.raises(CheckpointError, match=r"proj_out.weight is of type F64"):
        merge(base, modules, tmp_path / "merged")
    last = base / "transformer" / "diffusion_pytorch_model-00003-of-00003.safetensors"
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        merge(base, modules, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_an_interrupted_merge_leaves_nothing(modules, random_checkpoint, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_folded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(random_checkpoint, modules, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def printed_difference(text):
    return float(re.search(r"relative difference (\S+)", text)[1])


def test_verify(peft_folder, merged, workdir, random_checkpoint, tmp_path, capsys):
    model = ("--model", random_checkpoint)
    run("verify", workdir, merged, *model)
    text = capsys.readouterr().out
    assert printed_difference(text) < 1e-5
    assert float(re.search(r"changes the output by ([\d.]+)%", text)[1]) > 5
    shutil.copytree(peft_folder, tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    assert "The outputs differ" in refused("verify", peft_folder, tmp_path / "other", *model)
    assert printed_difference(capsys.readouterr().out) > 1e-3
    assert "please pass also what to-peft" in refused("verify", workdir, *model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_verify_what_was_exported(workdir, random_checkpoint, tmp_path, capsys, form, dtype):
    run("to-peft", workdir, tmp_path, "--format", form)
    run("verify", tmp_path, "--model", random_checkpoint, "--dtype", dtype)
    assert printed_difference(capsys.readouterr().out) < {"float32": 1e-5, "bfloat16": 0.03}[dtype]


def test_verify_without_pytorch(peft_folder, random_checkpoint, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        verifying.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    message = refused("verify", peft_folder, "--model", random_checkpoint)
    assert message.startswith("CheckpointError: peft cannot be imported, so that nothing was")
    assert "pip install torch" in message


def test_mistakes_end_in_one_message(peft_folder, random_checkpoint, tmp_path, capsys):
    assert "does not exist" in refused("to-peft", tmp_path / "none", tmp_path / "out")
    assert "model 'none' is no checkpoint" in refused(
        "from-peft", peft_folder, tmp_path / "out", "--model", "none"
    )
    write_peft(
        tmp_path / "wide",
        {"proj_out": LoraModule(np.ones((1, 5), np.float32), np.ones((5, 1), np.float32), 1.0)},
        "base",
    )
    assert "but the model's layer maps" in refused(
        "from-peft", tmp_path / "wide", tmp_path / "out", "--model", random_checkpoint
    )
    assert not (tmp_path / "out").exists()
    for arguments in ((), ("to-peft", "a"), ("to-peft", "a", "b", "--format", "ckpt"), ("melt",)):
        assert refused(*arguments) == "2"
    assert "--format" in capsys.readouterr().err
    for arguments in (("to-peft", "", "out"), ("merge", peft_folder, "")):
        assert refused(*arguments) == "2"
        assert "it is empty; please name a path" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["to-peft", "from-peft", "merge"])
def test_outputs_that_cannot_be_written(
    peft_folder, random_checkpoint, tmp_path, monkeypatch, command
):
    """Noticed before anything is read."""
    monkeypatch.setattr(convert, "read_adapter", None)
    monkeypatch.setattr(convert, "load_adapter", None)
    (tmp_path / "taken").write_text("no folder")
    for output in (tmp_path / "taken", tmp_path / "taken" / "inside"):
        message = refused(command, peft_folder, output)
        assert message == f"{output}: Not a directory; something else is in its way; please " + (
            "choose another place"
        )


def test_a_name_that_is_no_text(peft_folder, random_checkpoint, tmp_path):
    output = tmp_path / "step\udcff"
    message = refused("from-peft", peft_folder, output, "--model", random_checkpoint)
    assert message.endswith(
        "step\\xff is no UTF-8, which checkpoints need; please choose another name"
    )
    assert not output.exists()


def test_a_disk_that_is_full(peft_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").symlink_to("/dev/full")
    message = refused("to-peft", peft_folder, tmp_path / "out")
    assert message == f"{tmp_path / 'out'}: No space left on device; please free some space, " + (
        "or choose a place on another disk"
    )


@pytest.mark.slow
def test_the_command(workdir, tmp_path):
    command = [sys.executable, "-m", "sl_jax.convert"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=900)
    for name in ("to-peft", "from-peft", "merge", "verify"):
        assert name in done.stdout
    arguments = ["to-peft", str(workdir), str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.slow
def test_decompose_takes_every_form(decomposer, workdir, modules, random_checkpoint, tmp_path):
    """A run's work directory and a LoRA file give the layers of the PEFT folder."""
    run("to-peft", workdir, tmp_path, "--format", "diffusers")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    settings = {"layers": 1, "steps": 2, "size": 32}
    wanted = np.asarray(decomposer(image, **settings)[0])
    for form in (workdir, tmp_path / "pytorch_lora_weights.safetensors"):
        other = sl_jax.Decomposer.from_pretrained(
            str(random_checkpoint), str(form), dtype="float32"
        )
        np.testing.assert_array_equal(np.asarray(other(image, **settings)[0]), wanted)
