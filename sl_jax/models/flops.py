"""Operations of the transformer, counted from its sizes."""

from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.packing import PATCH
from sl_jax.models.rope import LatentGrid

_MLP = 4  # hidden channels per channel


def velocity_flops(config: MMDiTConfig, grid: LatentGrid, text_tokens: int) -> float:
    """Floating-point operations of one forward pass for one sample.

    Matrix products and attention alone, a multiplication and an addition counted as two; adapters,
    which add two per parameter and token, and what passes the time are left out.

    Args:
        config: sizes.
        grid: of the generated frames; the source picture's frame comes to them.
        text_tokens: with padding, which is computed as well.
    """
    width, image = config.width, grid.generated_tokens + grid.frame_tokens
    tokens = sequence_tokens(grid, text_tokens)
    linear = 2 * tokens * (4 + 2 * _MLP) * width**2  # q, k, v, out; up and down
    attention = 2 * 2 * tokens**2 * width  # q·k, weights·v
    entry = 2 * width * (image * config.in_channels + text_tokens * config.joint_attention_dim)
    leaving = 2 * width * grid.generated_tokens * config.out_channels * PATCH**2
    return float(config.num_layers * (linear + attention) + entry + leaving)


def sequence_tokens(grid: LatentGrid, text_tokens: int) -> int:
    """Tokens that the transformer reads for one sample; arguments as for `velocity_flops`."""
    return grid.generated_tokens + grid.frame_tokens + text_tokens
