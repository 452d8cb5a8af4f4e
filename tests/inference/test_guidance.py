"""Classifier-free guidance against the arithmetic of diffusers' pipeline, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sl_jax.inference.sampling import Condition, Guidance, _both_prompts, guided


def _by_diffusers(wanted, unwanted, scale, normalize):
    """As the Qwen-Image pipelines mix two predictions of packed latents, in PyTorch."""
    mixed = unwanted + scale * (wanted - unwanted)
    if not normalize:
        return mixed
    return mixed * (
        torch.norm(wanted, dim=-1, keepdim=True) / torch.norm(mixed, dim=-1, keepdim=True)
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guidance_and_its_gradient_equal_the_peers(scale, normalize):
    draw = np.random.default_rng(0)
    wanted, unwanted, cotangent = draw.normal(size=(3, 2, 5, 64)).astype(np.float32)

    def ours(*velocities):
        text = jnp.zeros((1, 1, 1))
        return guided(*velocities, Guidance(scale, text, None, normalize))

    found, vjp = jax.vjp(ours, wanted, unwanted)
    theirs = [torch.tensor(v, requires_grad=True) for v in (wanted, unwanted)]
    mixed = _by_diffusers(*theirs, scale, normalize)
    mixed.backward(torch.tensor(cotangent))
    np.testing.assert_allclose(found, mixed.detach(), rtol=1e-5, atol=1e-5)
    for gradient, velocity in zip(vjp(cotangent), theirs, strict=True):
        np.testing.assert_allclose(gradient, velocity.grad, rtol=1e-4, atol=1e-5)
    if scale == 1:
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    elif normalize:
        norms = [np.linalg.norm(v, axis=-1) for v in (found, wanted)]
        np.testing.assert_allclose(*norms, rtol=1e-5)


def test_a_velocity_of_zero_spoils_nothing():
    """Tokens whose velocities are 0, or cancel out, have no direction that a norm could keep."""
    wanted = jnp.stack([jnp.zeros(64), jnp.ones(64), jnp.ones(64)])[None]
    unwanted = jnp.stack([jnp.ones(64), 2 * jnp.ones(64), jnp.zeros(64)])[None]

    def total(wanted, unwanted):
        return guided(wanted, unwanted, Guidance(2.0, jnp.zeros((1, 1, 1)), None)).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(wanted, unwanted)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert value == pytest.approx(64)  # of the last token


def test_one_negative_prompt_stands_for_all_samples():
    text = jnp.arange(3 * 4 * 2, dtype=jnp.float32).reshape(3, 4, 2)
    condition = Condition(jnp.zeros((3, 1, 1)), text, jnp.array([4, 2, 3]))
    texts, lengths = _both_prompts(condition, Guidance(2.0, -jnp.ones((1, 6, 2)), None))
    assert texts.shape == (2, 3, 6, 2)
    np.testing.assert_array_equal(lengths, [[4, 2, 3], [6, 6, 6]])
    np.testing.assert_array_equal(texts[0, :, :4], text)
    assert not texts[0, :, 4:].any() and (texts[1] == -1).all()
