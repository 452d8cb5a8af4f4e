"""A decomposition model loaded from a checkpoint folder: transformer, autoencoder, scheduler."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sl_jax.checkpoints.huggingface import CheckpointError, load_params, read_config
from sl_jax.checkpoints.naming import MMDIT, VAE
from sl_jax.flow.schedule import SchedulerConfig
from sl_jax.models.attention import Attention, Implementation, choose_implementation
from sl_jax.models.lora import Adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.modulation import TIME_PARAMS, split_time, time_modules
from sl_jax.models.packing import PATCH
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.parallel.mesh import AXES, Layout, replicated

_log = logging.getLogger(__name__)

# Kept on hosts, a kernel is split by outputs over all devices: each process reads and keeps rows of
# the tensor, and no device has to add up what others multiplied.
_ON_HOST = (("modulation", AXES),)


@dataclass(frozen=True)
class ComputeConfig:
    """How the model computes.

    Attributes:
        dtype: "bfloat16" or "float32", of the base parameters and of all matrix products.
        attention: "auto" takes flash attention where the mesh's devices have one for this dtype
            and head size, and says so where they do not; or "splash" (TPU), "cudnn" (NVIDIA GPU),
            "xla" (anywhere, with memory for the scores of all pairs of tokens).
        remat: what the backward pass recomputes: "none", "block" or "dots"; see `MMDiT`.
        cache: where a run keeps its compiled programs: a folder, local or gs://; "auto", which is
            `programs` in the work directory, or where JAX_COMPILATION_CACHE_DIR says; "off".
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", Implementation] = "auto"
    remat: Literal["none", "block", "dots"] = "block"
    cache: str = "auto"


class Pipeline(NamedTuple):
    """Modules with their parameters; parameters of the transformer are sharded, the rest whole.

    Attributes:
        params: of the transformer, on the devices.
        time_params: those of them that only time passes (`models.modulation.TIME_PARAMS`), where
            they are not in `params`: `HostArray`s, from which `inference.modulation` makes tables.
    """

    model: MMDiT
    params: Any
    vae: Vae
    vae_params: Any
    scheduler: SchedulerConfig
    time_params: Any = None


def load_pipeline(
    folder: epath.PathLike,
    compute: ComputeConfig,
    layout: Layout,
    adapters: Iterable[Adapter] | None = None,
) -> Pipeline:
    """Loads a checkpoint in the diffusers layout onto a mesh.

    Args:
        folder: the checkpoint.
        compute: how the model computes.
        layout: of parameters and activations.
        adapters: all (or their shapes) that the pipeline will sample with, if it only samples at
            the times of grids. Unless one of them changes the modulation, its weights, a third of
            the transformer's, then stay in the hosts' memory. None keeps all on the devices.

    Raises:
        CheckpointError: lists what is missing, surplus or mis-shaped, or says how transformer and
            autoencoder do not fit together.
        ValueError: a config.json describes a model that is not implemented.
    """
    folder = epath.Path(folder)
    model = make_model(folder, compute, layout)
    _check_fit(folder, model.config, VaeConfig.from_dict(read_config(folder / "vae")))
    params, time_params = _transformer(folder / "transformer", model, layout, adapters)
    vae, vae_params = load_vae(folder / "vae", compute.dtype, replicated(layout.mesh))
    scheduler = SchedulerConfig.from_dict(
        read_config(folder / "scheduler", "scheduler_config.json")
    )
    return Pipeline(model, params, vae, vae_params, scheduler, time_params)


def abstract_pipeline(
    folder: epath.PathLike,
    compute: ComputeConfig,
    layout: Layout,
    adapters: Iterable[Adapter] | None = None,
) -> Pipeline:
    """What `load_pipeline` loads onto the devices, as shapes with shardings.

    Of the checkpoint only its configuration files are read, and no memory is taken.

    Raises:
        ValueError: a config.json describes a model that is not implemented.
    """
    folder = epath.Path(folder)
    model = make_model(folder, compute, layout)
    shapes = abstract_params(model)
    adapted = any(time_modules(adapter.lora) for adapter in adapters or ())
    kept = shapes if adapters is None or adapted else split_time(shapes)[0]
    vae, vae_params = _abstract_vae(folder / "vae", compute.dtype, replicated(layout.mesh))
    scheduler = SchedulerConfig.from_dict(
        read_config(folder / "scheduler", "scheduler_config.json")
    )
    return Pipeline(model, layout.abstract(kept), vae, vae_params, scheduler)


def _transformer(
    folder: epath.Path, model: MMDiT, layout: Layout, adapters: Iterable[Adapter] | None
) -> tuple[Any, Any]:
    """Parameters on the devices, and on the hosts; see `load_pipeline`."""
    shapes = abstract_params(model)
    adapted = sorted({name for adapter in adapters or () for name in time_modules(adapter.lora)})
    if adapters is None or adapted:
        if adapted:
            gigabytes = _bytes(split_time(nn.unbox(shapes))[1]) / 1e9
            _log.info(
                "The adapter changes %s: no table of the modulation can stand in for the %.1f GB "
                "of its weights, which stay on the accelerator.",
                *(", ".join(adapted), gigabytes),
            )
        return load_params(folder, MMDIT, layout.abstract(shapes)), None
    kept, time = split_time(shapes)
    abstract = layout.abstract(kept) | Layout(layout.mesh, _ON_HOST).abstract(time)
    return split_time(load_params(folder, MMDIT, abstract, on_host=TIME_PARAMS))


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _check_fit(folder: epath.Path, model: MMDiTConfig, vae: VaeConfig) -> None:
    wanted = {
        "vae: input_channels": (vae.input_channels, 4),
        "vae: pixels per latent": (vae.spatial_factor, PACKED_PIXELS // PATCH),
        "transformer: in_channels": (model.in_channels, PATCH**2 * vae.z_dim),
        "transformer: out_channels": (model.out_channels, vae.z_dim),
    }
    problems = [
        f"{name} {given}, not {fit}" for name, (given, fit) in wanted.items() if given != fit
    ]
    if problems:
        raise CheckpointError(
            f"{folder} is no pipeline for RGBA layers: {'; '.join(problems)}; please use the "
            "components of one Qwen-Image-Layered checkpoint"
        )


def make_model(folder: epath.PathLike, compute: ComputeConfig, layout: Layout) -> MMDiT:
    """The transformer that `folder` describes, without parameters.

    Raises:
        ValueError: the attention of `compute` does not run on the devices of `layout`.
    """
    dtype, config = jnp.dtype(compute.dtype), transformer_config(folder)
    return MMDiT(
        config,
        attention=_attention(compute, config.attention_head_dim, layout),
        remat=compute.remat,
        constrain=layout,
        dtype=dtype,
        param_dtype=dtype,
    )


def transformer_config(folder: epath.PathLike) -> MMDiTConfig:
    """Sizes of the transformer, from its config.json.

    Raises:
        CheckpointError: it is missing or damaged, or describes a model that is not implemented.
    """
    place = epath.Path(folder) / "transformer"
    try:
        return MMDiTConfig.from_dict(read_config(place))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{place / 'config.json'}: {error}") from error


def _attention(compute: ComputeConfig, head_size: int, layout: Layout) -> Attention:
    platform = layout.mesh.devices.flat[0].platform
    implementation, drawback = choose_implementation(
        compute.attention, platform, compute.dtype, head_size
    )
    if drawback:
        _log.warning("Attention is %s, slow and with large memory: %s", implementation, drawback)
    return Attention(implementation, layout)


def abstract_params(model: MMDiT) -> Any:
    """Shapes and logical axes of all parameters, without allocating any."""
    config = model.config
    tokens = jax.ShapeDtypeStruct((1, 2, config.in_channels), jnp.float32)
    condition = jax.ShapeDtypeStruct((1, 1, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, config.joint_attention_dim), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)

    def init(key: jax.Array, *args: jax.Array) -> Any:
        return model.init(key, *args, LatentGrid(1, 1, 1), method="initialise")

    return jax.eval_shape(init, jax.random.key(0), tokens, condition, text, time)["params"]


def parameter_shapes(folder: epath.PathLike) -> Any:
    """Shapes of the transformer's parameters; of the checkpoint only config.json is read."""
    return nn.unbox(abstract_params(MMDiT(transformer_config(folder))))


def load_vae(folder: epath.PathLike, dtype: Any, sharding: Any = None) -> tuple[Vae, Any]:
    """The autoencoder in a `vae` component folder, whole on every device of `sharding`."""
    vae, placed = _abstract_vae(folder, dtype, sharding)
    return vae, load_params(folder, VAE, placed, unused=("time_conv",))


def _abstract_vae(folder: epath.PathLike, dtype: Any, sharding: Any) -> tuple[Vae, Any]:
    dtype = jnp.dtype(dtype)
    vae = Vae(VaeConfig.from_dict(read_config(folder)), dtype=dtype, param_dtype=dtype)
    side = 2 * vae.config.spatial_factor
    pixels = jax.ShapeDtypeStruct((1, side, side, vae.config.input_channels), jnp.float32)
    abstract = nn.unbox(jax.eval_shape(vae.init, jax.random.key(0), pixels))["params"]
    return vae, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )


def shard_adapter(adapter: Adapter, params: Any) -> Adapter:
    """Lays an adapter out over the devices; see `adapter_shardings`."""
    return jax.tree.map(jax.device_put, adapter, adapter_shardings(adapter, params))


def abstract_adapter(adapter: Adapter, params: Any) -> Adapter:
    """What `shard_adapter` gives, as shapes with shardings; both may be shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        adapter,
        adapter_shardings(adapter, params),
    )


def adapter_shardings(adapter: Adapter, params: Any) -> Adapter:
    """Where `shard_adapter` puts the arrays of an adapter; both may be shapes.

    The long side of each matrix (a's inputs, b's outputs) is split as the kernel's is, and further
    over the mesh axes that split the kernel's other side: over all that split the kernel, so that
    no device keeps a copy of what another one has. Axes that do not divide it are left out.
    """
    kernels = traverse_util.flatten_dict(params)

    def placed(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        kernel = kernels[(*path[:-1], "kernel")]
        mesh = kernel.sharding.mesh
        *layers, inputs, outputs = (
            *kernel.sharding.spec,
            *(None,) * (kernel.ndim - len(kernel.sharding.spec)),
        )
        if path[-1] == "scale":
            ends = ()
        elif path[-1] == "a":
            ends = (_dividing(leaf.shape[-2], mesh, inputs, outputs), None)
        else:
            ends = (None, _dividing(leaf.shape[-1], mesh, outputs, inputs))
        return NamedSharding(mesh, PartitionSpec(*layers, *ends))

    return jax.tree.map(
        lambda tree: traverse_util.path_aware_map(placed, tree),
        adapter,
        is_leaf=lambda x: isinstance(x, Mapping),
    )


def _dividing(size: int, mesh: Mesh, *entries: Any) -> tuple[str, ...] | None:
    """Of the axes that entries of a `PartitionSpec` name, those that divide `size` together."""
    chosen: tuple[str, ...] = ()
    for entry in entries:
        for name in (entry,) if isinstance(entry, str) else entry or ():
            if size % math.prod(mesh.shape[axis] for axis in (*chosen, name)) == 0:
                chosen = (*chosen, name)
    return chosen or None
