"""Implementations of attention against its definition, and which of them is chosen."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_jax.checkpoints.pipeline import ComputeConfig, make_model
from sl_jax.models.attention import Attention, choose_implementation
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.splash import BlockLimits, block_sizes, splash_attention
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

# Several tiles of each kind, and two kernels or one in the backward pass.
SMALL_TILES = BlockLimits(query=256, key=256, scores=128)
TWO_KERNELS = SMALL_TILES._replace(fused=1)
# Compiling takes longer than computing here.
COMPILE_FAST = {"xla_backend_optimization_level": 0}


def definition(query, key, value, lengths):
    """Softmax attention in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("bshd,bthd->bhst", query, key, precision="highest")
    scores /= np.sqrt(query.shape[-1])
    if lengths is not None:
        valid = jnp.arange(key.shape[1]) < jnp.asarray(lengths)[:, None]
        scores = jnp.where(valid[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("bhst,bthd->bshd", weights, value, precision="highest")


def draws(queries, keys, heads, size, dtype=jnp.float32, batch=2):
    """Query, key, value with scores of some size, and the result's cotangent."""
    draw = np.random.default_rng(queries)
    shapes = [(batch, n, heads, size) for n in (queries, keys, keys, queries)]
    return [jnp.asarray(draw.normal(0, 1.5, shape), dtype) for shape in shapes]


def with_gradients(attend, lengths, query, key, value, cotangent):
    """Result, then gradients of query, key and value, as float32."""

    @partial(jax.jit, compiler_options=COMPILE_FAST)
    def run(*tokens):
        out, transposed = jax.vjp(lambda q, k, v: attend(q, k, v, lengths), *tokens)
        return out, *transposed(cotangent.astype(out.dtype))

    return [np.asarray(x.astype(jnp.float32)) for x in run(query, key, value)]


def splash(limits):
    def attend(query, key, value, lengths):
        return splash_attention(query, key, value, lengths, limits=limits, interpret=True)

    return attend


def assert_close(found, wanted, tolerance):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
    ("queries", "keys", "size", "lengths", "limits"),
    [
        (300, 300, 32, (270, 300), SMALL_TILES),
        (300, 413, 24, (1, 290), TWO_KERNELS),
        (131, 131, 128, None, SMALL_TILES),
        (256, 256, 16, None, TWO_KERNELS),
    ],
)
def test_splash_is_attention(queries, keys, size, lengths, limits):
    lengths = None if lengths is None else jnp.array(lengths)
    tensors = draws(queries, keys, 2, size)
    found = with_gradients(splash(limits), lengths, *tensors)
    assert_close(found, with_gradients(definition, lengths, *tensors), 1e-5)


def test_splash_in_bfloat16():
    lengths = jnp.array([200, 170])
    tensors = draws(203, 203, 2, 64, jnp.bfloat16)
    found = with_gradients(splash(SMALL_TILES), lengths, *tensors)
    assert_close(found, with_gradients(definition, lengths, *tensors), 2e-2)
    assert_close(found, with_gradients(Attention(), lengths, *tensors), 2e-2)


def test_padded_keys_have_no_effect():
    lengths = jnp.array([140, 200])
    tensors = draws(200, 200, 1, 16)
    padded = (jnp.arange(200) >= lengths[:, None])[..., None, None]
    query, key, value, cotangent = tensors
    other = query, jnp.where(padded, 90.0, key), jnp.where(padded, -7e3, value), cotangent
    found, changed = (with_gradients(splash(SMALL_TILES), lengths, *x) for x in (tensors, other))
    for x, y in zip(found, changed, strict=True):
        np.testing.assert_array_equal(x, y)
    for gradient in found[2:]:
        assert not np.where(padded, gradient, 0).any() and gradient[1].all()


@settings(max_examples=200, deadline=None)
@given(queries=st.integers(1, 30_000), keys=st.integers(1, 30_000))
def test_tiles_fit_the_kernels(queries, keys):
    limits, blocks = BlockLimits(), block_sizes(queries, keys)
    assert blocks.has_backward_blocks
    assert blocks.block_q % 128 == blocks.block_q_dkv % 128 == blocks.block_kv_compute % 128 == 0
    assert blocks.block_q % blocks.block_q_dkv == blocks.block_kv % blocks.block_kv_compute == 0
    assert blocks.block_q <= limits.query and blocks.block_q_dkv <= limits.query // 2
    assert blocks.block_kv <= limits.key and blocks.block_kv_compute <= limits.scores
    for length, block in ((queries, blocks.block_q), (keys, blocks.block_kv)):
        assert -length % block < max(128, length), "no more padding than tokens"
    if not blocks.use_fused_bwd_kernel:
        assert blocks.block_q % blocks.block_q_dq == blocks.block_kv % blocks.block_kv_dq == 0


@pytest.mark.parametrize(
    ("tokens", "query", "backward", "key", "kernels"),
    [
        (336, 384, 384, 384, 1),
        (2912, 1024, 512, 1536, 1),
        (9620, 512, 512, 2048, 1),
        (10112, 1024, 512, 2048, 1),
        (25088, 512, 512, 1024, 2),
    ],
)
def test_tiles_as_documented(tokens, query, backward, key, kernels):
    blocks = block_sizes(tokens, tokens)
    assert (blocks.block_q, blocks.block_q_dkv, blocks.block_kv) == (query, backward, key)
    assert blocks.use_fused_bwd_kernel == (kernels == 1)


@pytest.mark.parametrize("lengths", [None, (5, 9)])
def test_xla_is_attention(lengths):
    tensors = draws(9, 9, 3, 8)
    lengths = None if lengths is None else jnp.array(lengths)
    wanted = with_gradients(definition, lengths, *tensors)
    assert_close(with_gradients(Attention(), lengths, *tensors), wanted, 1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "chosen", "drawback"),
    [
        ("tpu", "bfloat16", 128, "splash", ""),
        ("tpu", "bfloat16", 32, "splash", ""),
        ("tpu", "float32", 128, "xla", "multiplies in bfloat16"),
        ("gpu", jnp.bfloat16, 128, "cudnn", ""),
        ("cuda", "float16", 64, "cudnn", ""),
        ("gpu", "float32", 128, "xla", "16-bit floats"),
        ("gpu", "bfloat16", 256, "xla", "these have 256"),
        ("gpu", "bfloat16", 12, "xla", "these have 12"),
        ("cpu", "bfloat16", 128, "xla", ""),
    ],
)
def test_automatic_choice(platform, dtype, size, chosen, drawback):
    implementation, reason = choose_implementation("auto", platform, dtype, size)
    assert implementation == chosen
    assert drawback in reason and bool(drawback) == bool(reason)


@pytest.mark.parametrize(
    ("wanted", "platform", "dtype", "message"),
    [
        ("splash", "gpu", "bfloat16", "splash runs on TPUs, and the devices' platform is gpu"),
        ("splash", "tpu", "float16", "takes bfloat16 or float32, and the dtype is float16"),
        ("cudnn", "tpu", "bfloat16", "cudnn runs on NVIDIA GPUs, .* platform is tpu"),
        ("cudnn", "gpu", "float32", "16-bit floats, and the dtype is float32"),
        ("flash", "cpu", "float32", "'flash'; please use one of auto, xla, cudnn, splash"),
    ],
)
def test_a_choice_that_cannot_run(wanted, platform, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_implementation(wanted, platform, dtype, 128)


@pytest.mark.parametrize(
    ("wanted", "platform"), [("xla", "tpu"), ("splash", "tpu"), ("cudnn", "gpu"), ("xla", "cpu")]
)
def test_a_choice_that_runs(wanted, platform):
    assert choose_implementation(wanted, platform, "bfloat16", 128) == (wanted, "")


def test_a_loaded_model_computes_by_the_platform_of_its_mesh(tmp_path):
    config = MMDiTConfig(1, 16, 2, 8, axes_dims_rope=(4, 6, 6)).to_dict()
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    layout = Layout(make_mesh(MeshConfig()))
    model = make_model(tmp_path, ComputeConfig(), layout)
    assert model.attention == Attention("xla", layout)
    with pytest.raises(ValueError, match="attention is 'splash', but splash runs on TPUs"):
        make_model(tmp_path, ComputeConfig(attention="splash"), layout)
