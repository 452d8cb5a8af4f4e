"""Operations of the transformer against those of its traced program."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from sl_jax.models.flops import gradient_flops, velocity_flops
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid
from sl_jax.planning.work import count_work

CONFIG = MMDiTConfig(
    num_layers=3,
    attention_head_dim=128,
    num_attention_heads=2,
    joint_attention_dim=64,
)


@pytest.fixture(params=[LatentGrid(1, 16, 16), LatentGrid(4, 9, 11)], ids=str)
def grid(request):
    return request.param


def _program(grid, text_tokens):
    """The forward pass as a function of parameters and inputs, and shapes of those."""
    module = MMDiT(CONFIG)
    inputs = (
        jax.ShapeDtypeStruct((1, grid.generated_tokens, CONFIG.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1, grid.frame_tokens, CONFIG.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1, text_tokens, CONFIG.joint_attention_dim), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
    )
    whole = {"grid": grid, "method": "initialise"}
    params = jax.eval_shape(partial(module.init, **whole), jax.random.key(0), *inputs)
    return partial(module.apply, **whole), (params, *inputs)


@pytest.mark.parametrize("text_tokens", [1, 96])
def test_as_many_as_the_program_multiplies(grid, text_tokens):
    call, shapes = _program(grid, text_tokens)
    counted = count_work(jax.jit(call).trace(*shapes)).flops
    # What passes the time, for one token instead of hundreds, is left out.
    assert velocity_flops(CONFIG, grid, text_tokens) == pytest.approx(counted, rel=0.02)
    assert velocity_flops(CONFIG, grid, text_tokens) < counted


@pytest.mark.parametrize("text_tokens", [1, 96])
def test_a_backward_pass_takes_attention_twice(grid, text_tokens):
    call, shapes = _program(grid, text_tokens)

    def gradient(params, x, *rest):
        velocity, backward = jax.vjp(lambda x: call(params, x, *rest), x)
        return backward(velocity)

    both, forward = (count_work(jax.jit(f).trace(*shapes)).flops for f in (gradient, call))
    # Of what comes in only the latents have a gradient, and few channels.
    assert gradient_flops(CONFIG, grid, text_tokens) == pytest.approx(both - forward, rel=0.02)
    assert gradient_flops(CONFIG, grid, text_tokens) > 1.2 * velocity_flops(
        CONFIG, grid, text_tokens
    )
