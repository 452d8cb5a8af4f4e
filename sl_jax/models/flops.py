"""Operations of the transformer, counted from its sizes.

Matrix products and attention count, a multiplication and an addition as two. The share of a peak is
thus an MFU: what a backward pass computes again to save memory is left out, which an HFU has. So
are adapters, which add two per parameter and token to a forward pass, and what passes the time.
"""

from typing import NamedTuple

from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.packing import PATCH
from sl_jax.models.rope import LatentGrid

_MLP = 4  # hidden channels per channel


def velocity_flops(config: MMDiTConfig, grid: LatentGrid, text_tokens: int) -> float:
    """Floating-point operations of one forward pass for one sample.

    Args:
        config: sizes.
        grid: of the generated frames; the source picture's frame comes to them.
        text_tokens: with padding, which is computed as well.
    """
    return float(sum(_forward(config, grid, text_tokens)))


def gradient_flops(config: MMDiTConfig, grid: LatentGrid, text_tokens: int) -> float:
    """Floating-point operations of one backward pass for one sample, after its forward pass.

    Weights of the base have no gradient: a linear layer takes as many operations as forward, for
    its inputs, and none where only data comes in. Attention takes twice as many: both factors of
    its products are activations. Arguments as for `velocity_flops`.
    """
    forward = _forward(config, grid, text_tokens)
    return float(forward.linear + 2 * forward.attention + forward.leaving)


class _Parts(NamedTuple):
    """Operations forward, by what they are for."""

    linear: int
    attention: int
    entry: int
    leaving: int


def _forward(config: MMDiTConfig, grid: LatentGrid, text_tokens: int) -> _Parts:
    width, image = config.width, grid.generated_tokens + grid.frame_tokens
    tokens = sequence_tokens(grid, text_tokens)
    linear = 2 * tokens * (4 + 2 * _MLP) * width**2  # q, k, v, out; up and down
    attention = 2 * 2 * tokens**2 * width  # q·k, weights·v
    entry = 2 * width * (image * config.in_channels + text_tokens * config.joint_attention_dim)
    leaving = 2 * width * grid.generated_tokens * config.out_channels * PATCH**2
    return _Parts(config.num_layers * linear, config.num_layers * attention, entry, leaving)


def sequence_tokens(grid: LatentGrid, text_tokens: int) -> int:
    """Tokens that the transformer reads for one sample; arguments as for `velocity_flops`."""
    return grid.generated_tokens + grid.frame_tokens + text_tokens
