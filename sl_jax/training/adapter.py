"""The adapter that training starts from; everything wrong with it is said before weights load."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
from etils import epath

from sl_jax.checkpoints.adapters import load_adapter
from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_params, make_model, shard_adapter
from sl_jax.models.lora import Adapter, LoRAConfig, init_adapter, target_paths
from sl_jax.parallel.mesh import Layout
from sl_jax.training.configuration import ConfigError


class AdapterConfig(Protocol):
    """What of a run's configuration the adapter depends on."""

    seed: int
    init_adapter: str
    lora: LoRAConfig
    compute: ComputeConfig


class FirstAdapter(NamedTuple):
    """The adapter to start from.

    Attributes:
        shapes: of its arrays.
        on: base parameters → the adapter, laid out like them.
    """

    shapes: Adapter
    on: Callable[[Any], Adapter]


def first_adapter(config: AdapterConfig, folder: epath.Path, layout: Layout) -> FirstAdapter:
    """The adapter to start from, before the base parameters are loaded.

    `config.init_adapter` names any adapter that `checkpoints.adapters.locate_adapter` finds, whose
    rank and targets then count; without it the adapter is a fresh one of `config.lora`.

    Args:
        config: of the run.
        folder: the checkpoint; of the transformer only config.json is read.
        layout: of the base parameters.

    Raises:
        ConfigError: the adapter does not fit the model.
        CheckpointError: `folder` describes no model that is implemented.
    """
    try:
        shapes = layout.abstract(abstract_params(make_model(folder, config.compute, layout)))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / 'transformer' / 'config.json'}: {error}") from error
    if config.init_adapter:
        try:
            loaded = load_adapter(config.init_adapter, shapes)
        except CheckpointError as error:
            raise ConfigError(f"config.init_adapter: {error}") from error
        return FirstAdapter(jax.eval_shape(lambda: loaded), partial(shard_adapter, loaded))
    try:
        target_paths(shapes, config.lora.targets)
    except ValueError as error:
        raise ConfigError(f"config.lora.targets is {config.lora.targets}: {error}") from error

    def fresh(params: Any) -> Adapter:
        return init_adapter(jax.random.key(config.seed), params, config.lora)

    return FirstAdapter(
        jax.eval_shape(lambda: fresh(shapes)), lambda params: shard_adapter(fresh(params), params)
    )
