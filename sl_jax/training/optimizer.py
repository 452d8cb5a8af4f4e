"""The optimizer that `sft` and `grpo` share."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

Optimizer = Literal["adamw", "muon"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
_ADAM_RMS = 0.2  # root mean square of Adam's updates per unit of learning rate, arXiv 2502.16982


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with gradient clipping.

    Attributes:
        learning_rate: peak rate.
        name: "adamw", or "muon" (https://kellerjordan.github.io/posts/muon), which orthogonalises
            the updates of kernels, scaled to the size of Adam's; other parameters get AdamW.
        weight_decay: decoupled decay per unit of learning rate.
        clip_norm: bound on the global gradient norm.
        b1, b2: decay of AdamW's moments per update.
        warmup_steps: linear warm-up from zero.
        decay_steps: total steps of a cosine decay to a hundredth of the peak; 0 stays constant.
    """

    learning_rate: float
    name: Optimizer = "adamw"
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
    """Clipping by global norm, then the optimizer; moments in the dtype of the parameters.

    Raises:
        ValueError: the optimizer's name is not known.
    """
    rate = learning_rate_schedule(config)
    if config.name == "adamw":
        optimizer = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    elif config.name == "muon":
        optimizer = muon(
            rate,
            consistent_rms=_ADAM_RMS,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        raise ValueError(f"optimizer {config.name!r} is unknown; please use one of {OPTIMIZERS}")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _matrices(params: Any) -> Any:
    """What Muon takes as matrices: kernels, and the two factors of adapters.

    They are [in, out], stacked [layers, in, out], or of convolutions [kh, kw, in, out].
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        if path[-1].key not in ("kernel", "a", "b"):
            return None
        axes = range(leaf.ndim)
        return MuonDimensionNumbers(tuple(axes[1:-1] if leaf.ndim == 3 else axes[:-1]), axes[-1])

    return jax.tree_util.tree_map_with_path(dimensions, params)
