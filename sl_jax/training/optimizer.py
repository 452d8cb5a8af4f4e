"""The optimizer that `sft` and `grpo` share."""

from dataclasses import dataclass

import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping.

    Attributes:
        learning_rate: peak rate.
        weight_decay: decoupled decay per unit of learning rate.
        clip_norm: bound on the global gradient norm.
        warmup_steps: linear warm-up from zero.
        decay_steps: total steps of a cosine decay to a hundredth of the peak; 0 stays constant.
    """

    learning_rate: float
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    warmup_steps: int = 0
    decay_steps: int = 0


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate at every update."""
    peak = config.learning_rate
    if config.decay_steps:
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup_steps else peak,
            peak,
            config.warmup_steps,
            config.decay_steps,
            peak / 100,
        )
    return optax.linear_schedule(
        0.0 if config.warmup_steps else peak, peak, max(config.warmup_steps, 1)
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; moments in the dtype of the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        ),
    )
