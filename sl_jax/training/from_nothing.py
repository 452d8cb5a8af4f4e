"""A small base from nothing, on procedural designs: the autoencoder, then the flow.

The result is a checkpoint in the diffusers layout, on which every command can be tried on a CPU.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from sl_jax.checkpoints.pipeline import load_vae
from sl_jax.data.procedural import FAMILIES, MAX_LAYERS
from sl_jax.flow.schedule import SigmaDistribution
from sl_jax.models.codec import to_unit_range
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.packing import PATCH
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.training import export, pools, workdir
from sl_jax.training.configuration import (
    AT_LEAST_ONE,
    LOG,
    NOT_NEGATIVE,
    PARTS,
    POSITIVE,
    Rule,
    broken,
    checked,
    given,
    one_of,
)
from sl_jax.training.metrics import LogConfig
from sl_jax.training.supervised import (
    STAGE_RULES,
    WATCHED,
    Frames,
    StageConfig,
    flow_loss,
    fresh_params,
    full_velocity,
    open_stage,
    reconstruction_loss,
    warmup_problems,
)

_log = logging.getLogger(__name__)

_TRAIN_SEEDS = 1_000_000  # held-out designs count from 0, so the two never meet
_VAE_HELD_OUT = 32
_STATISTICS_FRAMES = 2048  # flat pictures, and as many layers
_IDENTITY = workdir.Identity(
    frozenset({"workdir", "export", "export_dtype", "stages", "log"})
    | {f"{stage}.{name}" for stage in ("vae", "flow") for name in WATCHED}
)

# Makes tokenizer and text encoder in a folder; gives the hidden states of the prompt.
MakeText = Callable[[Path], Float[Array, "s e"]]


@dataclass(frozen=True, kw_only=True)
class VaeStageConfig(StageConfig):
    """How the autoencoder is trained.

    Attributes:
        architecture: fields of `VaeConfig`, but for the latents' statistics, which are measured.
        designs: per number of layers.
        batch: frames per update, half of them flat pictures, half layers.
        kl_weight: see `reconstruction_loss`.
    """

    architecture: Mapping[str, Any]
    designs: int
    batch: int
    kl_weight: float


@dataclass(frozen=True, kw_only=True)
class FlowStageConfig(StageConfig):
    """How the MMDiT is trained.

    Attributes:
        architecture: fields of `MMDiTConfig`.
        designs, held_out_designs: per number of layers.
        batch: designs per update.
        mu: shift of the noise levels, which the exported scheduler applies too.
        time_distribution: see `flow_loss`.
    """

    architecture: Mapping[str, Any]
    designs: int
    held_out_designs: int
    batch: int
    mu: float
    time_distribution: SigmaDistribution = "uniform"


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A base from nothing.

    Attributes:
        stages: those to run, of those that are not finished.
        seed: of parameters, order and noise.
        workdir: where checkpoints, metrics and the autoencoder go.
        export, export_dtype: folder of the resulting checkpoint, and type of its tensors.
        data: see `pools.DesignsConfig`.
    """

    stages: tuple[Literal["vae", "flow"], ...]
    seed: int
    workdir: str
    export: str
    export_dtype: Literal["float16", "float32"]
    data: pools.DesignsConfig
    vae: VaeStageConfig
    flow: FlowStageConfig
    log: LogConfig = field(default_factory=LogConfig)


def _for_stage(stage: str) -> dict[str, Rule]:
    optimizer = {name: rule for name, rule in PARTS.items() if name.startswith("optimizer.")}
    rules = {**optimizer, **STAGE_RULES, "designs": AT_LEAST_ONE, "batch": AT_LEAST_ONE}
    return {f"{stage}.{name}": rule for name, rule in rules.items()}


_RULES = {
    **{name: PARTS[name] for name in ("workdir", "seed")},
    **LOG,
    **_for_stage("vae"),
    **_for_stage("flow"),
    "stages": given("vae, flow, or both"),
    "data.family": one_of(tuple(FAMILIES)),
    "data.size": Rule(
        lambda size: size > 0 and size % PACKED_PIXELS == 0, f"a multiple of {PACKED_PIXELS}"
    ),
    "data.layers": Rule(
        lambda layers: layers and all(1 <= count <= MAX_LAYERS for count in layers),
        f"one or more numbers of layers from 1 to {MAX_LAYERS}, such as (2, 3)",
    ),
    "vae.batch": Rule(
        lambda batch: batch > 0 and batch % 2 == 0, "an even number: half pictures, half layers"
    ),
    "vae.kl_weight": NOT_NEGATIVE,
    "flow.held_out_designs": AT_LEAST_ONE,
    "flow.mu": POSITIVE,
}


def from_mapping(config: Mapping[str, Any]) -> BaseConfig:
    """Builds and checks the configuration.

    Raises:
        ConfigError: lists every field that is unknown, missing or out of range.
    """
    return checked(BaseConfig, config, _problems)


def _problems(config: BaseConfig) -> Iterator[str]:
    yield from broken(config, _RULES)
    yield from warmup_problems(config.vae, "config.vae")
    yield from warmup_problems(config.flow, "config.flow")
    if "flow" in config.stages:
        yield from export.place_problems(config.export)
    if config.stages == ("flow",) and not _trained_vae(Path(config.workdir)).exists():
        yield (
            f"config.stages is {config.stages}, and {_trained_vae(Path(config.workdir))} is "
            "missing; please run the stage vae first"
        )
    for name, make in (("vae", _vae), ("flow", _mmdit)):
        try:
            make(config)
        except (TypeError, ValueError) as error:
            yield f"config.{name}.architecture: {error}"


def _vae(config: BaseConfig) -> Vae:
    shape = config.vae.architecture
    vae = Vae(VaeConfig.from_dict({**shape, **export.unit_statistics(shape.get("z_dim", 0))}))
    if vae.config.spatial_factor * PATCH != PACKED_PIXELS:
        raise ValueError(
            f"dim_mult is {vae.config.dim_mult}; please give 4 numbers, for 3 halvings"
        )
    return vae


def _mmdit(config: BaseConfig) -> MMDiT:
    model = MMDiT(MMDiTConfig.from_dict(config.flow.architecture))
    channels = config.vae.architecture.get("z_dim", 0) * PATCH**2
    if model.config.in_channels != channels:
        raise ValueError(
            f"in_channels is {model.config.in_channels}; please use {channels}, the values of "
            f"{PATCH} × {PATCH} latents of vae.architecture"
        )
    return model


def train(config: BaseConfig, make_text: MakeText) -> Path:
    """Runs the stages, from wherever the work directory stands.

    Returns:
        Where the last stage's result is.

    Raises:
        ConfigError: the work directory holds another configuration's run.
        CheckpointError: the autoencoder in it is damaged.
    """
    folder = Path(workdir.claim(config, _IDENTITY))
    workdir.record(config)
    if "vae" in config.stages:
        _train_vae(config, folder)
    return (
        _train_flow(config, folder, make_text) if "flow" in config.stages else _trained_vae(folder)
    )


def _trained_vae(folder: Path) -> Path:
    """Where the finished autoencoder is, whole as soon as it is there."""
    return folder / "vae" / "export"


def _train_vae(config: BaseConfig, folder: Path) -> None:
    target, settings, size = _trained_vae(folder), config.vae, config.data.size
    if target.exists():
        _log.info("%s is finished.", target.parent)
        return
    vae = _vae(config)
    pictures, layers = pools.pictures_and_layers(config.data, _TRAIN_SEEDS, settings.designs)
    held_out = pools.pictures_and_layers(config.data, 0, _VAE_HELD_OUT)
    losses = {"frames": reconstruction_loss(vae, settings.kl_weight)}
    pixels = np.zeros((1, size, size, 4), np.float32)
    with open_stage(settings, losses, target.parent, config.seed, config.log) as stage:
        state = stage.run(
            stage.start(fresh_params(vae, jax.random.key(config.seed), pixels)),
            pools.FramePool(pictures, layers, settings.batch, config.seed),
            [("frames", Frames(to_unit_range(np.concatenate(held_out))))],
            "vae",
        )
    frames = np.concatenate([pictures[:_STATISTICS_FRAMES], layers[:_STATISTICS_FRAMES]])
    shape = export.with_latent_statistics(vae, state.ema, frames)
    with export.in_place_of(target) as place:
        export.save_vae(place, shape, state.ema, np.float32)


def _train_flow(config: BaseConfig, folder: Path, make_text: MakeText) -> Path:
    settings, target = config.flow, Path(config.export)
    text = make_text(folder / "text")
    vae, vae_params = load_vae(_trained_vae(folder), np.float32)
    train_set, held_out = _latents(config, folder / "latents", pools.Encoder(vae, vae_params))
    model = _mmdit(config)
    losses = {
        grid: flow_loss(full_velocity(model, text, grid), settings.mu, settings.time_distribution)
        for grid in train_set
    }
    pool = pools.LatentPool(train_set, settings.batch, config.seed)
    grid, batch = pool(0)
    one = (batch.target[:1], batch.picture[:1], text[None], np.zeros(1, np.float32))
    params = fresh_params(model, jax.random.key(config.seed), *one, grid, method="initialise")
    examples = pools.LatentPool(held_out, settings.batch, 0).held_out()
    with open_stage(settings, losses, folder / "flow", config.seed, config.log) as stage:
        state = stage.run(stage.start(params), pool, examples, "flow")
    with export.in_place_of(target) as place:
        shutil.copytree(folder / "text", place, dirs_exist_ok=True)
        export.save_vae(place / "vae", vae.config, vae_params, config.export_dtype)
        export.save_transformer(place / "transformer", model.config, state.ema, config.export_dtype)
        export.save_pipeline_files(place, settings.mu)
    return target


def _latents(
    config: BaseConfig, folder: Path, encode: pools.Encoder
) -> tuple[dict[LatentGrid, np.ndarray], dict[LatentGrid, np.ndarray]]:
    """Of the designs to train on, and of those held out, by shape."""
    side = config.data.size
    grids = [LatentGrid.of_pixels(layers, side, side) for layers in config.data.layers]

    def of(first: int, count: int, recolour: bool) -> dict[LatentGrid, np.ndarray]:
        return {
            grid: pools.cached_latents(
                folder, encode, config.data, grid.layers, first, count, recolour
            )
            for grid in grids
        }

    settings = config.flow
    return of(_TRAIN_SEEDS, settings.designs, True), of(0, settings.held_out_designs, False)
