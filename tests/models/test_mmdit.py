"""The MMDiT against diffusers' QwenImageTransformer2DModel, at random tiny configurations."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope

from sl_jax.checkpoints.huggingface import load_params, read_config
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.mmdit import MMDiT, MMDiTConfig, time_sinusoids
from sl_jax.models.rope import LatentGrid, layer3d_rope

torch.set_num_threads(1)

TINY = MMDiTConfig(
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 6, 6),
)


QUICK = {"xla_backend_optimization_level": 0}  # Compiling takes longer than computing here.
MODULATION = ("modulation", "norm_out", "time_text_embed")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one forward; `lengths` None means that no text is padded."""

    latents: np.ndarray
    condition: np.ndarray
    text: np.ndarray
    lengths: np.ndarray | None
    t: np.ndarray
    grid: LatentGrid


def random_config(draw):
    axes = tuple(int(2 * draw.integers(1, 5)) for _ in range(3))
    return MMDiTConfig(
        num_layers=int(draw.integers(1, 4)),
        attention_head_dim=sum(axes),
        num_attention_heads=int(draw.integers(1, 5)),
        joint_attention_dim=int(draw.integers(4, 40)),
        axes_dims_rope=axes,
    )


def random_batch(draw, config, grid, padded, count=2, words=7):
    lengths = np.array([words, *draw.integers(1, words, count - 1)]) if padded else None
    return Batch(
        latents=draw.normal(size=(count, grid.generated_tokens, 64)).astype(np.float32),
        condition=draw.normal(size=(count, grid.frame_tokens, 64)).astype(np.float32),
        text=draw.normal(size=(count, words, config.joint_attention_dim)).astype(np.float32),
        lengths=lengths,
        t=draw.uniform(0.02, 1, count).astype(np.float32),
        grid=grid,
    )


def make_oracle(config, seed):
    """diffusers' model, every tensor of which matters to the result."""
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    oracle = QwenImageTransformer2DModel(**settings).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in oracle.named_parameters():
            if "norm" in name and tensor.ndim == 1 and not name.endswith("bias"):
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0, 0.1)
    return oracle


def load(folder, oracle, **settings):
    """This package's model with the oracle's weights, by way of the oracle's own files."""
    oracle.save_pretrained(folder)
    model = MMDiT(MMDiTConfig.from_dict(read_config(folder)), **settings)
    return model, load_params(folder, MMDIT, nn.unbox(abstract_params(model)))


def expected(oracle, batch):
    """The oracle's velocity; its text is zero where it is padding."""
    count, words, _ = batch.text.shape
    valid = np.ones((count, words), bool)
    if batch.lengths is not None:
        valid = np.arange(words) < batch.lengths[:, None]
    dtype = next(oracle.parameters()).dtype
    tokens = np.concatenate([batch.latents, batch.condition], axis=1)
    shape = (1, batch.grid.height, batch.grid.width)
    with torch.no_grad():
        result = oracle(
            hidden_states=torch.from_numpy(tokens).to(dtype),
            encoder_hidden_states=torch.from_numpy(batch.text * valid[..., None]).to(dtype),
            encoder_hidden_states_mask=None if batch.lengths is None else torch.from_numpy(valid),
            timestep=torch.from_numpy(batch.t).to(dtype),
            img_shapes=[[shape] * (batch.grid.layers + 2)] * count,
            additional_t_cond=torch.zeros(count, dtype=torch.long),
            return_dict=False,
        )[0]
    return result[:, : batch.grid.generated_tokens].float().numpy()


def velocity(model, params, batch):
    def run(module, latents, condition, text, lengths, t):
        return module(latents, condition, text, lengths, module.modulate(t), batch.grid)

    arrays = (batch.latents, batch.condition, batch.text, batch.lengths, batch.t)
    return nn.apply(run, model)({"params": params}, *arrays)


def compiled_velocity(model, params, batch):
    forward = partial(velocity, model, batch=batch)
    return jax.jit(forward, compiler_options=QUICK)(params)


def relative_error(found, truth):
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    assert found.shape == truth.shape
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize(
    "layers", [1, 3, 5, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 6, 7))]
)
def test_equals_diffusers(tmp_path, layers):
    draw = np.random.default_rng(layers)
    config = random_config(draw)
    sides = [int(x) for x in draw.integers(1, 6, 2)]
    grid = LatentGrid(layers, *([2 * sides[0] - 1, sides[1]] if layers % 2 else sides))
    batch = random_batch(draw, config, grid, padded=layers % 4 < 2, count=2 + layers % 2)
    oracle = make_oracle(config, layers)
    model, params = load(tmp_path, oracle)
    assert model.config == config
    found = compiled_velocity(model, params, batch)
    truth = expected(oracle, batch)
    assert relative_error(found, truth) < 1e-5
    assert np.abs(found - truth).max() < 1e-5 * np.abs(truth).max()


def test_bfloat16_is_no_further_from_the_truth_than_diffusers(tmp_path):
    draw = np.random.default_rng(0)
    batch = random_batch(draw, TINY, LatentGrid(2, 3, 2), padded=True)
    batch = dataclasses.replace(batch, t=np.array([0.25, 0.875], np.float32))  # exact in bfloat16
    oracle = make_oracle(TINY, 0)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model, params = load(tmp_path, oracle, **types)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    truth = expected(oracle, batch)
    found = compiled_velocity(model, params, batch)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, truth) < 1.2 * relative_error(
        expected(oracle.bfloat16(), batch), truth
    )


def test_a_modulation_table_serves_a_whole_batch(tmp_path):
    """And what made the table need not be there any more."""
    draw = np.random.default_rng(1)
    batch = random_batch(draw, TINY, LatentGrid(1, 1, 3), padded=True)
    oracle = make_oracle(TINY, 1)
    model, params = load(tmp_path, oracle)
    times = np.array([1.0, 0.7, 0.2], np.float32)
    table = model.apply({"params": params}, times, method="modulate")
    rest = {k: v for k, v in params.items() if k not in MODULATION}
    inputs = (batch.latents, batch.condition, batch.text, batch.lengths)

    @partial(jax.jit, compiler_options=QUICK)
    def forward(index):
        return model.apply({"params": rest}, *inputs, table.at(index), batch.grid)

    for index in (1, 2):
        truth = expected(oracle, dataclasses.replace(batch, t=times[[index, index]]))
        assert relative_error(forward(index), truth) < 1e-5


@pytest.mark.slow
def test_recomputation_changes_no_gradient(tmp_path):
    draw = np.random.default_rng(2)
    batch = random_batch(draw, TINY, LatentGrid(1, 2, 1), padded=False)
    _, params = load(tmp_path, make_oracle(TINY, 2))

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def gradient(remat, params):
        model = MMDiT(TINY, remat=remat)
        return jax.grad(lambda p: jnp.square(velocity(model, p, batch)).sum())(params)

    plain = jax.tree.leaves(gradient("none", params))
    for remat in ("block", "dots"):
        for found, wanted in zip(jax.tree.leaves(gradient(remat, params)), plain, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="'full'; please use one of none, block, dots"):
        abstract_params(MMDiT(TINY, remat="full"))


def test_time_sinusoids_equal_diffusers():
    t = np.random.default_rng(3).uniform(0, 1, 50).astype(np.float32)
    reference = get_timestep_embedding(
        torch.from_numpy(t), 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000
    )
    # Two in the last place of an angle of up to 1000.
    np.testing.assert_allclose(jax.jit(time_sinusoids)(t), reference.numpy(), atol=1.3e-4)


@pytest.mark.parametrize(
    "grid", [LatentGrid(4, 40, 40), LatentGrid(8, 3, 5), LatentGrid(1, 23, 41), LatentGrid(2, 1, 1)]
)
@pytest.mark.parametrize("axes", [(16, 56, 56), (2, 4, 6)])
def test_positions_equal_diffusers(grid, axes):
    oracle = QwenEmbedLayer3DRope(theta=10000, axes_dim=list(axes), scale_rope=True)
    shapes = [(1, grid.height, grid.width)] * (grid.layers + 2)
    image, text = oracle([shapes], max_txt_seq_len=33)
    table = layer3d_rope(grid, 33, axes)
    reference = torch.cat([image, text]).numpy()
    assert table.cos.dtype == table.sin.dtype == np.float32
    np.testing.assert_allclose(table.cos + 1j * table.sin, reference, atol=1e-5)


def test_config_is_diffusers_file(tmp_path):
    make_oracle(TINY, 0).save_config(tmp_path)
    content = read_config(tmp_path)
    assert MMDiTConfig.from_dict(content) == TINY
    assert MMDiTConfig.from_dict(TINY.to_dict()) == TINY
    assert MMDiTConfig.from_dict(content | {"pooled_projection_dim": 768}) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": None}, "missing keys .'num_layers'"),
        ({"depth": 3}, "unknown keys .'depth'"),
        ({"zero_cond_t": True}, "only the layered variant"),
        ({"guidance_embeds": True}, "only the layered variant"),
        ({"use_layer3d_rope": None}, "use_layer3d_rope true"),
        ({"patch_size": 1}, "patch_size is 1"),
        ({"axes_dims_rope": [4, 6, 8]}, "sum to attention_head_dim 16"),
        ({"axes_dims_rope": [3, 6, 7]}, "must be even"),
    ],
)
def test_config_refuses_what_the_model_cannot_do(change, message):
    """None takes the key out of the file."""
    content = {k: v for k, v in (TINY.to_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        MMDiTConfig.from_dict(content)
