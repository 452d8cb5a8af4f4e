"""The autoencoder against diffusers' AutoencoderKLQwenImage on single frames."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm

from sl_jax.models.vae import Vae, VaeConfig, _Norm, denormalize_latents, normalize_latents

torch.set_num_threads(1)

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "input_channels": 4,
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [1.5, 0.5, 2.0, 1.0],
}
SHALLOW = {"dim_mult": [1, 2], "temperal_downsample": [True]}  # quick to compile


def make_config(**changes):
    config = {**TINY, **changes}
    if config["z_dim"] != 4:
        config["latents_mean"] = [0.1 * i for i in range(config["z_dim"])]
        config["latents_std"] = [1 + 0.1 * i for i in range(config["z_dim"])]
    return config


def make_oracle(config, seed=0):
    """A diffusers model in which every tensor matters to the result and reaches the clamp."""
    torch.manual_seed(seed)
    model = AutoencoderKLQwenImage(**config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("gamma"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.2)
            else:
                taps = tensor[0, :, -1] if tensor.ndim == 5 else tensor[0]
                tensor.normal_(0.0, taps.numel() ** -0.5)
    return model


def param_path(tensor_name):
    """The path in the Flax tree of a checkpoint tensor; None for the unused time_conv."""
    if ".time_conv." in tensor_name:
        return None
    path = re.sub(r"\.(\d+)", r"_\1", tensor_name)
    path = re.sub(r"\.weight$", ".kernel", path)
    return tuple(re.sub(r"\.gamma$", ".scale", path).split("."))


def param_shape(path, shape):
    if path[-1] == "kernel":
        return (*shape[-2:], shape[1], shape[0])
    return (shape[0],)


def convert(state_dict):
    """Checkpoint tensors to Flax parameters, generic over all tensors."""
    params = {}
    for name, tensor in state_dict.items():
        path = param_path(name)
        if path is None:
            continue
        array = tensor.detach().numpy()
        if path[-1] == "kernel":
            array = (array[:, :, -1] if array.ndim == 5 else array).transpose(2, 3, 1, 0)
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = array.reshape(-1) if array.ndim != 4 or path[-1] == "scale" else array
    return {"params": params}


def tree_shapes(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree["params"])
    return {tuple(key.key for key in path): leaf.shape for path, leaf in flat}


def abstract_params(config):
    side = config.spatial_factor
    pixels = jax.ShapeDtypeStruct((1, side, side, config.input_channels), jnp.float32)
    return jax.eval_shape(Vae(config).init, jax.random.key(0), pixels)


def mapped(state_dict):
    return [(param_path(n), t) for n, t in state_dict.items() if param_path(n) is not None]


def relative_error(result, expected):
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    assert result.shape == expected.shape
    return np.abs(result - expected).max() / np.abs(expected).max()


def nhwc(tensor):
    return tensor[:, :, 0].permute(0, 2, 3, 1).detach().numpy()


def frames(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)[:, :, None]


CASES = {
    "rgba": ({}, 24, 40),
    "rgb": ({"input_channels": 3, "base_dim": 16, "num_res_blocks": 2, "z_dim": 16}, 40, 24),
    "three_levels": ({"dim_mult": [1, 3, 2], "temperal_downsample": [True, False]}, 28, 20),
    "ragged_sides": ({}, 29, 18),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers(case):
    changes, height, width = CASES[case]
    config = make_config(**changes)
    oracle = make_oracle(config)
    ours = VaeConfig.from_dict({"_class_name": "AutoencoderKLQwenImage", **config})
    vae, variables = Vae(ours), convert(oracle.state_dict())
    rng = np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, (2, height, width, ours.input_channels)).astype(np.float32)

    with torch.no_grad():
        expected = oracle.encode(frames(pixels)).latent_dist
    posterior = jax.jit(lambda v, x: vae.apply(v, x, method="encode"))(variables, pixels)
    factor = ours.spatial_factor
    assert posterior.mean.shape == (2, height // factor, width // factor, ours.z_dim)
    assert relative_error(posterior.mean, nhwc(expected.mean)) < 1e-5
    assert relative_error(posterior.logvar, nhwc(expected.logvar)) < 1e-5

    latents = rng.normal(size=posterior.mean.shape).astype(np.float32)
    with torch.no_grad():
        clamped = nhwc(oracle.decode(frames(latents)).sample)
        free = nhwc(oracle.decoder(oracle.post_quant_conv(frames(latents))))
    decode = jax.jit(vae.apply, static_argnames=("method", "clamp"))
    assert np.abs(free).max() > 1, "the case must reach the clamp"
    assert relative_error(decode(variables, latents, method="decode"), clamped) < 1e-5
    assert relative_error(decode(variables, latents, method="decode", clamp=False), free) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_mapped(case):
    config = make_config(**CASES[case][0])
    state_dict = make_oracle(config).state_dict()
    expected = {path: param_shape(path, tuple(t.shape)) for path, t in mapped(state_dict)}
    assert tree_shapes(convert(state_dict)) == expected
    assert tree_shapes(abstract_params(VaeConfig.from_dict(config))) == expected


def test_names_and_shapes_at_the_published_size():
    with torch.device("meta"):
        oracle = AutoencoderKLQwenImage(input_channels=4)
    state_dict = oracle.state_dict()
    expected = {path: param_shape(path, tuple(t.shape)) for path, t in mapped(state_dict)}
    config = VaeConfig.from_dict(dict(oracle.config))
    assert config.spatial_factor == 8
    assert tree_shapes(abstract_params(config)) == expected
    unused = {name for name in state_dict if param_path(name) is None}
    modules = (
        "decoder.up_blocks.0.upsamplers.0",
        "decoder.up_blocks.1.upsamplers.0",
        "encoder.down_blocks.5",
        "encoder.down_blocks.8",
    )
    assert unused == {f"{m}.time_conv.{kind}" for m in modules for kind in ("weight", "bias")}


def test_log_variance_is_clipped_as_in_diffusers():
    config = make_config(**SHALLOW)
    oracle = make_oracle(config)
    with torch.no_grad():
        oracle.quant_conv.bias[4:] = torch.tensor([90.0, -90.0, 19.0, -29.0])
    pixels = np.random.default_rng(5).uniform(-1, 1, (1, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        expected = nhwc(oracle.encode(frames(pixels)).latent_dist.logvar)
    vae, variables = Vae(VaeConfig.from_dict(config)), convert(oracle.state_dict())
    posterior = jax.jit(lambda v: vae.apply(v, pixels, method="encode"))(variables)
    assert (expected.min(), expected.max()) == (-30, 20)
    np.testing.assert_allclose(posterior.logvar, expected, atol=1e-4)


@pytest.mark.parametrize("magnitude", [0.0, 1e-13, 1e-11, 1.0])
def test_norm_of_faint_features_matches_diffusers(magnitude):
    x = np.random.default_rng(6).normal(size=(1, 3, 2, 8)) * magnitude
    x = x.astype(np.float32)
    expected = QwenImageRMS_norm(8, images=False)(frames(x))
    result = _Norm().apply({"params": {"scale": jnp.ones(8)}}, x)
    np.testing.assert_allclose(result, nhwc(expected), rtol=1e-5)


def test_gradients_match_diffusers():
    config = make_config(**SHALLOW)
    oracle = make_oracle(config)
    vae, variables = Vae(VaeConfig.from_dict(config)), convert(oracle.state_dict())
    rng = np.random.default_rng(2)
    pixels = rng.uniform(-1, 1, (2, 16, 24, 4)).astype(np.float32)

    posterior = oracle.encode(frames(pixels)).latent_dist
    decoded = oracle.decoder(oracle.post_quant_conv(posterior.mean))
    (((decoded - frames(pixels)) ** 2).mean() + 0.1 * posterior.logvar.mean()).backward()
    expected = convert({n: _grad(p) for n, p in oracle.named_parameters()})

    def loss(variables):
        posterior = vae.apply(variables, pixels, method="encode")
        decoded = vae.apply(variables, posterior.mean, method="decode", clamp=False)
        return jnp.mean((decoded - pixels) ** 2) + 0.1 * jnp.mean(posterior.logvar)

    gradients = jax.jit(jax.grad(loss))(variables)
    errors = jax.tree.map(relative_error, gradients, expected)
    assert max(jax.tree.leaves(errors)) < 1e-4


def _grad(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def test_gradients_are_finite_on_an_all_zero_picture():
    config = make_config(**SHALLOW)
    variables = convert(make_oracle(config).state_dict())
    variables = jax.tree_util.tree_map_with_path(
        lambda path, a: np.zeros_like(a) if path[-1].key == "bias" else a, variables
    )
    vae, pixels = Vae(VaeConfig.from_dict(config)), jnp.zeros((1, 8, 8, 4))

    def loss(variables):
        decoded = vae.apply(variables, pixels)
        return jnp.sum((decoded - 1) ** 2), decoded

    gradients, decoded = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert not np.any(decoded), "every norm must have seen zeros"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["params"]["decoder"]["conv_out"]["bias"]).max() > 0


def test_bfloat16_is_near_float32():
    config = make_config(**SHALLOW)
    variables = convert(make_oracle(config).state_dict())
    config = VaeConfig.from_dict(config)
    pixels = np.random.default_rng(3).uniform(-1, 1, (2, 24, 40, 4)).astype(np.float32)
    low = Vae(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    cast = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), variables)
    full = Vae(config)
    result = jax.jit(lambda v: low.apply(v, pixels, method="encode"))(cast)
    expected = jax.jit(lambda v: full.apply(v, pixels, method="encode"))(variables)
    assert result.mean.dtype == jnp.float32
    assert 1e-5 < relative_error(result.mean, expected.mean) < 0.05
    decoded = jax.jit(lambda v: low.apply(v, expected.mean, method="decode"))(cast)
    wanted = jax.jit(lambda v: full.apply(v, expected.mean, method="decode"))(variables)
    assert decoded.dtype == jnp.float32
    assert 1e-5 < relative_error(decoded, wanted) < 0.1
    made = jax.eval_shape(low.init, jax.random.key(0), pixels)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}


def test_normalization_is_per_channel_and_reversible():
    config = VaeConfig.from_dict(make_config())
    latents = np.random.default_rng(4).normal(size=(2, 3, 5, 4)).astype(np.float32)
    normalized = normalize_latents(jnp.asarray(latents), config)
    np.testing.assert_allclose(normalized[..., 2], (latents[..., 2] - 0.3) / 2.0, rtol=1e-5)
    np.testing.assert_allclose(denormalize_latents(normalized, config), latents, atol=1e-6)


def test_config_round_trip():
    config = VaeConfig.from_dict({"_diffusers_version": "0.42", **make_config()})
    assert VaeConfig.from_dict(dataclasses.asdict(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"dropout": 0.1}, "dropout"),
        ({"temperal_downsample": [True]}, "temperal_downsample needs 3"),
        ({"latents_mean": [0.0]}, "z_dim = 4"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "positive"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"is_residual": True}, "unknown fields \\['is_residual'\\]"),
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLQwenImage"),
    ],
)
def test_unsupported_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig.from_dict({**TINY, **changes})


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="'z_dim'"):
        VaeConfig.from_dict({key: value for key, value in TINY.items() if key != "z_dim"})
