"""Fine-tuning a loaded checkpoint on designs with layers."""

import dataclasses
import json
import runpy
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.checkpoints.adapters import load_adapter, read_adapter
from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline, parameter_shapes
from sl_jax.data import FolderError, write_designs
from sl_jax.flow.schedule import SchedulerConfig, sigma_grid
from sl_jax.inference.prompts import PromptBatches, PromptStore, encode_prompts
from sl_jax.models.codec import encode_frames
from sl_jax.models.lora import LoRAConfig, init_adapter
from sl_jax.models.packing import pack
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.parallel.processes import Processes
from sl_jax.training import finetune
from sl_jax.training.configuration import ConfigError
from sl_jax.training.finetune import fine_tune, from_mapping, packed_frames
from sl_jax.training.metrics import read_metrics
from sl_jax.training.supervised import FlowBatch, Stage

get_config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "sft.py"))["get_config"]


def _values(**changes):
    config = get_config("tiny")
    config.data.path = "designs"
    with config.unlocked():
        for name, value in changes.items():
            parent, _, last = name.rpartition("__")
            (config[parent] if parent else config)[last] = value
    return config.to_dict()


def test_both_variants_make_a_configuration():
    for variant in ("production", "tiny"):
        config = get_config(variant)
        config.data.path = "designs"
        made = from_mapping(config.to_dict(), 8)
        assert made.steps == config.steps and made.mesh.fsdp == -1
    with pytest.raises(ValueError, match="production, tiny"):
        get_config("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": ""}, "config.data.path is ''; please use a folder of designs"),
        ({"stages": ("tunes",)}, r"config.stages is \('tunes',\)"),
        ({"train": "some"}, "config.train is 'some'; please give one of 'lora', 'full'"),
        ({"train": "full"}, "config.export is ''"),
        ({"train": "full", "export": "x", "init_adapter": "y"}, "sl_jax.convert merge"),
        ({"data__buckets": ((60, 64),)}, "multiples of 16"),
        ({"data__min_layers": 5}, "config.data.max_layers is 3; please use at least"),
        ({"data__eval_fraction": 1.0}, "config.data.eval_fraction is 1.0"),
        ({"data__max_text_tokens": 2000}, "config.data.max_text_tokens is 2000"),
        ({"ema": 1.0}, "config.ema is 1.0"),
        ({"lora__size": 3}, "config.lora.size is unknown"),
        ({"batch": 0}, "config.batch is 0; please use at least 1"),
        ({"batch": 12}, "config.batch is 12; please use a multiple of data × fsdp = 8"),
        ({"steps": 0}, "config.steps is 0; please use at least 1"),
        ({"steps": 20}, "warmup_steps is 20; please use less than config.steps"),
        ({"optimizer__decay_steps": 20}, "config.optimizer.decay_steps is 20; please use 0, or"),
        ({"optimizer__name": "sgd"}, "config.optimizer.name is 'sgd'"),
        ({"compute__dtype": "float16"}, "config.compute.dtype is 'float16'"),
        ({"time_distribution": "normal"}, "'uniform', 'logit_normal'"),
        ({"mu": -1.0}, "config.mu is -1.0"),
        ({"mesh__data": 3}, "does not fit 8 devices"),
    ],
)
def test_a_configuration_that_cannot_run_says_why(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_mapping(_values(**changes), 8)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "scheduler",
    [
        SchedulerConfig(shift=2.5),
        SchedulerConfig(use_dynamic_shifting=True),
        SchedulerConfig(use_dynamic_shifting=True, time_shift_type="linear"),
    ],
)
def test_noise_levels_are_those_of_the_sampling_grid(scheduler):
    shift = finetune.time_shift(scheduler, 100)
    assert np.allclose(sigma_grid(8, shift), scheduler.sigmas(8, 100), atol=1e-6)


def test_frames_are_packed_one_after_the_other(random_checkpoint):
    pipeline = _pipeline(random_checkpoint)
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 32, 4), dtype=np.uint8)
    target, picture = packed_frames(pipeline.vae, pipeline.vae_params, jnp.asarray(frames))
    whole = encode_frames(pipeline.vae, pipeline.vae_params, frames.reshape(6, 16, 32, 4))
    wanted = pack(whole.reshape(2, 3, *whole.shape[1:]))
    assert np.allclose(target, wanted, atol=1e-5)
    assert np.allclose(picture, wanted[:, : wanted.shape[1] // 3], atol=1e-5)


def test_a_fresh_adapter_predicts_what_the_base_predicts(random_checkpoint):
    pipeline, grid = _pipeline(random_checkpoint), LatentGrid(1, 1, 1)
    rng = np.random.default_rng(1)
    x, picture, text = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 2, 64), (2, 1, 64), (2, 3, 64))
    )
    t, lengths = jnp.asarray([0.3, 0.9]), jnp.asarray([3, 2])
    fresh = init_adapter(jax.random.key(0), pipeline.params, LoRAConfig(2, 4.0))
    velocity = finetune.tuned_velocity(pipeline.model, grid)
    frozen = finetune.Frozen(pipeline.params, fresh.lora_scale)
    rest = (x, t, FlowBatch(x, picture, text, lengths))
    base = velocity(pipeline.params, None, *rest)
    assert np.array_equal(velocity(fresh.lora, frozen, *rest), base)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, fresh.lora)
    assert not np.allclose(velocity(moved, frozen, *rest), base, atol=1e-3)


def test_captions_stay_on_disk(random_checkpoint, tmp_path, monkeypatch):
    """A batch's rows are those of encoding at once; memory holds the last ones that were used."""
    captions = ["a red box", "two boxes and a long line of words below them", "", "never asked for"]
    texts = ["a prompt", *captions[:2]]
    whole = encode_prompts(random_checkpoint, texts, dtype=np.float32)
    monkeypatch.setattr("sl_jax.inference.prompts._HELD", 1)
    read = []

    class Store(PromptStore):
        def read(self, prompt):
            read.append(prompt)
            return super().read(prompt)

    store = Store(random_checkpoint, tmp_path / "prompts", dtype=np.float32)
    config = finetune.PairedConfig("designs", prompt="a prompt")
    batches = partial(PromptBatches, store)
    texts = finetune._texts(config, {*captions[:3]}, batches)
    assert len(list((tmp_path / "prompts").iterdir())) == 3
    hidden, lengths = texts(captions)
    for found, count, row in zip(hidden, lengths, (1, 2, 0, 0), strict=True):
        assert count == whole.lengths[row]
        np.testing.assert_allclose(found, whole.hidden[row], atol=1e-5)
    assert hidden.shape[1] == max(whole.lengths)
    texts(["a red box"])
    texts(["a red box"])
    assert read == ["a red box", captions[1], "a prompt", "a red box"]
    unused = dataclasses.replace(config, captions=False)
    monkeypatch.setattr("sl_jax.inference.prompts._loaded", None)  # all of them are kept
    hidden, lengths = finetune._texts(unused, {*captions}, batches)(captions[:2])
    assert np.array_equal(hidden[0], hidden[1]) and hidden.shape[1] == whole.lengths[0]


@pytest.mark.parametrize("changed", ["content", "caption", "order", "eval_data"])
def test_processes_need_the_same_designs(tmp_path, changed):
    """In any order: a stream has its own. Captions decide how wide all texts are."""
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        write_designs(host / "designs", "A", range(3), 32, (2,), with_layers=True)
        write_designs(host / "others", "A", range(3, 5), 32, (2,), with_layers=True)
    first = hosts[1] / "designs" / "A-000000"
    if changed == "caption":
        first.with_suffix(".txt").write_text("a longer one than that of the other host")
    elif changed == "order":
        first.rename(first.with_name("Z"))
    else:
        shutil.rmtree(first if changed == "content" else hosts[1] / "others" / "A-000003")

    told = []

    class Process(Processes):
        """Of two, of which the first has told what it found."""

        def all_gather(self, what, value=None, error=None):
            assert error is None
            if what == "comparing designs":
                told.append(value)
            return list(told)

    def data(index):
        paths = (str(hosts[index] / name) for name in ("designs", "others"))
        return finetune._data(finetune.PairedConfig(*paths), Process(index, 2))

    assert [len(part) for part in data(0)] == [3, 2]
    if changed == "order":
        assert [len(part) for part in data(1)] == [3, 2]
    else:
        with pytest.raises(FolderError, match=r"processes \[1\] find other designs than process 0"):
            data(1)


def _pipeline(folder):
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    return load_pipeline(folder, ComputeConfig("float32", remat="none"), layout)


class _Stopped(Exception):
    pass


@pytest.fixture
def run(random_checkpoint, tmp_path, monkeypatch):
    """Runs a small configuration; `stop` ends it before that update."""
    write_designs(tmp_path / "designs", "A", range(10), 32, (2,), with_layers=True)
    (tmp_path / "designs" / "A-000003.txt").write_text("two boxes, one of them red")

    def run(name, stop=None, **changes):
        values = {
            "workdir": str(tmp_path / name),
            "model": str(random_checkpoint),
            "data__path": str(tmp_path / "designs"),
            "data__buckets": ((32, 32),),
            "data__eval_fraction": 0.3,
            "steps": 4,
            "optimizer__warmup_steps": 0,
            "batch": 4,
            "lora__rank": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "mesh__fsdp": 2,
            "mesh__data": 2,
            "mesh__tensor": 2,
        }
        config = from_mapping(_values(**values | changes), 8)
        read = finetune.PairedStream.__call__

        def reading(stream, step):
            if step == stop:
                raise _Stopped
            return read(stream, step)

        def encoded(folder, texts):
            return PromptBatches(PromptStore(random_checkpoint, folder, dtype=np.float32), texts)

        with monkeypatch.context() as patch:
            patch.setattr(finetune.PairedStream, "__call__", reading)
            return fine_tune(config, random_checkpoint, encoded)

    return run


@pytest.mark.slow
def test_stopped_and_resumed_is_the_same_as_never_stopped(run, tmp_path, random_checkpoint):
    whole = run("whole")
    with pytest.raises(_Stopped):
        run("parts", stop=3)
    parts = run("parts")
    names = [path.name for path in sorted(whole.iterdir())]
    assert "adapter_model.safetensors" in names
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, parts)]
    assert weights[0] == weights[1]
    shapes = parameter_shapes(random_checkpoint)
    from_run, from_peft = load_adapter(tmp_path / "whole", shapes), load_adapter(whole, shapes)
    for one, other in zip(jax.tree.leaves(from_run), jax.tree.leaves(from_peft), strict=True):
        assert np.array_equal(one, other)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(_b(from_run)))
    assert read_adapter(tmp_path / "whole").base_model == str(random_checkpoint)
    steps = [r["step"] for r in read_metrics(tmp_path / "parts") if "tune/mse" in r]
    assert steps == [1, 2, 3, 4]
    assert any("tune/held_out_mse" in r for r in read_metrics(tmp_path / "parts"))
    going_on = run("second", steps=1, init_adapter=str(tmp_path / "whole"))
    assert (going_on / "adapter_config.json").exists()
    with pytest.raises(ConfigError, match=r"config\.batch: 4 there, 8 here"):
        run("whole", batch=8)


def _b(adapter):
    return {k: v for k, v in _flat(adapter.lora).items() if k.endswith("b")}


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}/{key}")
    return found


@pytest.mark.slow
def test_all_parameters_become_another_checkpoint(run, tmp_path, random_checkpoint, monkeypatch):
    """Devices hold the state alone, also resumed, and its average alone to be written."""
    shapes = jax.tree.leaves(parameter_shapes(random_checkpoint))
    largest = max(shapes, key=lambda leaf: leaf.size).shape
    each = sum(leaf.shape == largest for leaf in shapes)
    held = []

    def note(owner, name):
        call = getattr(owner, name)

        def noted(*given):
            held.append((name, sum(x.shape == largest for x in jax.live_arrays()) / each))
            return call(*given)

        monkeypatch.setattr(owner, name, noted)

    note(Stage, "run")
    note(finetune, "save_transformer")
    settings = {"train": "full", "export": str(tmp_path / "model"), "steps": 2, "ema": 0.0}
    with pytest.raises(_Stopped):
        run("full", stop=1, **settings)
    target = run("full", **settings)
    assert held == [("run", 4), ("run", 4), ("save_transformer", 1)]
    base, tuned = _pipeline(random_checkpoint), _pipeline(target)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), base.params, tuned.params)
    assert np.mean(jax.tree.leaves(changed)) > 0.8
    assert json.loads((target / "model_index.json").read_text())
    assert (target / "tokenizer").is_dir() and (target / "text_encoder").is_dir()


@pytest.mark.slow
def test_the_mesh_does_not_matter(run, tmp_path, random_checkpoint):
    shapes = parameter_shapes(random_checkpoint)
    flat = {
        name: load_adapter(run(name, steps=2, **mesh), shapes).lora
        for name, mesh in (
            ("alone", {"mesh__data": 8, "mesh__fsdp": 1, "mesh__tensor": 1, "batch": 8}),
            ("spread", {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2, "batch": 8}),
        )
    }
    for one, other in zip(*map(jax.tree.leaves, flat.values()), strict=True):
        assert np.allclose(one, other, atol=2e-4)
