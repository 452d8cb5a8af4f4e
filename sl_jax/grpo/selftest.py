"""Does this host's hardware compute what it should, and how fast? Ten minutes at most.

Everything is checked on the packaged tiny base and on random weights: nothing is downloaded.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from sl_jax.checkpoints.pipeline import (
    ComputeConfig,
    Pipeline,
    load_pipeline,
    parameter_shapes,
    shard_adapter,
)
from sl_jax.checkpoints.source import TINY, resolve_model
from sl_jax.data import write_designs
from sl_jax.grpo.config import GrpoConfig, LearnerConfig, RolloutConfig
from sl_jax.grpo.learner import Learner, Scored, UpdateReport
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rollout import Pictures, Rollout
from sl_jax.grpo.run import run
from sl_jax.models.attention import Attention, Implementation, choose_implementation
from sl_jax.models.flops import gradient_flops, velocity_flops
from sl_jax.models.lora import DEFAULT_TARGETS, LoRAConfig, init_adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.parallel.peaks import memory_use, peak_flops
from sl_jax.training.metrics import read_metrics
from sl_jax.training.optimizer import OptimizerConfig

Numbers = dict[str, float]

_BF16 = 2e-2  # relative error of what is computed in bfloat16
_F32 = 1e-4  # in float32, by sums in another order
_GROUP = 4
_LORA = LoRAConfig(8, 16.0, DEFAULT_TARGETS)
_REPEATS = 5
_MOST_OF_PEAK = 1.05  # clocks vary


class Found(NamedTuple):
    """What one check says.

    Attributes:
        ok: whether all is as it should be.
        numbers: measured, by name.
        seconds: that it took.
        error: of a check that came to no end.
    """

    ok: bool
    numbers: Numbers
    seconds: float
    error: str = ""


class SelfTestError(Exception):
    """A check found something wrong; the message says what."""

    def __init__(self, message: str, numbers: Numbers):
        super().__init__(message)
        self.numbers = numbers


def selftest(
    epoch: Callable[[epath.Path], GrpoConfig],
    output: epath.PathLike,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs all checks, of which a failing one stops no other.

    Args:
        epoch: an empty folder → a short run on the tiny base, whose work directory is `run` and
            whose pictures are `pictures` there.
        output: the JSON file for what was found.
        say: is told a line about each check.

    Returns:
        Whether all of them passed.
    """
    devices = jax.devices()
    say(f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}), JAX {jax.__version__}")
    checks: dict[str, Callable[[], Numbers]] = {
        **{f"attention {name}": partial(check_attention, name) for name in implementations()},
        **_sharded_attention(devices),
        **{f"on policy, {dtype}": partial(check_on_policy, dtype) for dtype in _dtypes()},
        "sharded": check_sharded,
        "epoch": partial(check_epoch, epoch),
        "speed": check_speed,
    }
    found = {}
    for name, check in checks.items():
        found[name] = result = checked(check)
        told = ", ".join(f"{key} {value:.4g}" for key, value in result.numbers.items())
        verdict = "ok" if result.ok else "FAILED"
        why = f" {result.error}" if result.error else ""
        say(f"{name:<25} {verdict:<6} {result.seconds:6.1f} s  {told}{why}")
    record = {
        "devices": [device.device_kind for device in devices],
        "jax": jax.__version__,
        "checks": {
            name: result._asdict() | {"numbers": _without_nan(result.numbers)}
            for name, result in found.items()
        },
    }
    epath.Path(output).write_text(json.dumps(record, indent=1) + "\n")
    return all(result.ok for result in found.values())


def checked(check: Callable[[], Numbers]) -> Found:
    """The result of a check, however it ends."""
    began = time.monotonic()
    try:
        numbers, error = check(), ""
    except SelfTestError as failed:
        numbers, error = failed.numbers, str(failed)
    except (RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as failed:
        # What a compiler or a driver says is what the check is for.
        numbers, error = {}, f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}"
    return Found(not error, numbers, time.monotonic() - began, error)


def implementations() -> list[Implementation]:
    """Of attention, those that run on this platform."""
    chosen, _ = choose_implementation("auto", _platform(), jnp.bfloat16, 128)
    return list(dict.fromkeys(["xla", chosen]))


def check_attention(name: Implementation, attention: Callable[..., Any] | None = None) -> Numbers:
    """Results and gradients in bfloat16, of odd and padded lengths, against numpy in float64.

    Args:
        name: of the implementation.
        attention: it; by default `models.attention`'s.
    """
    attention = attention or Attention(name)
    rng = np.random.default_rng(0)
    lengths = np.array([333, 217])
    arrays = [
        np.asarray(jnp.asarray(rng.normal(size=(2, 333, 2, 128)), jnp.bfloat16), np.float64)
        for _ in range(4)
    ]
    valid = np.arange(333) < lengths[:, None]  # what padded queries give is nobody's business
    wanted = _reference_attention(*arrays, lengths, valid)

    def summed(query: Any, key: Any, value: Any) -> Any:
        result = attention(query, key, value, jnp.asarray(lengths))
        loss = (result * arrays[3] * valid[..., None, None]).astype(jnp.float32).sum()
        return loss, result

    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]
    gradients, result = jax.jit(jax.grad(summed, argnums=(0, 1, 2), has_aux=True))(*inputs)
    found = (np.where(valid[..., None, None], np.asarray(result, np.float64), 0), *gradients)
    names = ("result", "gradient_query", "gradient_key", "gradient_value")
    numbers = {
        n: _error(np.asarray(a, np.float64), b)
        for n, a, b in zip(names, found, wanted, strict=True)
    }
    return _below(numbers, _BF16)


def _sharded_attention(devices: Sequence[Any]) -> dict[str, Callable[[], Numbers]]:
    """The same checks on all devices together; none for one device."""
    if len(devices) == 1:
        return {}
    layout = Layout(make_mesh(attention_mesh(len(devices)), devices))
    return {
        f"attention {name}, sharded": partial(check_attention, name, Attention(name, layout))
        for name in implementations()
    }


def attention_mesh(devices: int) -> MeshConfig:
    """Splits the two samples, the two heads, and queries over the devices that are left."""
    data = 2 if devices % 2 == 0 else 1
    tensor = 2 if devices % 4 == 0 else 1
    return MeshConfig(data=data, fsdp=1, tensor=tensor, sequence=-1)


def _reference_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    weight: np.ndarray,
    lengths: np.ndarray,
    valid: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Softmax attention and the gradients of Σ weight · result, by hand."""
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    keys = np.arange(key.shape[1]) < lengths[:, None]
    scores = np.where(keys[:, None, None], scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mask = valid[..., None, None]
    result = np.einsum("bhqk,bkhd->bqhd", shares, value) * mask
    weight = weight * mask
    by_value = np.einsum("bhqk,bqhd->bkhd", shares, weight)
    by_share = np.einsum("bqhd,bkhd->bhqk", weight, value)
    by_score = shares * (by_share - (by_share * shares).sum(-1, keepdims=True)) * scale
    by_query = np.einsum("bhqk,bkhd->bqhd", by_score, key)
    by_key = np.einsum("bhqk,bqhd->bkhd", by_score, query)
    return result, by_query, by_key, by_value


class _Update(NamedTuple):
    """One rollout and one update on it.

    Attributes:
        latents: samples.
        gradient: Adam's first moment after its first step, a tenth of the gradient; as one vector.
        report: of the update.
    """

    latents: np.ndarray
    gradient: np.ndarray
    report: UpdateReport


def check_on_policy(dtype: str) -> Numbers:
    """Before the first update rollout and learner have one policy: log ratios stay far from a clip.

    The learner computes the velocity of one adapter twice, as new and as old: the ratio is 1 to the
    last bit. Against the rollout's program rounding makes a log ratio, told in clip ranges.
    """
    objective = ObjectiveConfig()
    report = _updated(make_mesh(MeshConfig()), dtype, objective).report
    log_ratio = np.concatenate([np.abs(step.mismatch.log_ratio) for step in report.steps])
    ratio = np.concatenate([np.abs(step.objective.ratio_excess) for step in report.steps])
    clip = min(objective.clip_low, objective.clip_high)
    numbers = {"mismatch_per_clip": float(log_ratio.mean() / clip), "ratio": float(ratio.max())}
    return _below(numbers, {"mismatch_per_clip": 0.5, "ratio": 0.0})


def check_sharded() -> Numbers:
    """Samples, loss and gradient of all devices together against those of the first, in float32."""
    devices = jax.devices()
    with jax.default_matmul_precision("highest"):
        many, one = (
            _updated(make_mesh(MeshConfig(), part), "float32", ObjectiveConfig(), moved=True)
            for part in (devices, devices[:1])
        )
    losses = [
        np.concatenate([s.objective.policy_loss for s in found.report.steps])
        for found in (many, one)
    ]
    numbers = {
        "samples": _error(many.latents, one.latents),
        "loss": _error(*losses),
        "gradient": _error(many.gradient, one.gradient),
    }
    return {"devices": len(devices)} | _below(numbers, _F32)


def _updated(
    mesh: jax.sharding.Mesh, dtype: str, objective: ObjectiveConfig, moved: bool = False
) -> _Update:
    """A rollout of random pictures by the tiny base, and an update with made-up advantages.

    With `moved`, of another adapter than the one that rolled out: then ratios are not 1. Samples
    are then in one micro-batch, as devices give shares of theirs to each, in another order.
    """
    layout, groups = Layout(mesh), _multiple(4)
    rollout = RolloutConfig(groups, groups, _GROUP, steps=4, window_range=(0, 3))
    pipeline, adapter = _tiny(layout, dtype)
    grid = LatentGrid(3, 4, 4)
    rolling = Rollout(pipeline, rollout, layout)
    candidates = rolling(adapter, _pictures(pipeline, groups, grid), 1, grid)
    samples = groups * _GROUP
    learner = Learner(
        *(pipeline, adapter, rollout, objective, OptimizerConfig(1e-3)),
        *(LearnerConfig(micro_batch=samples if moved else samples // 2), layout),
    )
    advantage = np.random.default_rng(1).normal(size=samples)
    weight = np.full(samples, 1 / samples)
    scored = Scored(candidates, rolling.table(grid), advantage, weight, grid)
    latents = np.asarray(candidates.latents)
    policy = adapter
    if moved:
        policy = adapter.replace(lora=jax.tree.map(lambda x: 1.01 * x, adapter.lora))
    old = jax.tree.map(jnp.copy, adapter)
    state, report = learner.update(learner.start(policy), [scored], old)
    moments = jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))
    gradient = np.concatenate([np.asarray(moment).ravel() for moment in moments])
    return _Update(latents, gradient, jax.device_get(report))


def _tiny(layout: Layout, dtype: str) -> tuple[Pipeline, Any]:
    """The tiny base and an adapter whose product is not zero."""
    folder = resolve_model(TINY)
    shapes = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), parameter_shapes(folder), _LORA)
    )
    pipeline = load_pipeline(folder, ComputeConfig(dtype=dtype), layout, [shapes])
    adapter = init_adapter(jax.random.key(3), pipeline.params, _LORA)
    lora = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(4), x.shape), adapter.lora
    )
    return pipeline, shard_adapter(adapter.replace(lora=lora), pipeline.params)


def _pictures(pipeline: Pipeline, groups: int, grid: LatentGrid) -> Pictures:
    rng = np.random.default_rng(0)
    height, width = (PACKED_PIXELS * side for side in grid[1:])
    channels = pipeline.model.config.joint_attention_dim
    return Pictures(
        jnp.asarray(rng.integers(0, 256, (groups, height, width, 3), np.uint8)),
        jnp.asarray(rng.normal(size=(groups, 5, channels)), jnp.float32),
        jnp.full(groups, 4),
        jax.vmap(jax.random.key)(jnp.arange(groups)),
    )


def check_epoch(epoch: Callable[[epath.Path], GrpoConfig]) -> Numbers:
    """A short run by the main job itself: rollout, judge, updates, evaluation, adapter, report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        write_designs(folder / "pictures", "B", range(48), 64, 3)
        run(epoch(folder))
        return _of_run(folder / "run")


def _of_run(workdir: epath.Path) -> Numbers:
    records = list(read_metrics(workdir))
    numbers = {
        "reward": records[-1]["judge/reward_mean"],
        "gradient_norm": records[-1]["learner/gradient_norm/all"],
        "seconds": records[-1]["seconds/all"],
        "micro_batch": records[-1]["learner/micro_batch"],
    }
    wrong = [name for name, value in numbers.items() if value is None or not np.isfinite(value)]
    wrong += [name for name in ("report.html", "adapter") if not (workdir / name).exists()]
    if wrong:
        raise SelfTestError(f"not finite, or missing: {', '.join(wrong)}", {})
    return numbers


def check_speed() -> Numbers:
    """TFLOP/s of a matrix product and of two blocks of the 20 B model, on one device.

    `product_slowest` is that of the host's slowest device.
    On accelerators with the shapes of 640 pixels and four layers in bfloat16, one sample; on CPUs
    with small ones. `…_share` is of the device's peak; operations are those of `models.flops`.
    """
    device = jax.devices()[0]
    small = device.platform == "cpu"
    dtype, side = (jnp.float32, 1024) if small else (jnp.bfloat16, 8192)
    config = MMDiTConfig(2, 128, 4 if small else 24, 64 if small else 3584)
    grid, words = (LatentGrid(1, 8, 8), 16) if small else (LatentGrid(4, 40, 40), 512)
    products = [_product_rate(side, dtype, device) for device in jax.local_devices()]
    numbers = {"product": products[0], "product_slowest": min(products)}
    numbers |= _block_rates(config, grid, words, dtype, device)
    if peak := peak_flops([device]):
        shares = {f"{name}_share": rate * 1e12 / peak for name, rate in numbers.items()}
        # Faster than the peak means that something was not computed.
        numbers |= _below(shares, _MOST_OF_PEAK)
    return numbers | memory_use([device])


def _product_rate(side: int, dtype: Any, device: Any) -> float:
    # Not of ones: what switches fewer transistors runs at a higher clock.
    matrix = jax.device_put(jax.random.normal(jax.random.key(0), (side, side), dtype), device)
    seconds = _median_seconds(jax.jit(jnp.matmul), matrix, matrix)
    return 2 * side**3 / seconds / 1e12


def _block_rates(
    config: MMDiTConfig, grid: LatentGrid, words: int, dtype: Any, device: Any
) -> Numbers:
    chosen, _ = choose_implementation("auto", device.platform, dtype, config.attention_head_dim)
    model = MMDiT(config, Attention(chosen), "block", dtype=dtype, param_dtype=dtype)
    inputs = jax.device_put(
        (
            *(
                jax.random.normal(jax.random.key(number), (1, tokens, channels), dtype)
                for number, (tokens, channels) in enumerate(
                    (
                        (grid.generated_tokens, config.in_channels),
                        (grid.frame_tokens, config.in_channels),
                        (words, config.joint_attention_dim),
                    )
                )
            ),
            jnp.full(1, 0.5, jnp.float32),
        ),
        device,
    )
    start = partial(model.init, grid=grid, method="initialise")
    params = nn.unbox(jax.jit(start)(jax.random.key(0), *inputs)["params"])
    adapter = init_adapter(jax.random.key(1), params, LoRAConfig(64, 128.0, DEFAULT_TARGETS))

    def forward(lora: Any, params: Any, *inputs: Any) -> Any:
        variables = {"params": params, **adapter.replace(lora=lora).variables()}
        return model.apply(variables, *inputs, grid=grid, method="initialise")

    def loss(lora: Any, params: Any, *inputs: Any) -> Any:
        return jnp.square(forward(lora, params, *inputs).astype(jnp.float32)).mean()

    once, back = (count(config, grid, words) / 1e12 for count in (velocity_flops, gradient_flops))
    given = (adapter.lora, params, *inputs)
    return {
        "forward": once / _median_seconds(jax.jit(forward), *given),
        "training": (once + back) / _median_seconds(jax.jit(jax.grad(loss)), *given),
    }


def _median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    result = function(*arguments)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result)):
        raise SelfTestError("a result is not finite", {})
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _below(numbers: Numbers, limits: float | Numbers) -> Numbers:
    """The numbers, if none is above its limit.

    Raises:
        SelfTestError: one is, or is not a number.
    """
    if not isinstance(limits, dict):
        limits = dict.fromkeys(numbers, limits)
    wrong = [f"{n} is above {limits[n]:g}" for n, v in numbers.items() if not v <= limits[n]]
    if wrong:
        raise SelfTestError("; ".join(wrong), numbers)
    return numbers


def _without_nan(numbers: Numbers) -> dict[str, float | None]:
    """Numbers for JSON."""
    return {name: value if np.isfinite(value) else None for name, value in numbers.items()}


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative, by the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _dtypes() -> Sequence[str]:
    return ("float32", "bfloat16")


def _multiple(least: int) -> int:
    """The least multiple of the number of devices from `least` on."""
    count = len(jax.devices())
    return count * -(-least // count)


def _platform() -> str:
    return jax.devices()[0].platform
