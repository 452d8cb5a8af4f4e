"""The adapter to start from: what does not fit the model is said before weights load."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sl_jax.checkpoints.adapters import load_adapter, save_adapter_checkpoint
from sl_jax.checkpoints.diffusers_lora import write_diffusers
from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.lora_modules import to_modules
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import abstract_params, make_model
from sl_jax.grpo.config import ComputeConfig, GrpoConfig
from sl_jax.models.lora import LoRAConfig
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.training.adapter import first_adapter
from sl_jax.training.configuration import ConfigError


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def config_only(random_checkpoint, tmp_path_factory):
    """A checkpoint folder of which no weights could be loaded."""
    folder = tmp_path_factory.mktemp("config_only")
    (folder / "transformer").mkdir()
    text = (random_checkpoint / "transformer" / "config.json").read_text()
    (folder / "transformer" / "config.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def params(config_only, layout):
    """Parameters of that model: zeros."""
    model = make_model(config_only, _config().compute, layout)
    shapes = layout.abstract(abstract_params(model))
    return jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), shapes)


def _config(**changes):
    lora = LoRAConfig(3, 6.0, ("to_q", "img_mlp.net.2"))
    return GrpoConfig("run", "m", 1, lora=lora, compute=ComputeConfig("float32"), **changes)


def test_targets_that_match_nothing(config_only, layout):
    config = dataclasses.replace(_config(), lora=LoRAConfig(3, 6.0, ("to_q", "to_nothing")))
    with pytest.raises(ConfigError) as error:
        first_adapter(config, config_only, layout)
    for part in ("config.lora.targets", "'to_nothing' matches no linear layer", "attn.to_q"):
        assert part in str(error.value)


def test_a_model_that_is_not_implemented(config_only, layout, tmp_path):
    settings = json.loads((config_only / "transformer" / "config.json").read_text())
    (tmp_path / "transformer").mkdir()
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(settings | {"guidance_embeds": True}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*guidance_embeds false"):
        first_adapter(_config(), tmp_path, layout)


def test_a_fresh_one_follows_the_seed(config_only, layout, params):
    first, again, other = (
        first_adapter(_config(seed=seed), config_only, layout).on(params) for seed in (1, 1, 2)
    )
    leaves = jax.tree.leaves(first)
    assert {x.shape[-1] for x in leaves if x.ndim == 3} >= {3}
    assert all(map(np.array_equal, leaves, jax.tree.leaves(again)))
    assert not all(map(np.array_equal, leaves, jax.tree.leaves(other)))


def _trained(config_only, layout, params):
    adapter = first_adapter(_config(), config_only, layout).on(params)
    rng = np.random.default_rng(0)
    return adapter.replace(
        lora=jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), adapter.lora)
    )


def test_a_peft_folder_is_taken_up_with_its_own_rank_and_targets(
    config_only, layout, params, tmp_path
):
    adapter = _trained(config_only, layout, params)
    save_peft(tmp_path, adapter, "base")
    config = _config(init_adapter=str(tmp_path))
    config = dataclasses.replace(config, lora=LoRAConfig(9, 1.0, ("to_k",)))
    found = first_adapter(config, config_only, layout).on(params)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    placed = {leaf.sharding.mesh for leaf in jax.tree.leaves(found)}
    assert placed == {layout.mesh}


@pytest.mark.parametrize("form", ["diffusers", "checkpoint", "hub"])
def test_every_form_of_an_adapter_is_taken_up(
    config_only, layout, params, tmp_path, monkeypatch, form
):
    adapter = _trained(config_only, layout, params)
    name = str(tmp_path / "adapter")
    if form == "diffusers":
        write_diffusers(name, to_modules(jax.device_get(adapter)), "base")
        name += "/pytorch_lora_weights.safetensors"
    elif form == "checkpoint":
        save_adapter_checkpoint(name, adapter)
    else:
        save_peft(name, adapter, "base")
        local = name
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: local)
        name = "owner/adapter"
    found = first_adapter(_config(init_adapter=name), config_only, layout).on(params)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


def test_layers_with_other_ranks_and_alphas_keep_their_updates(
    config_only, layout, params, tmp_path
):
    """Layer 1 of to_q gets rank 2 and another alpha; img_mlp is adapted in layer 0 alone."""
    save_peft(tmp_path, _trained(config_only, layout, params), "base")
    path = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model.transformer_blocks."
    tensors = {k: v for k, v in load_file(path).items() if "1.img_mlp" not in k}
    tensors[f"{prefix}1.attn.to_q.lora_A.weight"] = tensors[f"{prefix}1.attn.to_q.lora_A.weight"][
        :2
    ]
    up = tensors[f"{prefix}1.attn.to_q.lora_B.weight"][:, :2]
    tensors[f"{prefix}1.attn.to_q.lora_B.weight"] = np.ascontiguousarray(up)
    save_file(tensors, path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    other = r"1\.attn\.to_q"
    settings |= {"rank_pattern": {other: 2}, "alpha_pattern": {other: 5.0}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

    adapter = load_adapter(tmp_path, params)

    def update(module, layer):
        *path, last = ("blocks", *module)
        lora, scale = adapter.lora, adapter.lora_scale
        for part in (*path, last):
            lora, scale = lora[part], scale[part]
        return scale["scale"][layer] * lora["a"][layer] @ lora["b"][layer]

    def wanted(name, alpha):
        a, b = (tensors[f"{prefix}{name}.lora_{leaf}.weight"] for leaf in "AB")
        return (alpha / np.sqrt(len(a)) * b @ a).T

    for module, layer, name, alpha in (
        (("attn", "to_q"), 0, "0.attn.to_q", 6.0),
        (("attn", "to_q"), 1, "1.attn.to_q", 5.0),
        (("img_mlp", "net_2"), 0, "0.img_mlp.net.2", 6.0),
    ):
        np.testing.assert_allclose(update(module, layer), wanted(name, alpha), rtol=1e-5, atol=1e-6)
    assert not update(("img_mlp", "net_2"), 1).any()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("no folder", "holds no adapter_config.json"),
        ("dora", "'use_dora': True} is not supported"),
        ("unknown module", "modules that the model does not have"),
        ("shape", "but the model's layer maps"),
        ("half", "please pass a plain PEFT LoRA"),
    ],
)
def test_adapters_that_do_not_fit(config_only, layout, params, tmp_path, change, part):
    save_peft(tmp_path, _trained(config_only, layout, params), "base")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(sorted(tensors)))
    if change == "dora":
        settings["use_dora"] = True
    elif change == "unknown module":
        tensors = {k.replace("to_q", "to_z"): v for k, v in tensors.items()}
    elif change == "shape":
        tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])
    elif change == "half":
        del tensors[name]
    save_file(tensors, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    folder = tmp_path / "none" if change == "no folder" else tmp_path
    with pytest.raises(ConfigError) as error:
        first_adapter(_config(init_adapter=str(folder)), config_only, layout)
    assert "config.init_adapter" in str(error.value) and part in str(error.value)
