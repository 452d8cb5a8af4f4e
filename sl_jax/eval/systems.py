"""Who decomposes: a model with or without adapters, ready-made layers, and the baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from sl_jax.checkpoints.adapters import adapter_digest, load_adapter
from sl_jax.checkpoints.pipeline import (
    ComputeConfig,
    load_pipeline,
    parameter_shapes,
    shard_adapter,
)
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data.pictures import longest_side_size, resize_to
from sl_jax.eval.baselines import BASELINES, Baseline
from sl_jax.eval.options import Named, SamplerChoice
from sl_jax.eval.samples import EvalPicture, Sample
from sl_jax.eval.stacks import StackError, read_stack
from sl_jax.inference.decomposer import (
    Decomposer,
    PictureDecomposer,
    Sampling,
    picture_keys,
)
from sl_jax.inference.fingerprints import checkpoint_digest
from sl_jax.inference.prompts import PromptEmbeddings, encode_prompts, user_cache
from sl_jax.models.lora import Adapter
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh


class Task(NamedTuple):
    """One picture to decompose into so many layers."""

    picture: EvalPicture
    sample: Sample
    layers: int


class Unmade(NamedTuple):
    """No layers, and why."""

    reason: str


Layers = UInt8[np.ndarray, "l h w 4"]
Make = Callable[[Sequence[Task]], Sequence[Layers | Unmade]]


@dataclass(frozen=True)
class System:
    """Something that turns pictures into layers.

    Attributes:
      name: as tables call it.
      kind: layers of models are costly, and kept; those of the others are made when needed.
      settings: all that decides its layers besides picture, seed and number of layers.
      make: layers for each task, or why there are none. Tasks of one call have one size and one
        number of layers.
      batch: tasks per call.
      stamp: for a picture, what changes when its layers do; results of other layers do not count.
      adapter: name and place of the adapter that it samples with.
    """

    name: str
    kind: Literal["model", "layers", "baseline"]
    settings: Mapping[str, Any]
    make: Make
    batch: int = 1
    stamp: Callable[[EvalPicture], str] = lambda picture: ""
    adapter: Named | None = None


def baseline_systems() -> list[System]:
    """The decompositions that need no model."""
    return [
        System(name, "baseline", {"kind": "baseline"}, _each(baseline))
        for name, baseline in BASELINES.items()
    ]


def _each(baseline: Baseline) -> Make:
    return lambda tasks: [baseline(task.sample.source, task.layers) for task in tasks]


def ready_made(name: str, folder: str) -> System:
    """Layers that another program wrote: FOLDER/PICTURE/0000.png, … for each picture.

    They may have the size at which the picture is decomposed here, its own, or one in proportion;
    what has another number of layers than asked for is taken as it is. Files that change are
    measured again.
    """
    root = epath.Path(folder).expanduser()

    def make(tasks: Sequence[Task]) -> list[Layers | Unmade]:
        return [_ready(root / task.picture.name, task.picture) for task in tasks]

    def stamp(picture: EvalPicture) -> str:
        return _stamp(root / picture.name)

    return System(name, "layers", {"kind": "layers"}, make, stamp=stamp)


def _stamp(folder: epath.Path) -> str:
    """Changes with the files of a folder: their names, sizes and times."""
    if not folder.is_dir():
        return ""
    files = sorted((path.name, path.stat()) for path in folder.iterdir())
    told = "".join(f"{name} {status.length} {status.mtime}\n" for name, status in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _ready(folder: epath.Path, picture: EvalPicture) -> Layers | Unmade:
    try:
        layers = read_stack(folder)
    except StackError as error:
        return Unmade(f"{folder}: {error}")
    given = layers.shape[1:3]
    if given == picture.size:
        return layers
    shown_at = longest_side_size(*given, max(picture.size))
    if picture.size == shown_at or given == picture.original:
        return np.stack([resize_to(layer, picture.size) for layer in layers])
    sizes = (f"{width}×{height}" for height, width in (given, picture.original))
    return Unmade("{}: its layers are {}, and the picture is {}".format(folder, *sizes))


@dataclass(frozen=True)
class ModelConfig:
    """A model and how it is sampled.

    Attributes:
      model: a folder in the diffusers layout, a hub id, or "tiny".
      prompt, negative_prompt: for all pictures.
      guidance, normalize: of classifier-free guidance, see `inference.sampling.Guidance`.
      dtype: "bfloat16" or "float32".
      seed: of the first picture's noise; the next has seed + 1.
      batch: pictures at a time; rounded up to the number of shards of the batch.
    """

    model: str
    prompt: str
    negative_prompt: str = " "
    guidance: float = 1.0
    normalize: bool = True
    dtype: str = "bfloat16"
    seed: int = 42
    batch: int = 1


class Model:
    """A model with its adapters; weights are loaded once, when the first layers are made."""

    def __init__(self, config: ModelConfig, adapters: Mapping[str, str]):
        """`adapters`: where each is, by name; see `checkpoints.adapters.locate_adapter`."""
        self._config = config
        self._where = dict(adapters)
        self._digests: dict[str | None, str] = {}
        self._loaded: _Loaded | None = None

    def system(self, name: str, adapter: str | None, sampler: SamplerChoice) -> System:
        """One adapter, or the base without any, with one sampler.

        Args:
          name: as tables call it.
          adapter: one of the names of adapters; None for the base.
          sampler: how it is sampled.

        Raises:
          CheckpointError: the model or the adapter is missing or damaged.
        """
        config = self._config
        settings = {
            "kind": "model",
            "checkpoint_sha256": self._digest(None),
            "adapter_sha256": self._digest(adapter) if adapter else None,
            "seed": config.seed,
            "sampler": sampler.method,
            "steps": sampler.steps,
            "guidance": config.guidance,
            "cfg_normalize": config.normalize,
            "prompt": config.prompt,
            "negative_prompt": config.negative_prompt if config.guidance != 1 else None,
            "dtype": config.dtype,
        }

        def make(tasks: Sequence[Task]) -> list[Layers]:
            sampling = Sampling(
                layers=tasks[0].layers,
                steps=sampler.steps,
                sampler=sampler.method,
                size=max(tasks[0].picture.size),
                guidance=config.guidance,
                normalize=config.normalize,
            )
            keys = picture_keys([config.seed + task.picture.index for task in tasks])
            frames = np.stack([_opaque(task.sample.source) for task in tasks])
            return list(
                self._decomposer(adapter).decompose(frames, keys, sampling, batch=config.batch)
            )

        named = Named(adapter, self._where[adapter]) if adapter else None
        return System(name, "model", settings, make, config.batch, adapter=named)

    def _digest(self, adapter: str | None) -> str:
        """Of an adapter, or of the model itself, each computed once."""
        if adapter not in self._digests:
            self._digests[adapter] = (
                adapter_digest(self._where[adapter])
                if adapter
                else checkpoint_digest(self._config.model)
            )
        return self._digests[adapter]

    def _decomposer(self, adapter: str | None) -> PictureDecomposer:
        if self._loaded is None:
            self._loaded = _load(self._config, self._where)
        decomposer, prompts, adapters, layout = self._loaded
        return PictureDecomposer(decomposer, prompts, adapters[adapter], layout)


class _Loaded(NamedTuple):
    decomposer: Decomposer
    prompts: PromptEmbeddings
    adapters: dict[str | None, Adapter | None]
    layout: Layout


def _load(config: ModelConfig, where: Mapping[str, str]) -> _Loaded:
    """Everything on the devices of this process; what may not fit is read before the weights."""
    folder = resolve_model(config.model)
    shapes = parameter_shapes(folder)
    adapters = {name: load_adapter(path, shapes) for name, path in where.items()}
    layout = Layout(make_mesh(MeshConfig(), jax.local_devices()))
    texts = [config.prompt, config.negative_prompt]
    prompts = encode_prompts(folder, texts, cache_dir=user_cache(), dtype=config.dtype)
    compute = ComputeConfig(config.dtype, remat="none")
    pipeline = load_pipeline(folder, compute, layout, adapters.values())
    placed = {name: shard_adapter(adapter, pipeline.params) for name, adapter in adapters.items()}
    return _Loaded(Decomposer(pipeline), prompts, {None: None, **placed}, layout)


def _opaque(source: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 4"]:
    return np.concatenate([source, np.full_like(source[..., :1], 255)], axis=-1)
