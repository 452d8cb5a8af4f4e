"""Adapters in all their files: exact round trips, PyTorch's outputs, and what is refused."""

import json
import re
import shutil

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from etils import epath
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from sl_jax.checkpoints.adapters import (
    adapter_digest,
    load_adapter,
    locate_adapter,
    read_adapter,
    save_adapter_checkpoint,
)
from sl_jax.checkpoints.diffusers_lora import write_diffusers
from sl_jax.checkpoints.huggingface import CheckpointError, load_params
from sl_jax.checkpoints.lora_modules import LoraModule, to_adapter, to_modules
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.checkpoints.peft import save_peft, write_peft
from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.checkpoints.safetensors_file import read_tensors, write_tensors
from sl_jax.models.lora import Adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid

torch.set_num_threads(1)

CONFIG = MMDiTConfig(3, 16, 2, 12, axes_dims_rope=(4, 6, 6))
GRID = LatentGrid(2, 3, 1)
LENGTHS = np.array([6, 2])
TIMES = np.array([0.9, 0.3], np.float32)
WIDTH = CONFIG.width
BLOCK = {
    "attn.to_q": (WIDTH, WIDTH),
    "attn.to_out.0": (WIDTH, WIDTH),
    "attn.add_k_proj": (WIDTH, WIDTH),
    "img_mlp.net.0.proj": (WIDTH, 4 * WIDTH),
    "txt_mlp.net.2": (4 * WIDTH, WIDTH),
    "img_mod.1": (WIDTH, 6 * WIDTH),
}
SINGLE = {"txt_in": (12, WIDTH), "proj_out": (WIDTH, 64)}
SHAPES = SINGLE | {
    f"transformer_blocks.{i}.{name}": shape for i in range(3) for name, shape in BLOCK.items()
}
NAME = "transformer_blocks.1.attn.to_q"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        **{k: v for k, v in CONFIG.to_dict().items() if not k.startswith("_")}
    )
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    """A checkpoint with nothing but a transformer."""
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def shapes(folder):
    return parameter_shapes(folder)


def make_modules(ranks, seed=0, scale=0.75):
    """Random modules: name → rank."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, rank in ranks.items():
        inputs, outputs = SHAPES[name]
        down = draw.normal(0, 0.3, (rank, inputs)).astype(np.float32)
        up = draw.normal(0, 0.3, (outputs, rank)).astype(np.float32)
        made[name] = LoraModule(down, up, scale)
    return made


def stacked(modules, shapes):
    problems = []
    adapter = to_adapter(modules, shapes, problems)
    assert problems == []
    return adapter


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, module in wanted.items():
        np.testing.assert_array_equal(found[name].down, module.down, name)
        np.testing.assert_array_equal(found[name].up, module.up, name)
        assert np.float32(found[name].scale) == np.float32(module.scale), name


# Names of one adapter, each with its own rank and alpha.
_adapters = st.dictionaries(
    st.sampled_from(sorted(SHAPES)),
    st.tuples(st.integers(1, 5), st.floats(2**-7, 300, width=32)),
    min_size=1,
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(_adapters)
def test_round_trips_are_exact(shapes, tmp_path_factory, chosen):
    """Through all formats, and stacked with padding in between."""
    place = tmp_path_factory.mktemp("round")
    modules = {
        name: module._replace(scale=alpha / module.rank)
        for (name, module), (_, alpha) in zip(
            make_modules({n: rank for n, (rank, _) in chosen.items()}).items(),
            chosen.values(),
            strict=True,
        )
    }
    write_peft(place / "peft", modules, "base")
    write_diffusers(place / "diffusers", modules, "base")
    for name in ("peft", "diffusers"):
        assert_same(read_adapter(place / name).modules, modules)
        adapter = load_adapter(place / name, shapes)
        assert_same(to_modules(adapter), modules)
        save_peft(place / f"{name} again", adapter, "base")
        assert_same(read_adapter(place / f"{name} again").modules, modules)


def test_files_do_not_change_on_the_way_through(shapes, tmp_path):
    """Neither the tensors nor the settings."""
    modules = make_modules({name: 1 + i % 3 for i, name in enumerate(SHAPES)})
    save_peft(tmp_path / "first", stacked(modules, shapes), "base")
    save_peft(tmp_path / "second", load_adapter(tmp_path / "first", shapes), "base")
    folders = tmp_path / "first", tmp_path / "second"
    first, second = ((folder / "adapter_config.json").read_text() for folder in folders)
    assert first == second
    first, second = (read_tensors(folder / "adapter_model.safetensors") for folder in folders)
    assert first.metadata == second.metadata
    jax.tree.map(np.testing.assert_array_equal, first.tensors, second.tensors)


def test_checkpoints_go_both_ways(shapes, tmp_path):
    modules = make_modules({name: 1 + i % 3 for i, name in enumerate(SHAPES)})
    adapter = stacked(modules, shapes)
    save_adapter_checkpoint(tmp_path / "step", adapter)
    for place in (tmp_path / "step", tmp_path / "step" / "0"):
        found = read_adapter(place)
        assert (found.layers, found.base_model) == (3, None)
        assert_same(found.modules, modules)
        jax.tree.map(np.testing.assert_array_equal, load_adapter(place, shapes), adapter)


def _in_a_work_directory(folder, adapter):
    save_adapter_checkpoint(folder / "checkpoints", adapter)


def _damaged(folder, adapter):
    save_adapter_checkpoint(folder, adapter)
    shutil.rmtree(folder / "0" / "tree")


def _of_peft(folder, adapter):
    save_peft(folder, adapter, "base")


@pytest.mark.parametrize("put", [save_adapter_checkpoint, _in_a_work_directory, _damaged, _of_peft])
def test_a_folder_takes_one_adapter(shapes, tmp_path, put):
    """A second one would not be found there, or not even be written."""
    first, second = (stacked(make_modules({NAME: 2}, seed), shapes) for seed in range(2))
    put(tmp_path / "out", first)
    before = _contents(tmp_path)
    with pytest.raises(CheckpointError, match="out holds an adapter already; please name another"):
        save_adapter_checkpoint(tmp_path / "out", second)
    assert _contents(tmp_path) == before


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_work_directory_gives_the_average_of_its_newest_checkpoint(shapes, tmp_path):
    adapters = [stacked(make_modules({NAME: 2}, seed), shapes) for seed in range(3)]
    run = RunCheckpoints(tmp_path / "run" / "checkpoints")
    for step in (9, 10):
        average = adapters[0] if step == 9 else adapters[1]
        run.save(step, {"adapter": adapters[2], "ema": average, "updates": np.int32(step)})
    run.close()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "some/base"}))
    assert_same(read_adapter(tmp_path / "run").modules, to_modules(adapters[1]))
    assert read_adapter(tmp_path / "run").base_model == "some/base"
    older = tmp_path / "run" / "checkpoints" / "9"
    assert_same(read_adapter(older).modules, to_modules(adapters[0]))
    assert adapter_digest(older) != adapter_digest(tmp_path / "run")
    assert adapter_digest(older) == adapter_digest(older)


def test_checkpoints_that_hold_no_adapter(tmp_path):
    whole = RunCheckpoints(tmp_path / "whole")
    whole.save(1, {"ema": {"kernel": np.zeros(2)}})
    whole.save(2, {"trained": {"kernel": np.zeros(2)}})
    whole.close()
    with pytest.raises(CheckpointError, match="trains whole parameters"):
        read_adapter(tmp_path / "whole" / "1")
    with pytest.raises(CheckpointError, match=r"\['trained'\], none of \['ema'\]"):
        read_adapter(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "2" / "tree" / "d")
    (tmp_path / "whole" / "2" / "tree" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter(tmp_path / "whole")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_what_peft_saves_is_read_exactly(oracle, shapes, tmp_path, kind, rslora):
    """With ranks and alphas by regular expressions, and only some targets."""
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["attn.to_q", "txt_mlp.net.2", "proj_out"],
        rank_pattern={r"^proj_out": 2, r".*\.1\.attn\.to_q": 3},
        alpha_pattern={r"[02]\.attn\.to_q": 5, "proj_out": 1},
        use_rslora=rslora,
    )
    peer = get_peft_model(QwenImageTransformer2DModel(**oracle.config), config)
    with torch.no_grad():
        for name, tensor in peer.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.3)
                tensor.data = tensor.data.to(kind)
    peer.save_pretrained(tmp_path)
    modules = read_adapter(tmp_path).modules
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in peer.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert modules.keys() == layers.keys() and len(layers) == 7
    for name, layer in layers.items():
        down, up = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
        np.testing.assert_array_equal(modules[name].down, down.detach().float())
        np.testing.assert_array_equal(modules[name].up, up.detach().float())
        assert modules[name].scale == pytest.approx(layer.scaling["default"], rel=1e-12)
    assert {m.rank for m in modules.values()} == {2, 3, 4}
    assert len({m.scale for m in modules.values()}) == 4
    assert_same(to_modules(load_adapter(tmp_path, shapes)), modules)


def test_what_diffusers_saves_is_read_exactly(oracle, tmp_path):
    peer = QwenImageTransformer2DModel(**oracle.config)
    targets = ["attn.to_q", "img_mod.1"]
    peer.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_rslora=True))
    peer.save_lora_adapter(tmp_path / "bare")  # no prefix at all
    modules = read_adapter(tmp_path / "bare").modules
    assert len(modules) == 6
    assert {m.scale for m in modules.values()} == {7 / 3**0.5}
    np.testing.assert_array_equal(
        modules[NAME].down,
        peer.transformer_blocks[1].attn.to_q.lora_A["default"].weight.detach(),
    )


def test_a_lora_file_without_settings_has_scale_1(tmp_path):
    """As in diffusers; with the prefix of either library."""
    modules = make_modules({NAME: 2, "proj_out": 3}, scale=1.0)
    for prefix in ("transformer.", PREFIX, ""):
        tensors = {
            f"{prefix}{name}.lora_{part}.weight": torch.from_numpy(matrix)
            for name, (down, up, _) in modules.items()
            for part, matrix in (("A", down), ("B", up))
        }
        save_torch(tensors, tmp_path / "any name.safetensors")
        assert_same(read_adapter(tmp_path / "any name.safetensors").modules, modules)
        assert_same(read_adapter(tmp_path).modules, modules)


def test_the_simplest_alpha_is_found():
    pair = np.zeros((48, 2), np.float32), np.zeros((2, 48), np.float32)
    for alpha in (100.0, 33.3, 1e-7, 0.0, 128.0):
        assert LoraModule(*pair, float(np.float32(alpha / 48))).alpha == alpha


def inputs():
    draw = np.random.default_rng(0)
    sizes = [(GRID.generated_tokens, 64), (GRID.frame_tokens, 64), (6, 12)]
    return [draw.normal(size=(2, *size)).astype(np.float32) for size in sizes]


@torch.no_grad()
def torch_velocity(module):
    latents, condition, text = inputs()
    return module(
        hidden_states=torch.from_numpy(np.concatenate([latents, condition], axis=1)),
        encoder_hidden_states=torch.from_numpy(text),
        encoder_hidden_states_mask=torch.from_numpy(np.arange(6) < LENGTHS[:, None]),
        timestep=torch.from_numpy(TIMES),
        img_shapes=[[(1, GRID.height, GRID.width)] * (GRID.layers + 2)] * 2,
        additional_t_cond=torch.zeros(2, dtype=torch.long),
        return_dict=False,
    )[0][:, : GRID.generated_tokens].numpy()


@pytest.fixture(scope="module")
def velocity(folder, shapes):
    """Adapter → velocity here; compiled once for all adapters of one structure."""
    params = load_params(folder / "transformer", MMDIT, shapes)

    def run(module):
        return module(*inputs(), LENGTHS, module.modulate(TIMES), GRID)

    compiled = jax.jit(
        lambda variables: nn.apply(run, MMDiT(CONFIG))({"params": params, **variables}),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return lambda adapter: np.asarray(compiled(adapter.variables()))


def error(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_outputs_equal_pytorch(oracle, folder, shapes, velocity, tmp_path, seed):
    """Random adapters, uneven in everything, through both formats and all three loaders."""
    draw = np.random.default_rng(seed)
    names = sorted(draw.choice(sorted(SHAPES), 12, replace=False))
    modules = {
        name: module._replace(scale=float(np.float32(draw.uniform(0.2, 3))))
        for name, module in make_modules({n: int(draw.integers(1, 5)) for n in names}, seed).items()
    }
    ours = velocity(stacked(modules, shapes))
    save_peft(tmp_path / "peft", stacked(modules, shapes), "base")
    write_diffusers(tmp_path / "diffusers", modules, "base")
    place = folder / "transformer"
    by_peft = PeftModel.from_pretrained(
        QwenImageTransformer2DModel.from_pretrained(place), tmp_path / "peft"
    )
    by_diffusers, peft_by_diffusers = (
        QwenImageTransformer2DModel.from_pretrained(place) for _ in range(2)
    )
    by_diffusers.load_lora_adapter(
        tmp_path / "diffusers", weight_name="pytorch_lora_weights.safetensors"
    )
    peft_by_diffusers.load_lora_adapter(
        tmp_path / "peft", weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    for peer in (by_peft, by_diffusers, peft_by_diffusers):
        assert error(ours, torch_velocity(peer)) < 1e-4
    assert error(torch_velocity(oracle), ours) > 0.01


def write_case(folder, tensors=None, config=None):
    """A good PEFT folder with some things changed."""
    write_peft(folder, make_modules({NAME: 2, "proj_out": 3}), "base")
    path = folder / "adapter_model.safetensors"
    write_tensors(path, read_tensors(path).tensors | (tensors or {}))
    text = folder / "adapter_config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | (config or {})))


A, B = (f"{PREFIX}{NAME}.lora_{part}.weight" for part in "AB")
_REFUSED = [
    ({}, {"use_dora": True}, "{'use_dora': True} is not supported"),
    ({}, {"bias": "lora_only"}, "{'bias': 'lora_only'} is not supported"),
    ({}, {"lora_bias": True}, "{'lora_bias': True} is not supported"),
    ({}, {"modules_to_save": ["proj_out"]}, "{'modules_to_save': ['proj_out']} is not"),
    ({}, {"peft_type": "LOHA"}, "{'peft_type': 'LOHA'} is not supported"),
    ({}, {"fan_in_fan_out": True}, "{'fan_in_fan_out': True} is not supported"),
    ({}, {"init_lora_weights": "pissa"}, "{'init_lora_weights': 'pissa'} is not supported"),
    ({}, {"use_qalora": True}, "{'use_qalora': True} is not supported"),
    ({}, {"kasa_config": {"beta": 1}}, "{'kasa_config': {'beta': 1}} is not supported"),
    ({}, {"layer_replication": [[0, 2]]}, "{'layer_replication': [[0, 2]]} is not supported"),
    ({}, {"lora_alpha": "16"}, "lora_alpha is '16', not a positive number"),
    ({}, {"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({}, {"r": 0}, "r is 0, not a positive number"),
    ({}, {"alpha_pattern": {"(": 3}}, "alpha_pattern: '(' is no regular expression"),
    ({}, {"alpha_pattern": {"to_q": None}}, "alpha_pattern: 'to_q' has None, not a number"),
    ({}, {"rank_pattern": 3}, "rank_pattern is 3, not a table"),
    ({}, {"r": 5, "rank_pattern": {}}, f"{NAME} has rank 2, but the settings tell 5"),
    ({}, {"rank_pattern": {"proj_out": 4}}, "proj_out has rank 3, but the settings tell 4"),
    ({f"{PREFIX}{NAME}.lora_magnitude_vector": 1}, {}, "lora_magnitude_vector: DoRA"),
    ({f"{PREFIX}{NAME}.lora_B.bias": 1}, {}, "lora_B.bias: a bias"),
    ({f"{PREFIX}{NAME}.bias": 1}, {}, "to_q.bias: a bias"),
    ({f"{PREFIX}proj_out.modules_to_save.weight": 1}, {}, ": a module trained whole"),
    ({f"{PREFIX}x.lora_embedding_A": 1}, {}, ": an adapted embedding"),
    ({f"{NAME}.lora_down.weight": 1}, {}, "lora_down.weight: another naming"),
    ({f"{PREFIX}{NAME}.alpha": 1}, {}, ".alpha: another naming"),
    ({"unheard_of": 1}, {}, "unheard_of: not known"),
    ({"text_encoder.q.lora_A.weight": 1}, {}, "text_encoder.q.lora_A.weight: not known"),
    ({f"{PREFIX}img_in.lora_A.weight": (2, 64)}, {}, "img_in has no lora_B"),
    ({f"{PREFIX}img_in.lora_B.weight": (WIDTH, 2)}, {}, "img_in has no lora_A"),
    ({A: (3, WIDTH)}, {}, f"{NAME}: lora_A (3, 32) and lora_B (32, 2) do not fit"),
    ({A: (0, WIDTH), B: (WIDTH, 0)}, {}, "do not fit"),
    ({A: (2, WIDTH, 1)}, {}, "do not fit"),
    ({A: np.full((2, WIDTH), np.nan, np.float32)}, {}, "lora_A.weight holds values that are not"),
    ({A: np.zeros((2, WIDTH), np.int8)}, {}, "lora_A.weight is of type I8, not a float"),
    ({A: (2, 7)}, {}, f"{NAME} has lora_A (2, 7) and lora_B (32, 2), but the model's layer maps"),
    (
        {f"{PREFIX}transformer_blocks.3.attn.to_q.lora_{part}.weight": (2, 2) for part in "AB"},
        {},
        "modules that the model does not have: transformer_blocks.3.attn.to_q",
    ),
]


def changed(tensors):
    """Shapes become tensors of that shape."""
    return {
        name: value if isinstance(value, np.ndarray) else np.zeros(value, np.float32)
        for name, value in tensors.items()
    }


@pytest.mark.parametrize(("tensors", "config", "part"), _REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(shapes, tmp_path, tensors, config, part):
    write_case(tmp_path, changed(tensors), config)
    with pytest.raises(CheckpointError, match=re.escape(part)):
        load_adapter(tmp_path, shapes)


def test_one_error_lists_everything(shapes, tmp_path):
    tensors = {
        f"{PREFIX}{NAME}.lora_magnitude_vector": 1,
        f"{PREFIX}img_in.lora_A.weight": (2, 64),
        f"{PREFIX}proj_out.lora_A.weight": (3, 7),
        **{f"{PREFIX}no.such.lora_{part}.weight": (2, 2) for part in "AB"},
    }
    write_case(tmp_path, changed(tensors), {"use_dora": True, "bias": "all"})
    with pytest.raises(CheckpointError) as error:
        load_adapter(tmp_path, shapes)
    lines = str(error.value).splitlines()
    assert len(lines) == 7
    for part in ("magnitude", "img_in has no", "maps 32 to 64", "no.such", "use_dora", "'all'"):
        assert sum(part in line for line in lines) == 1, part


def test_the_settings_of_lora_files_are_held_to_the_same(shapes, tmp_path):
    path = tmp_path / "a.safetensors"
    modules = make_modules({NAME: 2})
    write_diffusers(tmp_path / "good", modules, "base")
    tensors = read_tensors(tmp_path / "good" / "pytorch_lora_weights.safetensors").tensors
    settings = {"transformer.r": 2, "transformer.lora_alpha": 8}
    cases = [
        (settings, ()),
        (settings | {"transformer.use_dora": True}, ("{'use_dora': True} is not supported",)),
        (settings | {"text_encoder.r": 3}, ("text_encoder.r is of another component",)),
        ({"transformer.r": 2}, ("lora_alpha is None, not a positive number",)),
        (settings | {"transformer.r": 3}, (f"{NAME} has rank 2, but the settings tell 3",)),
        ([], ("must hold a JSON object",)),
        ("{", ("is not valid JSON",)),
    ]
    for told, parts in cases:
        text = told if isinstance(told, str) else json.dumps(told)
        write_tensors(path, tensors, {"lora_adapter_metadata": text})
        if not parts:
            assert {m.scale for m in read_adapter(path).modules.values()} == {4.0}
        for part in parts:
            with pytest.raises(CheckpointError, match=re.escape(part)):
                load_adapter(path, shapes)


def test_an_adapter_of_another_width_is_no_padding(shapes):
    """Modules that fit next to one that does not do not slip through."""
    modules = make_modules({"transformer_blocks.0.attn.to_q": 2, NAME: 2})
    modules[NAME] = modules[NAME]._replace(down=np.zeros((2, 9), np.float32))
    problems = []
    adapter = to_adapter(modules, shapes, problems)
    assert len(problems) == 1 and "transformer_blocks.1.attn.to_q has lora_A (2, 9)" in problems[0]
    assert not traverse_util.flatten_dict(adapter.lora)


def test_equal_tensors_are_equal_files(tmp_path):
    metadata = {name: name.upper() for name in ("zeta", "alpha", "ratio", "dt")}
    tensors = {"b": np.arange(5, dtype=np.float32), "a": np.ones((2, 3), np.float16)}
    contents = []
    for number in range(8):
        path = epath.Path(tmp_path / f"{number}.safetensors")
        write_tensors(path, tensors, metadata)
        contents.append(path.read_bytes())
    assert len(set(contents)) == 1
    again = read_tensors(path)
    assert again.metadata == metadata | {"format": "pt"}
    assert all(np.array_equal(again.tensors[name], tensors[name]) for name in tensors)
    assert load_file(path).keys() == tensors.keys()


def test_files_that_cannot_be_read(tmp_path):
    write_case(tmp_path / "good")
    whole = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    damages = {
        "empty": b"",
        "short": whole[:5],
        "header": whole[:200],
        "tensors": whole[:-7],
        "longer": whole + b"\0",
        "length": (2**60).to_bytes(8, "little") + whole[8:],
        "json": whole[:8] + b"[" + whole[9:],
        "noise": rng.bytes(500),
        "pickle": b"\x80\x04\x95" + whole,
    }
    for name, content in damages.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        (folder / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}/adapter_model.safetensors"):
            read_adapter(folder)
    (tmp_path / "good" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_adapter(tmp_path / "good")


def test_pickles_are_refused(tmp_path):
    write_case(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="please pass the whole folder"):
        read_adapter(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"\x80")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "pytorch_lora_weights.bin").write_bytes(b"\x80")
    for name in ("peft", "bare", "peft/adapter_model.bin"):
        with pytest.raises(CheckpointError, match="can run code when loaded"):
            read_adapter(tmp_path / name)


def test_where_adapters_are_looked_for(tmp_path, monkeypatch):
    write_case(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    assert locate_adapter(path) == locate_adapter(tmp_path / "peft")
    shutil.copy(path, tmp_path / "one.safetensors")
    assert locate_adapter(str(tmp_path)).path.name == "one.safetensors"
    shutil.copy(path, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"several LoRA files, .*two\.safetensors"):
        locate_adapter(tmp_path)
    shutil.copy(path, tmp_path / "pytorch_lora_weights.safetensors")
    assert locate_adapter(tmp_path).path.name == "pytorch_lora_weights.safetensors"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoints of a run, and no LoRA file"):
        locate_adapter(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="is no adapter"):
        locate_adapter(tmp_path / "notes.txt")
    for name in (tmp_path / "none", "none", "./no/ne", "~/none at all"):
        with pytest.raises(CheckpointError, match="does not exist"):
            locate_adapter(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for name in ("runs/one/adapter", "runs/one/adapter/deep", "not valid/name", "a//b"):
        with pytest.raises(CheckpointError, match="does not exist"):
            locate_adapter(name)
    for name in ("nobody/has-this-adapter", "runs/two/adapter"):
        with pytest.raises(CheckpointError, match=r"there is no folder .*, and the hub gives none"):
            locate_adapter(name)


@pytest.mark.parametrize("inside", ["", "/deep/folder"])
def test_adapters_on_the_hub(tmp_path, monkeypatch, inside):
    """Only the files of one folder are asked for, not those of a whole model beside them."""
    asked = {}

    def snapshot(name, **patterns):
        asked[name] = patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    write_case(tmp_path / inside.lstrip("/"))
    assert locate_adapter(f"owner/name{inside}").path == tmp_path / inside.lstrip("/")
    root = inside.lstrip("/") + "/" if inside else ""
    assert asked == {
        "owner/name": {
            "allow_patterns": [f"{root}*.json", f"{root}*.safetensors"],
            "ignore_patterns": [f"{root}*/*"],
        }
    }


def test_digests_tell_settings_and_weights_apart(tmp_path):
    for name, config, tensors in (
        ("a", {}, {}),
        ("b", {}, {}),
        ("c", {"lora_alpha": 5}, {}),
        ("d", {}, {A: np.ones((2, WIDTH), np.float32)}),
    ):
        write_case(tmp_path / name, tensors, config)
    digests = [adapter_digest(tmp_path / name) for name in "abcd"]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    path = tmp_path / "a" / "adapter_model.safetensors"
    shutil.copy(path, tmp_path / "file.safetensors")
    assert len(adapter_digest(tmp_path / "file.safetensors")) == 64


def test_half_precision_of_every_kind(tmp_path):
    for kind in (np.float16, ml_dtypes.bfloat16):
        tensors = {A: np.full((2, WIDTH), 1 / 3, kind), B: np.full((WIDTH, 2), 3e-5, kind)}
        save_file(tensors, tmp_path / "x.safetensors")
        module = read_adapter(tmp_path / "x.safetensors").modules[NAME]
        assert module.down.dtype == module.up.dtype == np.float32
        np.testing.assert_array_equal(module.down, tensors[A].astype(np.float32))


def test_gradients_do_not_reach_padding(shapes):
    """The padding of a stack stays zero however long it is trained."""
    modules = make_modules({"transformer_blocks.0.attn.to_q": 4, NAME: 2})
    adapter = stacked(modules, shapes)
    to_q = adapter.lora["blocks"]["attn"]["to_q"]
    scale = adapter.lora_scale["blocks"]["attn"]["to_q"]["scale"]
    x = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)

    def loss(tree):
        return sum((scale[i] * x @ tree["a"][i] @ tree["b"][i] ** 2).sum() for i in range(3))

    gradient = jax.grad(loss)(to_q)
    for layer, rank in enumerate((4, 2, 0)):
        a, b = (np.asarray(gradient[part][layer]) for part in "ab")
        assert a[:, :rank].any() == (rank > 0) and not a[:, rank:].any() and not b[rank:].any()
    trained = jax.tree.map(lambda x, g: x - 0.1 * np.asarray(g), to_q, gradient)
    moved = Adapter({"blocks": {"attn": {"to_q": trained}}}, adapter.lora_scale)
    assert {name: m.rank for name, m in to_modules(moved).items()} == {
        "transformer_blocks.0.attn.to_q": 4,
        NAME: 2,
    }


def test_a_repository_without_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="owner/name on the hub holds no adapter in no/where"):
        locate_adapter("owner/name/no/where")
