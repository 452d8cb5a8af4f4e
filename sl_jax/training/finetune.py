"""Supervised fine-tuning of a loaded checkpoint on designs with true layers.

The flow-matching loss of the base, at the noise levels of its own sampling grid; an adapter or all
parameters are trained, laid out over the mesh like the weights that they belong to.
"""

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int32, UInt8

from sl_jax.checkpoints.huggingface import named_tensors
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import ComputeConfig, Pipeline, load_pipeline
from sl_jax.checkpoints.tensor_files import local_path
from sl_jax.data.buckets import make_buckets
from sl_jax.data.paired import PairedData, open_paired
from sl_jax.data.paired_stream import PairedBatch, PairedShape, PairedStream
from sl_jax.flow.schedule import SchedulerConfig, SigmaDistribution, shift_mu
from sl_jax.imaging.words import counted
from sl_jax.models.codec import encode_frames
from sl_jax.models.lora import Adapter, LoRAConfig
from sl_jax.models.mmdit import MMDiT
from sl_jax.models.packing import pack
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae
from sl_jax.parallel.joining import DistributedConfig
from sl_jax.parallel.mesh import Layout, MeshConfig, batch_sharding
from sl_jax.parallel.processes import ALONE, Processes, batch_rows, from_local, to_everywhere
from sl_jax.training import workdir
from sl_jax.training.adapter import first_adapter
from sl_jax.training.compilation import compilation_cache
from sl_jax.training.configuration import (
    AT_LEAST_ONE,
    DECAY,
    LOG,
    NOT_NEGATIVE,
    PARTS,
    POSITIVE_OR_NONE,
    ConfigError,
    Rule,
    broken,
    checked,
    given,
    split_problems,
)
from sl_jax.training.export import in_place_of, place_problems, save_transformer
from sl_jax.training.layout import run_layout
from sl_jax.training.metrics import LogConfig
from sl_jax.training.same_data import require_same
from sl_jax.training.supervised import (
    STAGE_RULES,
    WATCHED,
    FlowBatch,
    Loss,
    StageConfig,
    StageState,
    Velocity,
    flow_loss,
    open_stage,
    warmup_problems,
)

_log = logging.getLogger(__name__)

# A run may be watched differently and moved to other machines without becoming another.
_IDENTITY = workdir.Identity(
    frozenset({*("workdir", "export", "mesh", "distributed", "log", *WATCHED)})
    | {"compute.attention", "compute.remat", "compute.cache"},
    own=frozenset({"compute.cache", "distributed"}),
)


@dataclass(frozen=True)
class PairedConfig:
    """Designs to train on.

    Attributes:
        path: as `data.paired.open_paired` takes it.
        eval_data: designs to measure the loss on; "" holds the share `eval_fraction` of `path` out.
        held_out: at most so many designs to measure the loss on.
        buckets: (height, width) that designs are stretched to, multiples of 16.
        min_layers, max_layers: designs with fewer layers are not used; with more, merged.
        prompt: of designs without a caption, and of all if `captions` is off.
        max_text_tokens: of prompts.
    """

    path: str
    eval_data: str = ""
    eval_fraction: float = 0.02
    held_out: int = 64
    buckets: tuple[tuple[int, int], ...] = ((640, 640),)
    min_layers: int = 2
    max_layers: int = 8
    prompt: str = ""
    captions: bool = True
    max_text_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(StageConfig):
    """One fine-tuning run; steps, optimizer and average are those of its only stage.

    Attributes:
        stages: what the command runs.
        seed: of adapter, order and noise.
        workdir: where checkpoints, metrics and the adapter go.
        model: the checkpoint; as `checkpoints.source.resolve_model` takes it.
        data: see `PairedConfig`.
        init_adapter: an adapter to go on from; "" for a fresh one of `lora`.
        export: folder for the trained checkpoint, where all parameters are trained.
        train: "lora", or "full" for all parameters.
        batch: designs per update, over all devices.
        mu: shift of the noise levels; None for the checkpoint's own rule.
        time_distribution: "uniform", the density of the sampling grid, or "logit_normal".
    """

    stages: tuple[Literal["tune"]] = ("tune",)
    seed: int
    workdir: str
    model: str
    data: PairedConfig
    batch: int
    export: str = ""
    init_adapter: str = ""
    train: Literal["lora", "full"] = "lora"
    mu: float | None = None
    time_distribution: SigmaDistribution = "uniform"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)


_RULES = {
    **PARTS,
    **LOG,
    **STAGE_RULES,
    "batch": AT_LEAST_ONE,
    "mu": POSITIVE_OR_NONE,
    "data.path": given("a folder of designs with layers, .psd files, or crello#train"),
    "data.eval_fraction": DECAY,
    "data.held_out": NOT_NEGATIVE,
    "data.min_layers": AT_LEAST_ONE,
    "data.max_text_tokens": Rule(lambda value: 1 <= value <= 1024, "1 to 1024"),  # the pipeline's
}


def from_mapping(config: Mapping[str, Any], devices: int) -> FineTuneConfig:
    """Builds and checks the configuration of a run on `devices` devices.

    Raises:
        ConfigError: lists every field that is unknown, missing or out of range.
    """
    return checked(FineTuneConfig, config, lambda built: _problems(built, devices))


def _problems(config: FineTuneConfig, devices: int) -> Iterator[str]:
    yield from broken(config, _RULES)
    data = config.data
    try:
        make_buckets(data.buckets, "config.data.buckets")
    except ValueError as error:
        yield str(error)
    if data.max_layers < data.min_layers:
        yield (
            f"config.data.max_layers is {data.max_layers}; please use at least data.min_layers, "
            f"which is {data.min_layers}"
        )
    if config.train == "full":
        yield from place_problems(config.export)
        if config.init_adapter:
            yield (
                f"config.init_adapter is {config.init_adapter!r}, and config.train full; please "
                "fold the adapter into the model first, with python -m sl_jax.convert merge"
            )
    yield from warmup_problems(config)
    yield from split_problems(config.mesh, devices, {"batch": config.batch})


# Prompts of a batch → their hidden states, as wide as the longest of the run, and lengths.
Texts = Callable[[Sequence[str]], tuple[Float[np.ndarray, "b s e"], Int32[np.ndarray, " b"]]]


def fine_tune(
    config: FineTuneConfig,
    model: epath.PathLike,
    encoded: Callable[[epath.Path, Sequence[str]], Texts],
    processes: Processes = ALONE,
) -> epath.Path:
    """Trains to the end, from wherever the work directory stands.

    Args:
        config: of the run.
        model: the checkpoint folder that `config.model` means.
        encoded: (folder, all prompts of the run) → `Texts`, which are kept in that folder; see
            `inference.prompts.PromptBatches`.
        processes: of the run.

    Returns:
        The result: a PEFT folder, or a checkpoint in the diffusers layout.

    Raises:
        FolderError: the designs cannot be used.
        CheckpointError: the checkpoint cannot be used.
        ConfigError: the work directory is another run's, the adapter does not fit the model, or
            the mesh does not fit the model or the processes.
    """
    folder = workdir.claim(config, _IDENTITY, processes)
    layout = run_layout(config.mesh, model)
    try:
        rows = batch_rows(layout.mesh, config.batch, processes.index).held
    except ValueError as error:
        raise ConfigError(f"config.mesh is {config.mesh}: {error}") from error
    first = _first(config, model, layout)
    training, held_out = _data(config.data, processes)
    with ExitStack() as stack:
        stack.enter_context(compilation_cache(config.compute.cache, folder))
        streams = [
            stack.enter_context(closing(_stream(config, data, rows)))
            for data in (training, held_out)
            if len(data)
        ]
        used = counted(streams[0].used, "design")
        _log.info("%s to train on, %d held out.", used, len(held_out))
        captions = {design.caption for data in (training, held_out) for design in data}
        texts = _texts(config.data, captions, partial(encoded, folder / "prompts"))
        pipeline = load_pipeline(model, config.compute, layout)
        with processes.together("recording the configuration"):
            if processes.is_main:
                workdir.record(config)
        trained, frozen = first(pipeline.params)
        feed = _Feed(pipeline, texts, layout, config.batch)
        shapes = {shape for stream in streams for shape in stream.shapes}
        losses = {_grid(s): _loss(config, pipeline, _grid(s)) for s in sorted(shapes)}
        module = pipeline.model
        del pipeline  # with all parameters trained, nothing needs the loaded ones any more
        average = _average(
            config, folder, layout, trained, frozen, losses, streams, feed, processes
        )
    with processes.together("writing the result"):
        if config.train == "lora":
            whole = to_everywhere(Adapter(average, frozen.scale), layout.mesh)
            return _write_adapter(config, folder, whole, processes)
        return _write_model(config, model, module, average, layout, processes)


class Frozen(NamedTuple):
    """What stays as it is while an adapter is trained.

    Attributes:
        base: parameters of the model.
        scale: the adapter's constant factors.
    """

    base: Any
    scale: Any


def _data(config: PairedConfig, processes: Processes) -> tuple[PairedData, PairedData]:
    opened: list[PairedData] = []
    wanted = [config.path, *filter(None, [config.eval_data])]
    with processes.together("opening the designs"):
        if processes.is_main:  # which makes a dataset, if need be, before the others look for it
            opened = [open_paired(where) for where in wanted]
    opened = opened or [open_paired(where) for where in wanted]
    require_same("designs", [data.fingerprint for data in opened], wanted, processes)
    data, *others = opened
    if others:
        held_out = others[0]
        training = data.without(held_out)
    else:
        training, held_out = data.split(config.eval_fraction)
    _log.log(logging.WARNING if data.skipped else logging.INFO, "%s", data.summary())
    usable = [d for d in held_out if d.layers >= config.min_layers]
    chosen = sorted(usable, key=lambda design: design.content_hash)[: config.held_out]
    return training, dataclasses.replace(held_out, designs=tuple(chosen))


def _stream(config: FineTuneConfig, data: PairedData, rows: Sequence[int]) -> PairedStream:
    return PairedStream(
        data,
        make_buckets(config.data.buckets),
        batch=config.batch,
        min_layers=config.data.min_layers,
        max_layers=config.data.max_layers,
        seed=config.seed,
        rows=rows,
    )


def _grid(shape: PairedShape) -> LatentGrid:
    return LatentGrid.of_pixels(shape.layers, *shape.bucket)


def _first(
    config: FineTuneConfig, model: epath.PathLike, layout: Layout
) -> Callable[[Any], tuple[Any, Frozen | None]]:
    """Base parameters → what is trained, as it begins, and what is not.

    What is wrong is said before they load.
    """
    if config.train == "full":
        _check_apart(Path(config.export), local_path(model))
        return lambda base: (jax.tree.map(lambda x: x.astype(jnp.float32), base), None)
    adapter_on = first_adapter(config, epath.Path(model), layout).on

    def begin(base: Any) -> tuple[Any, Frozen]:
        adapter = adapter_on(base)
        return adapter.lora, Frozen(base, adapter.lora_scale)

    return begin


def _check_apart(export: Path, model: Path) -> None:
    one, other = export.resolve(), model.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ConfigError(
            f"config.export is {export}, and the model is in {model}; please write the result "
            "elsewhere"
        )


def time_shift(scheduler: SchedulerConfig, condition_tokens: int) -> float:
    """The factor that shifts noise levels as the scheduler's sampling grid is shifted.

    Args:
        scheduler: of the checkpoint.
        condition_tokens: packed tokens of the picture.
    """
    if not scheduler.use_dynamic_shifting:
        return scheduler.shift
    mu = shift_mu(condition_tokens)
    return math.exp(mu) if scheduler.time_shift_type == "exponential" else mu


def _loss(config: FineTuneConfig, pipeline: Pipeline, grid: LatentGrid) -> Loss:
    shift = config.mu or time_shift(pipeline.scheduler, grid.frame_tokens)
    return flow_loss(tuned_velocity(pipeline.model, grid), shift, config.time_distribution)


def tuned_velocity(model: MMDiT, grid: LatentGrid) -> Velocity:
    """What is trained is the adapter's `lora`, or, where nothing is frozen, all parameters."""

    def velocity(
        trained: Any, frozen: Frozen | None, x: Array, t: Array, batch: FlowBatch
    ) -> Array:
        if frozen is None:
            params = jax.tree.map(lambda leaf: leaf.astype(model.param_dtype), trained)
            variables = {"params": params}
        else:
            variables = {"params": frozen.base, **Adapter(trained, frozen.scale).variables()}
        modulation = model.apply(variables, t, method="modulate")
        return model.apply(
            variables, x, batch.picture, batch.text, batch.lengths, modulation, grid
        ).astype(jnp.float32)

    return velocity


def _texts(
    config: PairedConfig, captions: set[str], encoded: Callable[[Sequence[str]], Texts]
) -> Texts:
    """Captions of a batch, of which those that are not trained with stand for the prompt."""
    used = captions - {"", config.prompt} if config.captions else set()
    texts = encoded([config.prompt, *sorted(used)])
    return lambda batch: texts([text if text in used else config.prompt for text in batch])


class _Feed:
    """Encodes what a stream reads, and lays it out over the devices."""

    def __init__(self, pipeline: Pipeline, texts: Texts, layout: Layout, batch: int):
        self._vae_params = pipeline.vae_params
        self._texts = texts
        self._sharding = batch_sharding(layout.mesh)
        self._batch = batch
        self._encode = jax.jit(
            partial(packed_frames, pipeline.vae), out_shardings=(self._sharding,) * 2
        )

    def __call__(self, read: tuple[PairedShape, PairedBatch]) -> tuple[LatentGrid, FlowBatch]:
        shape, batch = read
        placed = partial(from_local, sharding=self._sharding, rows=self._batch)
        target, picture = self._encode(self._vae_params, placed(batch.frames))
        text, lengths = map(placed, self._texts(batch.captions))
        return _grid(shape), FlowBatch(target, picture, text, lengths, batch.fresh)


def packed_frames(
    vae: Vae, params: Any, frames: UInt8[Array, "b f h w 4"]
) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
    """Packed, normalised latents of all frames, one after the other, and of the first alone.

    Frame by frame for all samples, so that memory does not grow with the number of layers.
    """

    def packed(frame: Array) -> Array:
        return pack(encode_frames(vae, params, frame).astype(jnp.float32)[:, None])

    tokens = jax.lax.map(packed, jnp.moveaxis(frames, 1, 0))
    target = jnp.moveaxis(tokens, 0, 1).reshape(tokens.shape[1], -1, tokens.shape[-1])
    return target, tokens[0]


class _AdapterCheckpoints:
    """Checkpoints whose average is a whole adapter, as every other command reads it."""

    def __init__(self, checkpoints: RunCheckpoints, scale: Any):
        self._checkpoints = checkpoints
        self._scale = scale
        self.wait = checkpoints.wait

    @property
    def latest(self) -> int | None:
        return self._checkpoints.latest

    def save(self, step: int, state: StageState, record: Mapping[str, Any]) -> None:
        self._checkpoints.save(step, self._whole(state), record)

    def restore(self, like: StageState) -> tuple[int, StageState, dict[str, Any]]:
        step, state, record = self._checkpoints.restore(self._whole(like))
        return step, state.replace(ema=state.ema.lora), record

    def _whole(self, state: StageState) -> StageState:
        return state.replace(ema=Adapter(state.ema, self._scale))


def _average(
    config: FineTuneConfig,
    folder: epath.Path,
    layout: Layout,
    trained: Any,
    frozen: Frozen | None,
    losses: Mapping[LatentGrid, Loss],
    streams: Sequence[PairedStream],
    feed: _Feed,
    processes: Processes,
) -> Any:
    """Trains to the end; of the stage's state the average alone is kept."""

    def kept_as(checkpoints: RunCheckpoints) -> Any:
        return checkpoints if frozen is None else _AdapterCheckpoints(checkpoints, frozen.scale)

    with open_stage(
        *(config, losses, folder, config.seed, config.log),
        frozen=frozen,
        mesh=layout.mesh,
        processes=processes,
        kept_as=kept_as,
    ) as stage:
        examples = [feed(read) for read in _held_out(streams)]
        state = stage.start(trained)
        return stage.run(state, lambda step: feed(streams[0](step)), examples, "tune").ema


def _held_out(streams: Sequence[PairedStream]) -> Iterator[tuple[PairedShape, PairedBatch]]:
    if len(streams) > 1:
        yield from streams[1].in_order()


def _write_adapter(
    config: FineTuneConfig, folder: epath.Path, adapter: Adapter, processes: Processes
) -> epath.Path:
    target = folder / "adapter"
    if processes.is_main:
        save_peft(target, adapter, config.model)
    return target


def _write_model(
    config: FineTuneConfig,
    base: epath.PathLike,
    module: MMDiT,
    params: Any,
    layout: Layout,
    processes: Processes,
) -> epath.Path:
    """Writes the base with other parameters of the transformer.

    All processes gather one tensor after the other; the main one alone keeps what it writes.
    """

    def whole(array: Array) -> np.ndarray:
        processes.barrier("gathering the result")  # where all hear of a disk that is full
        return to_everywhere(array, layout.mesh)

    target = Path(config.export)
    if processes.is_main:
        with in_place_of(target) as place:
            others = shutil.ignore_patterns("transformer")
            shutil.copytree(local_path(base), place, ignore=others, dirs_exist_ok=True)
            dtype = jnp.dtype(config.compute.dtype)
            save_transformer(place / "transformer", module.config, params, dtype, whole)
    else:
        for _ in named_tensors(MMDIT, params, whole=whole):
            pass
    return epath.Path(target)
