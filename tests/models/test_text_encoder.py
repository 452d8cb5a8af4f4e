"""The text encoder against transformers, at random tiny configurations."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sl_jax.checkpoints.huggingface import load_params
from sl_jax.checkpoints.naming import TEXT_ENCODER
from sl_jax.models.text_encoder import TextEncoder, TextEncoderConfig

torch.set_num_threads(1)

_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 1,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
}
_TEXT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "rope_theta": 1000000.0,
}
_VARIANTS = {
    "grouped": {},
    "one key head": {"num_key_value_heads": 1, "num_hidden_layers": 1},
    "all key heads": {"num_key_value_heads": 6, "rms_norm_eps": 1e-3},
    "other theta": {"rope_theta": 100.0, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
}


def _reference(folder, config):
    """A reference model with weights that matter everywhere, and its parameters here."""
    torch.manual_seed(0)
    vision = _VISION | {"out_hidden_size": config["hidden_size"]}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config, vision_config=vision))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model.eval().save_pretrained(folder)
    return model


def _parameters(folder, model):
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    unused = ("visual.", "lm_head.")
    return load_params(folder, TEXT_ENCODER, nn.meta.unbox(abstract["params"]), unused)


@pytest.mark.parametrize("variant", _VARIANTS)
def test_equals_transformers(tmp_path, variant):
    reference = _reference(tmp_path, _TEXT | _VARIANTS[variant])
    saved = json.loads((tmp_path / "config.json").read_text())
    config = TextEncoderConfig.from_dict(saved)
    assert config == TextEncoderConfig.from_dict(_TEXT | _VARIANTS[variant])
    model = TextEncoder(config)

    generator = np.random.default_rng(1)
    tokens = generator.integers(3, 90, (3, 19))
    valid = np.arange(19) < np.array([[19], [7], [1]])
    with torch.no_grad():
        expected = reference(
            input_ids=torch.from_numpy(np.where(valid, tokens, 0)),
            attention_mask=torch.from_numpy(valid.astype(np.int64)),
            output_hidden_states=True,
        ).hidden_states[-1]
    # What stands in the padding must not matter: the reference had zeros there.
    params = _parameters(tmp_path, model)
    found = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(found[valid], expected.numpy()[valid], atol=1e-5, rtol=0)


def test_bfloat16_stays_near_float32():
    config = TextEncoderConfig.from_dict(_TEXT)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    shapes = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), tokens)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.normal(0, 0.2, leaf.shape).astype(np.float32),
        nn.meta.unbox(shapes),
    )
    exact = jax.jit(TextEncoder(config).apply)(params, tokens)
    rounded = jax.jit(TextEncoder(config, dtype=jnp.bfloat16).apply)(params, tokens)
    assert rounded.dtype == jnp.bfloat16
    assert 1e-4 < float(jnp.abs(exact - rounded).max()) < 0.02


def test_parameters_carry_logical_axes():
    model = TextEncoder(TextEncoderConfig.from_dict(_TEXT))
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    axes = nn.get_partition_spec(abstract)["params"]
    assert tuple(axes["layers"]["self_attn"]["q_proj"]["kernel"]) == ("layers", "embed", "heads")
    assert tuple(axes["layers"]["mlp"]["down_proj"]["kernel"]) == ("layers", "mlp", "embed")
    assert tuple(axes["embed_tokens"]["embedding"]) == (None, "embed")


def test_config_reads_the_three_layouts():
    expected = TextEncoderConfig.from_dict(_TEXT)
    nested = {"text_config": _TEXT, "hidden_size": 1, "vision_config": {"hidden_size": 2}}
    assert TextEncoderConfig.from_dict(nested) == expected
    modern = {k: v for k, v in _TEXT.items() if not k.startswith("rope")}
    modern["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert TextEncoderConfig.from_dict(modern) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "missing .'hidden_size'"),
        ({"rope_theta": None}, "missing .'rope_theta'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads 4"),
        ({"num_attention_heads": 5}, "even multiple"),
    ],
)
def test_config_refuses_what_it_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        TextEncoderConfig.from_dict(_TEXT | change)


def test_config_names_are_the_files():
    assert {f.name for f in dataclasses.fields(TextEncoderConfig)} <= set(_TEXT)
