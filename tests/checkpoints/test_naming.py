"""Names and shapes of parameters and of the reference models' tensors, at the published sizes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from flax import traverse_util
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sl_jax.checkpoints.naming import MMDIT, TEXT_ENCODER, VAE, sources, to_parameter, to_tensor
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sl_jax.models.vae import Vae, VaeConfig

torch.set_num_threads(1)

TRANSFORMER = {
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "in_channels": 64,
    "out_channels": 16,
    "patch_size": 2,
    "axes_dims_rope": (16, 56, 56),
    "use_layer3d_rope": True,
    "use_additional_t_cond": True,
    "zero_cond_t": False,
    "guidance_embeds": False,
}
AUTOENCODER = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "input_channels": 4,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
LANGUAGE = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
}


def names_and_shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def flat_shapes(tree):
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def wanted_tensors(naming, shapes):
    """Checkpoint tensors that the parameters ask for; no tensor serves two parameters."""
    found = {}
    for path, source in sources(naming, shapes):
        assert not set(source.names) & set(found), path
        found |= dict.fromkeys(source.names, source.shape)
    return found


def vae_shapes():
    config = VaeConfig.from_dict(AUTOENCODER)
    pixels = jax.ShapeDtypeStruct((1, 16, 16, 4), jnp.float32)
    return flat_shapes(jax.eval_shape(Vae(config).init, jax.random.key(0), pixels)["params"])


def text_shapes():
    model = TextEncoder(TextEncoderConfig.from_dict(LANGUAGE))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return flat_shapes(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"])


def transformer_shapes():
    return flat_shapes(nn.unbox(abstract_params(MMDiT(MMDiTConfig.from_dict(TRANSFORMER)))))


def test_transformer_of_20_billion_parameters():
    with torch.device("meta"):
        oracle = QwenImageTransformer2DModel(**TRANSFORMER)
    shapes = transformer_shapes()
    assert wanted_tensors(MMDIT, shapes) == names_and_shapes(oracle)
    assert sum(map(math.prod, shapes.values())) == 20_430_407_232


def test_autoencoder():
    with torch.device("meta"):
        oracle = AutoencoderKLQwenImage(**AUTOENCODER)
    tensors = names_and_shapes(oracle)
    unused = {name for name in tensors if ".time_conv." in name}
    assert wanted_tensors(VAE, vae_shapes()) == {
        name: shape for name, shape in tensors.items() if name not in unused
    }
    assert unused == {
        f"{module}.time_conv.{leaf}"
        for leaf in ("weight", "bias")
        for module in (
            "encoder.down_blocks.5",
            "encoder.down_blocks.8",
            "decoder.up_blocks.0.upsamplers.0",
            "decoder.up_blocks.1.upsamplers.0",
        )
    }


def test_text_encoder_of_7_billion_parameters():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "out_hidden_size": 3584}
    with torch.device("meta"):
        oracle = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(**LANGUAGE, vision_config=vision)
        )
    tensors = names_and_shapes(oracle)
    # transformers names them by its modules; files on the hub lack `language_model.`.
    language = {
        name.replace("model.language_model.", "model."): shape
        for name, shape in tensors.items()
        if name.startswith("model.language_model.")
    }
    rest = {name for name in tensors if not name.startswith("model.language_model.")}
    assert {name.removeprefix("model.").partition(".")[0] for name in rest} == {"visual", "lm_head"}
    shapes = text_shapes()
    assert wanted_tensors(TEXT_ENCODER, shapes) == language
    assert sum(map(math.prod, shapes.values())) == 7_070_619_136


@pytest.mark.parametrize(
    ("naming", "shapes", "layouts"),
    [
        (MMDIT, transformer_shapes, {"linear", "same"}),
        (VAE, vae_shapes, {"conv3d", "conv2d", "gamma", "same"}),
        (TEXT_ENCODER, text_shapes, {"linear", "same"}),
    ],
)
def test_layouts_go_both_ways(naming, shapes, layouts):
    """One tensor of every layout, at small sizes that keep its axes apart."""
    samples = {}
    for _, source in sources(naming, shapes()):
        samples.setdefault(source.layout, source)
    assert samples.keys() == layouts
    draw = np.random.default_rng(0)
    for layout, source in samples.items():
        small = source._replace(
            shape=tuple(min(side, 5 + axis) for axis, side in enumerate(source.shape))
        )
        tensor = draw.normal(size=small.shape).astype(np.float32)
        back = to_tensor(to_parameter(tensor, layout), small)
        if layout == "conv3d":
            assert back.shape[2] == 3 and not back[:, :, :-1].any()
            back, tensor = back[:, :, -1], tensor[:, :, -1]
        np.testing.assert_array_equal(back, tensor)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        (("blocks", "attn", "to_out_0"), "transformer_blocks.{}.attn.to_out.0"),
        (("blocks", "img_mlp", "net_0", "proj"), "transformer_blocks.{}.img_mlp.net.0.proj"),
        (("modulation", "txt_mod_1"), "transformer_blocks.{}.txt_mod.1"),
        (("time_text_embed", "timestep_embedder", "linear_1"),) * 2,
        (("img_in",), "img_in"),
    ],
)
def test_modules_of_paths(path, module):
    wanted = module if isinstance(module, str) else ".".join(module)
    assert MMDIT.module(path) == wanted
