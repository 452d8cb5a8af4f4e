"""Compares this package's transformer with PyTorch's, both with an adapter, on random inputs.

PyTorch, diffusers and peft are imported when they are needed; nothing else here needs them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, Int

from sl_jax.checkpoints.adapters import AdapterSource, load_adapter, locate_adapter, read_adapter
from sl_jax.checkpoints.huggingface import CheckpointError, load_params, local_path, read_config
from sl_jax.checkpoints.lora_modules import find_prefix
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_params, make_model, shard_adapter
from sl_jax.checkpoints.safetensors_file import read_tensors
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 5e-2}
_PEERS = ("torch", "diffusers", "peft")
_GRID = LatentGrid(2, 3, 2)
_WORDS = (6, 2)  # valid tokens of the two samples


class Comparison(NamedTuple):
    """Results of one forward; distances are norms of differences relative to the base's norm.

    Attributes:
        difference: between both sides.
        effect: of the adapter on this package's output; a difference says little if it is 0.
        dtype: that both computed in.
    """

    difference: float
    effect: float
    dtype: str

    @property
    def equal(self) -> bool:
        """Whether the sides differ by rounding only."""
        return self.difference <= TOLERANCES[self.dtype]


class _Inputs(NamedTuple):
    latents: Float32[np.ndarray, "b n c"]
    condition: Float32[np.ndarray, "b m c"]
    text: Float32[np.ndarray, "b s e"]
    lengths: Int[np.ndarray, " b"]
    times: Float32[np.ndarray, " b"]


def missing_peers() -> list[str]:
    """Which of the packages that `compare` needs are not installed."""
    return [name for name in _PEERS if importlib.util.find_spec(name) is None]


def compare(
    model: epath.PathLike,
    adapter: epath.PathLike,
    other: epath.PathLike | None = None,
    dtype: str = "float32",
) -> Comparison:
    """Runs the transformer here with one adapter, and in PyTorch with the other.

    Args:
        model: checkpoint in the diffusers layout.
        adapter: for this side; see `checkpoints.adapters.locate_adapter`.
        other: for PyTorch's: a PEFT folder, a LoRA file, or a merged checkpoint; by default the
            same as `adapter`.
        dtype: "float32" or "bfloat16".

    Raises:
        CheckpointError: PyTorch is not installed, or a side cannot be loaded.
    """
    missing = missing_peers()
    if missing:
        raise CheckpointError(
            f"{', '.join(missing)} cannot be imported, so that nothing was compared; please run "
            "pip install torch 'diffusers==0.42.*' peft"
        )
    theirs = _peer_adapter(adapter if other is None else other)
    folder = local_path(model) / "transformer"
    inputs = _random_inputs(MMDiTConfig.from_dict(read_config(folder)))
    base, ours = _outputs(epath.Path(model), adapter, inputs, dtype)
    peer = _peer_output(folder, theirs, inputs, dtype)
    norm = np.linalg.norm(base)
    return Comparison(
        float(np.linalg.norm(ours - peer) / norm), float(np.linalg.norm(ours - base) / norm), dtype
    )


def _random_inputs(config: MMDiTConfig) -> _Inputs:
    draw = np.random.default_rng(0)
    sizes = (
        (_GRID.generated_tokens, config.in_channels),
        (_GRID.frame_tokens, config.in_channels),
        (max(_WORDS), config.joint_attention_dim),
    )
    arrays = [draw.normal(size=(2, *size)).astype(np.float32) for size in sizes]
    return _Inputs(*arrays, np.array(_WORDS, np.int32), np.array([0.875, 0.25], np.float32))


def _outputs(
    folder: epath.Path, adapter: epath.PathLike, inputs: _Inputs, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """This side's velocities without and with the adapter, float32."""
    layout = Layout(make_mesh(MeshConfig()))
    model = make_model(folder, ComputeConfig(dtype, remat="none"), layout)
    shapes = layout.abstract(abstract_params(model))
    loaded = load_adapter(adapter, shapes)
    params = load_params(folder / "transformer", MMDIT, shapes)
    variables = shard_adapter(loaded, params).variables()
    run = jax.jit(lambda p, collections: _velocity(model, p, collections, inputs))
    idle = {**variables, "lora_scale": jax.tree.map(jnp.zeros_like, variables["lora_scale"])}
    base, ours = (np.asarray(run(params, v), np.float32) for v in (idle, variables))
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    return base, ours


def _velocity(model: MMDiT, params: Any, collections: Any, inputs: _Inputs) -> jax.Array:
    def run(module: MMDiT) -> jax.Array:
        modulation = module.modulate(jnp.asarray(inputs.times))
        tokens = map(jnp.asarray, inputs[:3])
        return module(*tokens, jnp.asarray(inputs.lengths), modulation, _GRID)

    return nn.apply(run, model)({"params": params, **collections})


def _peer_adapter(name: epath.PathLike) -> AdapterSource | epath.Path:
    """What PyTorch loads: an adapter, or the folder of a merged checkpoint."""
    folder = epath.Path(name).expanduser()
    if (folder / "model_index.json").exists():
        return folder
    source = locate_adapter(name)
    if source.kind == "run":
        raise CheckpointError(
            f"PyTorch cannot load {source.path}; please pass also what to-peft or merge made of it"
        )
    read_adapter(name)  # refuses pickles, which PyTorch would load
    return source


def _peer_output(
    folder: epath.PathLike, adapter: AdapterSource | epath.Path, inputs: _Inputs, dtype: str
) -> np.ndarray:
    """PyTorch's velocity, float32."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    kind = getattr(torch, dtype)
    place = folder if isinstance(adapter, AdapterSource) else adapter / "transformer"
    model = QwenImageTransformer2DModel.from_pretrained(place, dtype=kind, use_safetensors=True)
    if isinstance(adapter, AdapterSource):
        model = _with_adapter(model, adapter)
    model.eval()
    tokens = np.concatenate([inputs.latents, inputs.condition], axis=1)
    flag = torch.zeros(len(tokens), dtype=torch.long)
    valid = np.arange(max(_WORDS)) < inputs.lengths[:, None]
    with torch.no_grad():
        result = model(
            hidden_states=torch.from_numpy(tokens).to(kind),
            encoder_hidden_states=torch.from_numpy(inputs.text).to(kind),
            encoder_hidden_states_mask=torch.from_numpy(valid),
            timestep=torch.from_numpy(inputs.times).to(kind),
            img_shapes=[[(1, _GRID.height, _GRID.width)] * (_GRID.layers + 2)] * len(tokens),
            additional_t_cond=flag if model.config.use_additional_t_cond else None,
            return_dict=False,
        )[0]
    return result[:, : _GRID.generated_tokens].float().numpy()


def _with_adapter(model: Any, adapter: AdapterSource) -> Any:
    from peft import PeftModel

    if adapter.kind == "peft":
        return PeftModel.from_pretrained(model, str(local_path(adapter.path)))
    path = local_path(adapter.path)
    model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix=_prefix(path))
    return model


def _prefix(path: Path) -> str | None:
    """The prefix that diffusers is to look for in a LoRA file; None if names have none."""
    return find_prefix(read_tensors(path).tensors).rstrip(".") or None
