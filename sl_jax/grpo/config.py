"""The typed configuration of a run; everything wrong with one is said before anything loads."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sl_jax.checkpoints.pipeline import ComputeConfig
from sl_jax.data.buckets import make_buckets
from sl_jax.flow.dynamics import Stochastic
from sl_jax.flow.sampler import OdeMethod, validate_window
from sl_jax.flow.schedule import sigma_grid
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.models.lora import DEFAULT_TARGETS, LoRAConfig
from sl_jax.parallel.joining import DistributedConfig
from sl_jax.parallel.mesh import MeshConfig
from sl_jax.scoring import JudgeConfig, RenderConfig, Rewards
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.endpoint_state import CoolDown
from sl_jax.scoring.rewards import BUILT_IN, Spec
from sl_jax.scoring.rewards import DEFAULT as DEFAULT_REWARDS
from sl_jax.scoring.rubric import load_prompts
from sl_jax.training.configuration import (
    AT_LEAST_ONE,
    AT_MOST,
    DECAY,
    LOG,
    NOT_NEGATIVE,
    PARTS,
    POSITIVE_OR_NONE,
    SEED,
    SHARE,
    Rule,
    broken,
    checked,
    given,
    split_problems,
)
from sl_jax.training.metrics import LogConfig
from sl_jax.training.optimizer import OptimizerConfig

_MOST_TEXT_TOKENS = 1024  # of the checkpoint's pipeline


@dataclass(frozen=True)
class DataConfig:
    """Pictures to train on.

    Attributes:
        path: folder of pictures, local or gs://; `crello#SPLIT` or `tfds:NAME#SPLIT`.
        eval_data: the like, of held-out pictures; empty to hold out `eval_fraction` of `path`.
        eval_fraction: share of the pictures held out, by content hash.
        buckets: (height, width) in pixels, multiples of 16; each picture is stretched to the
            nearest by aspect ratio.
        layers: numbers of layers L, one of which each step has.
        caption: where captions come from: the "files" beside the pictures, or the "vlm" of the
            judge pool, asked once per picture; "prompt" for none.
        prompt: caption of pictures without one.
        max_text_tokens: longer prompts are cut.
    """

    path: str = ""
    eval_data: str = ""
    eval_fraction: float = 0.05
    buckets: tuple[tuple[int, int], ...] = ((640, 640),)
    layers: tuple[int, ...] = (3, 4)
    caption: Literal["files", "prompt", "vlm"] = "files"
    prompt: str = "a clean, well composed image"
    max_text_tokens: int = 512


@dataclass(frozen=True)
class RolloutConfig:
    """How candidates are sampled.

    Attributes:
        groups: pictures per epoch.
        batch_groups: pictures that are rolled out together, over all devices.
        group_size: candidates per picture, at least 2.
        steps: sampling steps.
        shift: μ of the σ grid; None takes the checkpoint's own rule.
        dynamics: how the stochastic steps go: "flow_sde", "dance_sde" or "cps".
        noise_level: a of flow.dynamics, in the stochastic steps; more explores more.
        window_size: how many steps are stochastic and trained.
        window_range: half-open range that the window lies in.
        window_order: "drawn": the start is drawn per epoch from the seed (Flow-GRPO-Fast);
            "sliding": from the range's first step on it moves by one every `window_epochs`, and
            stays at the last (MixGRPO, arXiv 2507.21802, with its stride of 1).
        window_epochs: epochs at each place of a sliding window.
        group_noise: "shared": the candidates of a group share the initial noise, and with it the
            prefix before the window; or "independent".
        ode_method: "euler" or "heun", of the other steps.
        train_frames: which frames a sample's likelihood is of; "layers" leaves out frame 0, the
            whole picture again, which is dropped from the result. Noise is drawn in all.
        guidance: scale of classifier-free guidance, from 1, which is none; candidates are then
            sampled by guided velocities, which the learner differentiates and the evaluation
            follows as well. It doubles what the transformer computes.
        negative_prompt: what guidance leads away from.
        max_staleness: 0: candidates are sampled by the policy that they update; 1: they are rolled
            out before the updates of the epoch before theirs, which leaves their judge that long.
            Steps whose ratio is outside the clip range are then truncated: they have no gradient,
            whichever way their advantage points.
    """

    groups: int = 32
    batch_groups: int = 8
    group_size: int = 8
    steps: int = 10
    shift: float | None = None
    dynamics: Stochastic = "flow_sde"
    noise_level: float = 1.2
    window_size: int = 2
    window_range: tuple[int, int] = (0, 5)
    window_order: Literal["drawn", "sliding"] = "drawn"
    window_epochs: int = 25
    group_noise: Literal["shared", "independent"] = "shared"
    ode_method: OdeMethod = "euler"
    train_frames: Literal["all", "layers"] = "all"
    guidance: float = 1.0
    negative_prompt: str = " "
    max_staleness: Literal[0, 1] = 0


@dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages, see `grpo.advantages`.

    Attributes:
        scale: divide by the "group" std, the "batch" std, or by nothing ("none"); "criterion"
            divides each of the judge's criteria, and stage 2, by its own std in the group before
            they are weighted and summed.
        std_floor: least divisor, from the judge's measured noise.
    """

    scale: Literal["group", "batch", "none", "criterion"] = "group"
    std_floor: float = 0.01


@dataclass(frozen=True)
class StopConfig:
    """Bounds on how far the policy may be from the one that rolled out; None sets none.

    Means over the samples and steps of an update, before it is applied. One that is beyond a bound
    is not applied, and the rest of the epoch's updates are left out. Before the first update both
    policies are one.

    Attributes:
        kl: bound on the KL per latent scalar, exact for a Gaussian step.
        clip_fraction: bound on the share whose ratio has left the clip range.
        log_ratio: bound on the size of the log ratio.
    """

    kl: float | None = None
    clip_fraction: float | None = None
    log_ratio: float | None = None


@dataclass(frozen=True)
class LearnerConfig:
    """How the adapter is updated.

    Attributes:
        updates: per epoch; the epoch's pictures are split among them.
        micro_batch: samples per forward and backward pass, over all devices; None derives it from
            their memory, see `grpo.micro_batch`.
        ema: decay per update of the average that is exported and evaluated.
        reference: policy that the KL is from: "base", without adapter, or "init", with the adapter
            at the start.
        stop: when an epoch's remaining updates are left out.
    """

    updates: int = 2
    micro_batch: int | None = None
    ema: float = 0.9
    reference: Literal["base", "init"] = "base"
    stop: StopConfig = field(default_factory=StopConfig)


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how.

    Attributes:
        endpoint: where `endpoints` is empty: "embedded" computes scores from the rendered pictures,
            in process; "embedded-vlm" adds the compression and noise of a vision-language model.
        endpoints: servers that judge instead; the flag may be given several times.
        model: name of the judging model, of the endpoints that name none themselves.
        key_env: environment variable with the key, of the endpoints that name none themselves.
        two_stage: whether the candidates of a group are compared in a grid after each was scored.
        stage2_weight: λ in reward = (1 − λ)·stage 1 + λ·stage 2.
        grids: differently shuffled grids per group, whose scores are averaged.
        asks: how often a request is sent before its candidate, or the grid, has failed; the pool's
            own tries count, and are not cut short.
        weights: one per criterion, in the order of `scoring.types.CRITERIA`.
        prompts: folder with candidate.md, grid.md and, where it describes pictures, caption.md;
            empty for the packaged ones.
        captions: whether the judge is told the pictures' captions.
        render: how pictures are laid out.
        request: how a server is asked.
        tries: how often the pool sends a request at most, to one server after another, before its
            failure is told.
        patience: seconds that a request waits while no server is up.
        hedge_after: seconds after which a second server is asked beside a slow one; None for never.
        cool_down: how long a server that fails is left alone.
        max_requests, max_tokens: what the run may spend on servers, restarts included; None for
            no limit.
        cache: whether servers' answers are kept, so that a resumed run asks nothing twice.
        cache_path: SQLite file of the answers and of what was spent, on a local disk; empty for
            judge.sqlite3 in the work directory.
        preflight: whether servers are tried before weights load.
        recorded_pictures: judged grids that are kept as pictures, per epoch.
        concurrency: groups in flight.
        min_valid: least share of valid candidates for an update.
        max_wait: seconds to wait for it before the run stops with a checkpoint.
    """

    endpoint: Literal["embedded", "embedded-vlm"] = "embedded"
    endpoints: tuple[EndpointConfig, ...] = ()
    model: str = ""
    key_env: str = ""
    two_stage: bool = True
    stage2_weight: float = 0.7
    grids: int = 1
    asks: int = 3
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    prompts: str = ""
    captions: bool = True
    render: RenderConfig = field(default_factory=RenderConfig)
    request: RequestConfig = field(default_factory=RequestConfig)
    tries: int = 4
    patience: float = 120.0
    hedge_after: float | None = None
    cool_down: CoolDown = field(default_factory=CoolDown)
    max_requests: int | None = None
    max_tokens: int | None = None
    cache: bool = True
    cache_path: str = ""
    preflight: bool = True
    recorded_pictures: int = 2
    concurrency: int = 8
    min_valid: float = 0.5
    max_wait: float = 3600.0

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the judging models, sorted: what a score depends on, unlike addresses."""
        return tuple(sorted({e.model for e in self.endpoints})) or (self.endpoint,)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out pictures with the averaged adapter.

    Attributes:
        every: epochs between evaluations; the first comes before training.
        pictures: held-out pictures that are decomposed; those of the report are among them.
        shown: pictures in the report and in TensorBoard.
        steps: sampling steps, from noise to picture.
        method: sampler, "euler" or "heun"; Heun takes two velocities per step, but for the last.
        batch: pictures sampled together.
        seed: what the initial noise follows from, the same at every evaluation.
        judge: servers that judge held-out pictures; empty for the judge of training.
        window_share: whether to measure as well, by two rollout batches of held-out pictures, what
            share of the variance of scores within a group of independent noise is the window's.
    """

    every: int = 10
    pictures: int = 32
    shown: int = 8
    steps: int = 50
    method: OdeMethod = "heun"
    batch: int = 8
    seed: int = 0
    judge: tuple[EndpointConfig, ...] = ()
    window_share: bool = False

    @property
    def spread_draws(self) -> int:
        """Rollout batches of an evaluation that measures `window_share`."""
        return 2 if self.window_share else 0

    def times(self, epochs: int) -> int:
        """How many evaluations so many epochs make: before them, on schedule, and at their end."""
        return 1 + epochs // self.every + bool(epochs % self.every)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the whole state.

    Attributes:
        every: epochs between two; Ctrl-C and the end of the run leave one as well.
        keep: how many of the newest stay; that of the best evaluation stays as well.
    """

    every: int = 1
    keep: int = 3


@dataclass(frozen=True)
class HealthConfig:
    """When a run is not well, and says so or stops.

    Attributes:
        not_finite: updates in a row that are not finite, after which it stops with a checkpoint.
        tied_epochs: epochs in a row in which no group's rewards differ, after which it warns.
        kl: bound on the KL per latent scalar between the policy that rolled out and that of an
            epoch's last update, beyond which it warns.
        clip_fraction: bound on the share of samples there whose ratio has left the clip range,
            likewise.
        kept: groups with numbers that are not finite that are kept as files, in all.
    """

    not_finite: int = 5
    tied_epochs: int = 3
    kl: float = 1e-3
    clip_fraction: float = 0.5
    kept: int = 8


@dataclass(frozen=True)
class GrpoConfig:
    """A whole run. `configs/grpo.py` documents where each default comes from.

    Attributes:
        workdir: folder for all that the run leaves, local or gs://.
        model: a folder in the diffusers layout, local or gs://; a hub id; or "tiny".
        epochs: length of the whole run; it may be raised later.
        seed: what all that is drawn follows from: pictures, noise, fresh adapter.
        init_adapter: adapter to start from, with its own rank and targets: a PEFT folder, a
            diffusers LoRA file, a run or a checkpoint; empty for a fresh one by `lora`.
        rewards: (name, weight) or (name, weight, options) each: "judge", packaged vetoes, or
            anything importable; see `scoring.rewards`.
    """

    workdir: str
    model: str
    epochs: int
    seed: int = 0
    init_adapter: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(targets=DEFAULT_TARGETS))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(3e-4))
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    rewards: tuple[Spec, ...] = DEFAULT_REWARDS
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)


def from_mapping(config: Mapping[str, Any], devices: int) -> GrpoConfig:
    """Builds and checks the configuration of a run on `devices` devices.

    Raises:
        ConfigError: lists every field that is unknown, missing or out of range.
    """
    return checked(GrpoConfig, _with_endpoints(config), lambda built: _problems(built, devices))


def _with_endpoints(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with every endpoint as a mapping of its own fields."""
    shared = {"judge": ("endpoints", ("model", "key_env")), "evaluation": ("judge", ())}
    changed = dict(config)
    for part, (name, inherited) in shared.items():
        settings = config.get(part)
        if isinstance(settings, Mapping) and isinstance(settings.get(name), list | tuple):
            common = {key: settings[key] for key in inherited if key in settings}
            common.setdefault("model", "")
            changed[part] = {
                **settings,
                name: tuple(_endpoint(item, common) for item in settings[name]),
            }
    return changed


def _endpoint(item: Any, common: Mapping[str, Any]) -> Any:
    if isinstance(item, str):
        return {**common, "url": item}
    return {**common, **item} if isinstance(item, Mapping) else item


def _problems(config: GrpoConfig, devices: int) -> Iterator[str]:
    yield from _range_problems(config)
    rollout, learner = config.rollout, config.learner
    if rollout.group_size < 2:
        yield (
            f"config.rollout.group_size is {rollout.group_size}; candidates are compared within "
            "their group, so please use at least 2"
        )
    per_update = rollout.batch_groups * learner.updates
    if per_update > 0 and rollout.groups % per_update:
        yield (
            f"config.rollout.groups is {rollout.groups}; please use a multiple of batch_groups × "
            f"updates = {rollout.batch_groups} × {learner.updates}"
        )
    yield from _window_problems(rollout)
    yield from _data_problems(config.data)
    yield from _judge_problems(config)
    yield from _mesh_problems(config, devices)


_AT_LEAST_ONE = (
    "epochs",
    "rollout.groups",
    "rollout.batch_groups",
    "rollout.steps",
    "rollout.window_epochs",
    "learner.updates",
    "judge.grids",
    "judge.asks",
    "judge.tries",
    "judge.concurrency",
    "evaluation.every",
    "evaluation.pictures",
    "evaluation.steps",
    "evaluation.batch",
    "checkpoint.every",
    "checkpoint.keep",
)
_NOT_NEGATIVE = (
    "advantage.std_floor",
    "judge.max_wait",
    "judge.patience",
    "judge.recorded_pictures",
    "evaluation.shown",
)
_OPTIONAL = ("judge.max_requests", "judge.max_tokens", "judge.hedge_after")
_AT_MOST = (
    "rollout.group_size",
    "judge.request.timeout",
    "judge.cool_down.first",
    "judge.cool_down.longest",
)
_RULES = {
    **PARTS,
    **LOG,
    **dict.fromkeys(_AT_LEAST_ONE, AT_LEAST_ONE),
    **dict.fromkeys(_NOT_NEGATIVE, NOT_NEGATIVE),
    **dict.fromkeys(_AT_MOST, AT_MOST),
    **dict.fromkeys(_OPTIONAL, Rule(POSITIVE_OR_NONE.holds, "None or more than 0")),
    "evaluation.seed": SEED,
    "data.path": given("a folder of pictures to train on, crello#train, or tfds:NAME#train"),
    "data.layers": given("one or more numbers of layers, such as (3, 4)"),
    "learner.ema": DECAY,
    "learner.micro_batch": Rule(lambda size: size is None or size >= 1, "None or at least 1"),
    "rollout.shift": POSITIVE_OR_NONE,
    **dict.fromkeys(("health.not_finite", "health.tied_epochs"), AT_LEAST_ONE),
    **dict.fromkeys(("health.kl", "health.clip_fraction", "health.kept"), NOT_NEGATIVE),
    **{f"learner.stop.{bound.name}": POSITIVE_OR_NONE for bound in fields(StopConfig)},
    "rollout.guidance": Rule(lambda scale: 1 <= scale < math.inf, "a number from 1, which is none"),
    "judge.min_valid": SHARE,
}


def _range_problems(config: GrpoConfig) -> Iterator[str]:
    yield from broken(config, _RULES)
    warmup, decay = config.optimizer.warmup_steps, config.optimizer.decay_steps
    if decay != 0 and decay <= warmup:
        yield (f"config.optimizer.decay_steps is {decay}; please use 0, or more than warmup_steps")


def _window_problems(rollout: RolloutConfig) -> Iterator[str]:
    shift = 1.0 if rollout.shift is None else rollout.shift
    if rollout.steps < 1 or shift <= 0:
        return
    try:
        validate_window(
            rollout.dynamics,
            sigma_grid(rollout.steps, shift),
            window_range=rollout.window_range,
            window_size=rollout.window_size,
            noise_level=rollout.noise_level,
        )
    except ValueError as error:
        yield f"config.rollout.window_range {rollout.window_range}: {error}"


def _data_problems(data: DataConfig) -> Iterator[str]:
    try:
        make_buckets(data.buckets, "config.data.buckets")
    except ValueError as error:
        yield str(error)
    if min(data.layers, default=1) < 1:
        yield f"config.data.layers is {data.layers}; please give numbers of layers from 1 up"
    if not data.eval_data and not 0 < data.eval_fraction < 1:
        yield (
            f"config.data.eval_fraction is {data.eval_fraction}; please choose it between 0 and 1, "
            "or name a folder of held-out pictures as config.data.eval_data"
        )
    if not 1 <= data.max_text_tokens <= _MOST_TEXT_TOKENS:
        yield (
            f"config.data.max_text_tokens is {data.max_text_tokens}; please choose it from 1 to "
            f"{_MOST_TEXT_TOKENS}"
        )


def _judge_problems(config: GrpoConfig) -> Iterator[str]:
    judge = config.judge
    try:
        JudgeConfig(weights=judge.weights, stage2_weight=judge.stage2_weight)
    except ValueError as error:
        yield f"config.judge.{error}"
    try:
        load_prompts(judge.prompts or None)
    except (OSError, ValueError) as error:
        yield f"config.judge.prompts is {judge.prompts!r}: {error}"
    for name, endpoints in (
        ("judge.endpoints", judge.endpoints),
        ("evaluation.judge", config.evaluation.judge),
    ):
        labels = [endpoint.label for endpoint in endpoints]
        if len(set(labels)) < len(labels):
            yield f"config.{name} are called {labels}; please give each a name of its own"
    yield from _caption_problems(config)
    yield from _spending_problems(config)
    try:
        Rewards(config.rewards)
    except (ValueError, TypeError) as error:  # TypeError: options that a reward does not take
        yield f"config.rewards {config.rewards}: {error}"
    others = [name for name, *_ in config.rewards if name not in BUILT_IN]
    if config.advantage.scale == "criterion" and others:
        yield (
            f"config.advantage.scale is 'criterion', which knows the judge's criteria and the "
            f"packaged vetoes alone; please use another, or leave {others} out of config.rewards"
        )


def _caption_problems(config: GrpoConfig) -> Iterator[str]:
    if config.data.caption != "vlm":
        return
    if not config.judge.endpoints:
        yield (
            "config.data.caption is 'vlm', but no server is there to ask, and the judge in process "
            "describes nothing; please name config.judge.endpoints, or use 'files' or 'prompt'"
        )
    if not config.judge.cache:
        yield (
            "config.judge.cache is False; please set it True where config.data.caption is 'vlm': "
            "a run that goes on would ask for all captions again, and get others"
        )


def _spending_problems(config: GrpoConfig) -> Iterator[str]:
    judge = config.judge
    if not judge.endpoints and not config.evaluation.judge:
        for name in ("max_requests", "max_tokens", "hedge_after"):
            if getattr(judge, name) is not None:
                yield (
                    f"config.judge.{name} is {getattr(judge, name)}, which only servers heed; "
                    "please name config.judge.endpoints, or leave it None"
                )
    elif "://" in (judge.cache_path or config.workdir):
        yield (
            f"config.judge.cache_path is {judge.cache_path!r} and the work directory "
            f"{config.workdir}; please name a file on a local disk for the judge's answers"
        )


def _mesh_problems(config: GrpoConfig, devices: int) -> Iterator[str]:
    batches = {
        "rollout.batch_groups": config.rollout.batch_groups,
        "evaluation.batch": config.evaluation.batch,
    }
    if (size := config.learner.micro_batch) is not None:
        batches["learner.micro_batch"] = size
    yield from split_problems(config.mesh, devices, batches)
    samples = config.rollout.batch_groups * config.rollout.group_size
    if size and samples % size:
        yield (
            f"config.learner.micro_batch is {size}; please use None, or a divisor of "
            f"batch_groups × group_size = {samples}"
        )
