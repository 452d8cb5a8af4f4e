"""Exported adapters in PyTorch: PEFT and diffusers compute what this package computes."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from flax import traverse_util
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file

from sl_jax.checkpoints.huggingface import load_params
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.lora import DEFAULT_TARGETS, Adapter, LoRAConfig, init_adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid

torch.set_num_threads(1)

CONFIG = MMDiTConfig(3, 16, 2, 12, axes_dims_rope=(4, 6, 6))
GRID = LatentGrid(2, 3, 1)
TARGETS = (*DEFAULT_TARGETS, "img_mod.1", "txt_in", "proj_out", "norm_out.linear", "linear_2")
WORDS = 6
LENGTHS = np.array([6, 2])
TIMES = np.array([0.9, 0.3], np.float32)
PREFIX = "base_model.model."


def make_oracle():
    settings = {k: v for k, v in CONFIG.to_dict().items() if not k.startswith("_")}
    oracle = QwenImageTransformer2DModel(**settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in oracle.parameters():
            tensor.normal_(0, 0.1)
    return oracle


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder, model and parameters of the base."""
    folder = tmp_path_factory.mktemp("base") / "transformer"
    make_oracle().save_pretrained(folder)
    model = MMDiT(CONFIG, remat="block")
    return folder, model, load_params(folder, MMDIT, nn.unbox(abstract_params(model)))


@pytest.fixture(scope="module")
def inputs():
    draw = np.random.default_rng(0)
    sizes = [(GRID.generated_tokens, 64), (GRID.frame_tokens, 64), (WORDS, 12)]
    return [draw.normal(size=(2, *size)).astype(np.float32) for size in sizes]


def random_adapter(params, targets, rank=4, alpha=6.0, seed=0):
    adapter = init_adapter(jax.random.key(seed), params, LoRAConfig(rank, alpha, targets))
    draw = np.random.default_rng(seed)
    lora = jax.tree.map(lambda x: draw.normal(0, 0.2, x.shape).astype(np.float32), adapter.lora)
    return Adapter(lora, adapter.lora_scale)


def torch_velocity(module, inputs):
    latents, condition, text = inputs
    valid = np.arange(WORDS) < LENGTHS[:, None]
    result = module(
        hidden_states=torch.from_numpy(np.concatenate([latents, condition], axis=1)),
        encoder_hidden_states=torch.from_numpy(text),
        encoder_hidden_states_mask=torch.from_numpy(valid),
        timestep=torch.from_numpy(TIMES),
        img_shapes=[[(1, GRID.height, GRID.width)] * (GRID.layers + 2)] * 2,
        additional_t_cond=torch.zeros(2, dtype=torch.long),
        return_dict=False,
    )[0]
    return result[:, : GRID.generated_tokens]


def velocity(model, params, adapter, inputs):
    def run(module):
        return module(*inputs, LENGTHS, module.modulate(TIMES), GRID)

    return nn.apply(run, model)({"params": params, **adapter.variables()})


def compiled(function):
    """Compiling takes longer than computing here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def loaded_by_peft(base_folder, folder, trainable=False):
    oracle = QwenImageTransformer2DModel.from_pretrained(base_folder)
    return PeftModel.from_pretrained(oracle, folder, is_trainable=trainable)


def relative_error(found, truth):
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    assert found.shape == truth.shape
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


def test_outputs_and_gradients_equal_peft(base, inputs, tmp_path):
    folder, model, params = base
    adapter = random_adapter(params, TARGETS)
    weight = np.random.default_rng(1).normal(size=(2, GRID.generated_tokens, 64))
    weight = weight.astype(np.float32)

    def loss(lora):
        found = velocity(model, params, Adapter(lora, adapter.lora_scale), inputs)
        return (weight * found).sum(), found

    (_, found), gradient = compiled(jax.value_and_grad(loss, has_aux=True))(adapter.lora)

    save_peft(tmp_path, adapter, "base")
    peer = loaded_by_peft(folder, tmp_path, trainable=True)
    truth = torch_velocity(peer, inputs)
    (torch.from_numpy(weight) * truth).sum().backward()
    assert relative_error(found, truth.detach()) < 1e-4
    with torch.no_grad(), peer.disable_adapter():
        assert relative_error(found, torch_velocity(peer, inputs)) > 0.1

    save_peft(tmp_path / "gradient", Adapter(gradient, adapter.lora_scale), "base")
    gradients = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    tensors = {n.replace(".default", ""): t for n, t in peer.named_parameters() if "lora_" in n}
    assert gradients.keys() == tensors.keys()
    # The last block's text reaches nothing, but for its keys and values.
    silent = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    for name, tensor in tensors.items():
        wanted = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        if any(f"transformer_blocks.2.{module}." in name for module in silent):
            assert not wanted.any() and not gradients[name].any(), name
        else:
            assert relative_error(gradients[name], wanted) < 1e-4, name


def test_modules_keep_their_own_rank_and_alpha(base, inputs, tmp_path):
    """An adapter put together from two, with another scale in one layer."""
    folder, model, params = base
    parts = [
        random_adapter(params, ("to_q", "to_v", "img_mod.1", "proj_out"), 4, 6.0),
        random_adapter(params, ("to_k", "txt_in"), 2, 100 / 3, seed=1),
    ]
    flat = [
        {k: v for part in parts for k, v in traverse_util.flatten_dict(tree(part)).items()}
        for tree in (lambda part: part.lora, lambda part: part.lora_scale)
    ]
    path = ("blocks", "attn", "to_v", "scale")
    flat[1][path] = flat[1][path].at[1].set(0.25)
    adapter = Adapter(*map(traverse_util.unflatten_dict, flat))
    save_peft(tmp_path, adapter, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    assert config["rank_pattern"] == {
        name: 2 for name in ("txt_in", *(f"transformer_blocks.{i}.attn.to_k" for i in range(3)))
    }
    alphas = config["alpha_pattern"]
    assert alphas.pop("transformer_blocks.1.attn.to_v") == 1.0
    assert alphas.keys() == config["rank_pattern"].keys()
    np.testing.assert_allclose(list(alphas.values()), 100 / 3, rtol=1e-7)
    with torch.no_grad():
        truth = torch_velocity(loaded_by_peft(folder, tmp_path), inputs)
    found = compiled(lambda: velocity(model, params, adapter, inputs))()
    assert relative_error(found, truth) < 1e-4


def test_files_of_an_adapter(base, tmp_path):
    """Also that alpha survives a scale which is no round number in float32."""
    _, _, params = base
    targets = ("attn.to_out.0", "txt_mlp.net.2", "img_in")
    adapter = random_adapter(params, targets, rank=3, alpha=100.0)
    save_peft(tmp_path / "new" / "folder", adapter, "some/base")
    content = json.loads((tmp_path / "new/folder/adapter_config.json").read_text())
    assert content["target_modules"] == sorted(targets)
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (3, 100.0, False)
    assert content["rank_pattern"] == content["alpha_pattern"] == {}
    assert content["base_model_name_or_path"] == "some/base"
    # PEFT's own config class takes it as it is.
    assert LoraConfig.from_pretrained(tmp_path / "new/folder").target_modules == set(targets)
    tensors = load_file(tmp_path / "new/folder/adapter_model.safetensors")
    blocks = [f"transformer_blocks.{i}.{module}" for i in range(3) for module in targets[:2]]
    assert tensors.keys() == {
        f"{PREFIX}{module}.lora_{letter}.weight"
        for module in (*blocks, "img_in")
        for letter in "AB"
    }
    down = tensors[f"{PREFIX}transformer_blocks.1.txt_mlp.net.2.lora_A.weight"]
    np.testing.assert_array_equal(down, adapter.lora["blocks"]["txt_mlp"]["net_2"]["a"][1].T)
    assert down.dtype == np.float32 and down.shape == (3, 128)
