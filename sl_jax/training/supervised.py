"""Supervised stages: the autoencoder (`vae`) and the flow (`flow`) on pictures with true layers."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm

from sl_jax.checkpoints.orbax import RunCheckpoints, donated
from sl_jax.flow.schedule import SigmaDistribution, draw_sigmas
from sl_jax.models.mmdit import MMDiT
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae
from sl_jax.parallel.mesh import replicated
from sl_jax.parallel.processes import ALONE, Processes
from sl_jax.training.configuration import AT_LEAST_ONE, DECAY
from sl_jax.training.health import NotFiniteError, StageHealthConfig, where_finite
from sl_jax.training.metrics import LogConfig, RunMetrics, open_metrics
from sl_jax.training.optimizer import OptimizerConfig, make_optimizer

_log = logging.getLogger(__name__)
_IN_A_ROW = "not_finite_in_a_row"

# (trained parameters, frozen ones, batch, key) → (loss, measures)
Loss = Callable[[Any, Any, Any, PRNGKeyArray], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One supervised stage.

    Attributes:
        steps: updates.
        optimizer: see `OptimizerConfig`; decays over all steps unless it says otherwise.
        ema: decay of the exponential moving average of the trained parameters, which is the
            result. It warms up as min(ema, (1 + step) / (10 + step)).
        log_every, eval_every, checkpoint_every: updates between them.
        health: see `StageHealthConfig`.
    """

    steps: int
    optimizer: OptimizerConfig
    ema: float = 0.999
    log_every: int = 50
    eval_every: int = 500
    checkpoint_every: int = 500
    health: StageHealthConfig = field(default_factory=StageHealthConfig)


# What of a stage may change while it runs, and what its values must be.
WATCHED = ("log_every", "eval_every", "checkpoint_every", "health.not_finite")
STAGE_RULES = dict.fromkeys(("steps", *WATCHED), AT_LEAST_ONE) | {"ema": DECAY}


def warmup_problems(config: StageConfig, path: str = "config") -> Iterator[str]:
    """A problem if the stage, or the decay of its learning rate, ends before that has warmed up."""
    warmup, decay = config.optimizer.warmup_steps, config.optimizer.decay_steps
    if decay != 0 and decay <= warmup:
        yield f"{path}.optimizer.decay_steps is {decay}; please use 0, or more than warmup_steps"
    if warmup >= config.steps > 0:
        yield (
            f"{path}.optimizer.warmup_steps is {warmup}; please use less than {path}.steps, "
            f"which is {config.steps}"
        )


@struct.dataclass
class StageState:
    """All that a stage carries from update to update.

    Attributes:
        step: updates done, with those that were not finite and left the following as it was.
        trained: parameters.
        ema: their average.
        optimizer: of optax.
        skipped: updates that were not finite.
        in_a_row: those of them since the last finite one.
    """

    step: Array
    trained: Any
    ema: Any
    optimizer: optax.OptState
    skipped: Array
    in_a_row: Array


class Frames(NamedTuple):
    """Pixels for the autoencoder: straight RGBA in [-1, 1], [B, H, W, 4]."""

    pixels: Float[Array, "b h w 4"]


class FlowBatch(NamedTuple):
    """Packed, normalised latents for the flow, and what conditions it.

    Attributes:
        target: [B, (layers + 1)·N, C]: the whole picture, then its layers back to front.
        picture: [B, N, C]: the picture.
        text: [B, S, E]: hidden states of each prompt; None where one serves all batches.
        lengths: [B]: valid vectors of each; None where all are.
        fresh: only the first so many examples count; None for all.
    """

    target: Float[Array, "b n c"]
    picture: Float[Array, "b m c"]
    text: Float[Array, "b s e"] | None = None
    lengths: Int[Array, " b"] | None = None
    fresh: int | None = None


# (trained parameters, frozen ones, x_t, t, batch) → v
Velocity = Callable[[Any, Any, Array, Array, FlowBatch], Float[Array, "b n c"]]


def reconstruction_loss(vae: Vae, kl_weight: float) -> Loss:
    """Loss of the autoencoder on RGBA frames.

    With e = w · (decoded − pixels), where w is 0.05 for the colour of pixels whose alpha is 0,
    which no one sees, and else 1:

        mean |e| + mean e² + ½ (mean |∂e/∂y| + mean |∂e/∂x|) + kl_weight · KL,
        KL = ½ mean (μ² + σ² − 1 − log σ²)

    ∂ are differences of neighbouring pixels, (μ, σ) is the posterior. Means are over the batch,
    places and channels.
    """

    def loss(
        params: Any, frozen: None, batch: Frames, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        pixels = batch.pixels
        posterior = vae.apply({"params": params}, pixels, method="encode")
        noise = jax.random.normal(key, posterior.mean.shape)
        sampled = posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise
        decoded = vae.apply({"params": params}, sampled, clamp=False, method="decode")
        visible = (pixels[..., 3:] > -1).astype(jnp.float32)
        weight = jnp.concatenate([jnp.repeat(0.05 + 0.95 * visible, 3, -1), visible**0], -1)
        error = weight * (decoded - pixels)
        absolute = jnp.mean(jnp.abs(error))
        edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(
            jnp.abs(jnp.diff(error, axis=2))
        )
        kl = 0.5 * jnp.mean(
            jnp.square(posterior.mean) + jnp.exp(posterior.logvar) - 1 - posterior.logvar
        )
        total = absolute + jnp.mean(jnp.square(error)) + 0.5 * edges + kl_weight * kl
        return total, {"l1": absolute, "mse": jnp.mean(jnp.square(error)), "kl": kl}

    return loss


def flow_loss(velocity: Velocity, mu: float, distribution: SigmaDistribution) -> Loss:
    """Flow matching: mean ‖v_θ(x_t, t) − (ε − x₀)‖² at random t (arXiv 2210.02747).

    Args:
        velocity: of the model, which is told of the batch all but its target.
        mu: shift of the draw of t, see `flow.schedule.draw_sigmas`.
        distribution: "uniform" or "logit_normal".
    """

    def loss(
        trained: Any, frozen: Any, batch: FlowBatch, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        time_key, noise_key = jax.random.split(key)
        t = draw_sigmas(time_key, (len(batch.target),), mu, distribution=distribution)
        noise = jax.random.normal(noise_key, batch.target.shape)
        x = (1 - t[:, None, None]) * batch.target + t[:, None, None] * noise
        error = velocity(trained, frozen, x, t, batch) - (noise - batch.target)
        counts = None
        if batch.fresh is not None:
            counts = (jnp.arange(len(error)) < batch.fresh)[:, None, None]
        mse = jnp.mean(jnp.square(error), where=counts)
        return mse, {"mse": mse}

    return loss


def full_velocity(model: MMDiT, text: Float[Array, "s e"], grid: LatentGrid) -> Velocity:
    """All parameters are trained, with one text for all batches."""

    def velocity(params: Any, frozen: None, x: Array, t: Array, batch: FlowBatch) -> Array:
        words = jnp.broadcast_to(text, (len(x), *text.shape))
        return model.apply(
            {"params": params}, x, batch.picture, words, t, grid, method="initialise"
        ).astype(jnp.float32)

    return velocity


class Stage:
    """Trains one pytree by one loss, resumable at any checkpoint.

    Batch and randomness of update n depend on n alone, so a stage that is stopped and started again
    ends with the same parameters.
    """

    def __init__(
        self,
        config: StageConfig,
        losses: Mapping[Any, Loss],
        checkpoints: RunCheckpoints,
        writer: RunMetrics,
        seed: int,
        *,
        frozen: Any = None,
        mesh: Mesh | None = None,
        processes: Processes = ALONE,
    ):
        """`losses` holds one loss per kind of batch (for the flow: per number of layers).

        What is `frozen` is an argument of the compiled updates, and not part of the state.
        With a mesh, what is trained stays laid out over it as it was when the stage started.
        """
        self._config = config
        self._processes = processes
        self._checkpoints = checkpoints
        self._writer = writer
        self._key = jax.random.key(seed)
        self._frozen = frozen
        self._mesh = mesh
        decay_steps = config.optimizer.decay_steps or config.steps
        self._optimizer = make_optimizer(replace(config.optimizer, decay_steps=decay_steps))
        self._losses = losses
        self._told: dict[str, list[Any]] = {}  # by each update since the last record
        self._evaluations = {kind: jax.jit(fn) for kind, fn in losses.items()}

    def start(self, trained: Any) -> StageState:
        """The state to begin with, or the newest checkpoint of the work directory.

        `trained` is given up: the first update, or what is restored, takes its room.
        """
        state = StageState(
            jnp.zeros((), jnp.int32),
            trained,
            jax.tree.map(jnp.copy, trained),
            self._optimizer.init(trained),
            *(jnp.zeros((), jnp.int32) for _ in range(2)),
        )
        state = state if self._mesh is None else _on_mesh(state, self._mesh)
        if self._checkpoints.latest is None:
            return state
        step, state, self._told = self._checkpoints.restore(donated(state))
        _log.info("Going on at update %d of %d.", step, self._config.steps)
        return state

    def run(
        self,
        state: StageState,
        batches: Callable[[int], tuple[Any, Any]],
        held_out: Sequence[tuple[Any, Any]],
        name: str,
    ) -> StageState:
        """Trains to the end; interrupted, it finishes the update and saves a checkpoint.

        Args:
            state: from `start`.
            batches: update number → (kind, batch).
            held_out: (kind, batch) pairs for the validation loss.
            name: of the stage, in progress bar and metrics.

        Raises:
            NotFiniteError: too many updates in a row were not finite; the last one is checkpointed.
        """
        config, processes = self._config, self._processes
        first = done = int(state.step)
        updates = self._compiled(state)
        in_a_row = None
        progress = tqdm(
            *(range(first, config.steps), name),
            initial=first,
            total=config.steps,
            disable=not processes.is_main,
        )
        try:
            for step in progress:
                kind, batch = batches(step)
                processes.barrier("starting an update")
                with (
                    processes.uninterrupted()
                ):  # an update, its records and its checkpoint belong together
                    key = jax.random.fold_in(self._key, step)
                    state, metrics = updates[kind](state, self._frozen, batch, key)
                    done = step + 1
                    # Known at once of the update before, while this one is computed.
                    before, in_a_row = in_a_row, metrics.pop(_IN_A_ROW)
                    for metric, value in metrics.items():
                        self._told.setdefault(metric, []).append(value)
                    if self._due(done, config.log_every):
                        means = {k: _mean(values) for k, values in self._record().items()}
                        told = means | {"skipped_updates": int(state.skipped)}
                        self._writer.scalars(done, {f"{name}/{k}": v for k, v in told.items()})
                        progress.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
                        self._told = {}
                    if self._due(done, config.eval_every):
                        self._writer.scalars(done, self._evaluate(state, held_out, name))
                    if self._due(done, config.checkpoint_every):
                        self._checkpoints.save(done, state, self._record())
                self._require_finite(before, step)
            self._require_finite(in_a_row, done)
        except BaseException as error:
            with processes.uninterrupted():
                if processes.leave(error, done) and _is_whole(state):
                    if done > (self._checkpoints.latest or 0):
                        self._checkpoints.save(done, state, self._record())
                    self._checkpoints.wait()
            raise
        self._checkpoints.wait()
        return state

    def _require_finite(self, in_a_row: Array | None, done: int) -> None:
        """Says so of the first of updates in a row that are not finite, and ends too many.

        Started again, a stage goes on counting: the next update decides.
        """
        count = 0 if in_a_row is None else int(in_a_row)
        if count == 1:
            _log.warning("Update %d is not finite and is skipped: nothing is learned of it.", done)
        if count >= self._config.health.not_finite:
            raise NotFiniteError(
                f"{count} updates in a row were not finite and were skipped. The run stops with a "
                "checkpoint. Please start another one with a lower optimizer.learning_rate, from "
                "what an earlier checkpoint holds; started again as it is, this one goes on"
            )

    def _record(self) -> dict[str, list[float]]:
        return {name: [float(value) for value in values] for name, values in self._told.items()}

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self._config.steps

    def _compiled(self, state: StageState) -> dict[Any, Callable[..., Any]]:
        placed = {}
        if self._mesh is not None:
            layout = jax.tree.map(lambda leaf: leaf.sharding, state)
            placed = {"out_shardings": (layout, replicated(self._mesh))}
        return {
            kind: jax.jit(self._update(fn), donate_argnums=0, **placed)
            for kind, fn in self._losses.items()
        }

    def _evaluate(self, state: StageState, batches: Sequence[Any], name: str) -> dict[str, float]:
        """Means over all examples of the batches."""
        results: dict[str, list[float]] = {}
        sizes = [_examples(batch) for _, batch in batches]
        for number, (kind, batch) in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(0), number)
            _, metrics = self._evaluations[kind](state.ema, self._frozen, batch, key)
            for metric, value in metrics.items():
                results.setdefault(f"{name}/held_out_{metric}", []).append(float(value))
        return {k: float(np.average(values, weights=sizes)) for k, values in results.items()}

    def _update(self, loss: Loss) -> Callable[..., tuple[StageState, Any]]:
        def update(
            state: StageState, frozen: Any, batch: Any, key: PRNGKeyArray
        ) -> tuple[StageState, Any]:
            gradients, metrics = jax.grad(loss, has_aux=True)(state.trained, frozen, batch, key)
            updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            step = state.step.astype(jnp.float32)
            decay = jnp.minimum(self._config.ema, (1 + step) / (10 + step))
            ema = optax.incremental_update(trained, state.ema, 1 - decay)
            norm = optax.tree.norm(gradients)
            changed, before = (trained, ema, optimizer), (state.trained, state.ema, state.optimizer)
            out = (~jnp.isfinite(norm)).astype(jnp.int32)
            in_a_row = (state.in_a_row + 1) * out
            metrics |= {"gradient_norm": norm, _IN_A_ROW: in_a_row}
            kept = where_finite(norm, changed, before)
            return StageState(state.step + 1, *kept, state.skipped + out, in_a_row), metrics

        return update


@contextmanager
def open_stage(
    config: StageConfig,
    losses: Mapping[Any, Loss],
    folder: epath.PathLike,
    seed: int,
    log: LogConfig,
    *,
    frozen: Any = None,
    mesh: Mesh | None = None,
    processes: Processes = ALONE,
    kept_as: Callable[[RunCheckpoints], Any] = lambda checkpoints: checkpoints,
) -> Iterator[Stage]:
    """A stage with its checkpoints and metrics in `folder`; what that holds is gone on from.

    Args:
        config, losses, seed, frozen, mesh, processes: see `Stage`.
        folder: local, or gs://….
        log: where else metrics go.
        kept_as: gives checkpoints another form on disk.
    """
    kept = RunCheckpoints(epath.Path(folder) / "checkpoints", 2, processes)
    with closing(kept) as checkpoints:
        resume = 0 if checkpoints.latest is None else checkpoints.latest + 1
        with open_metrics(folder, resume, log, processes) as writer:
            chosen = kept_as(checkpoints)
            yield Stage(
                *(config, losses, chosen, writer, seed),
                frozen=frozen,
                mesh=mesh,
                processes=processes,
            )


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; nan if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _examples(batch: Any) -> int:
    """How many examples of a batch count."""
    fresh = batch.fresh if isinstance(batch, FlowBatch) else None
    return len(jax.tree.leaves(batch)[0]) if fresh is None else fresh


def _is_whole(state: StageState) -> bool:
    """Whether it can be saved: an update that failed has taken its state along."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _on_mesh(state: StageState, mesh: Mesh) -> StageState:
    """Counters on all devices; the rest is laid out like what is trained already."""

    def placed(leaf: Array) -> Array:
        spread = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if spread else jax.device_put(leaf, replicated(mesh))

    return jax.tree.map(placed, state)


def fresh_params(
    module: nn.Module, key: PRNGKeyArray, *args: Any, method: str | None = None
) -> Any:
    """Random parameters of a module, without partitioning metadata."""
    init = jax.jit(lambda k: nn.unbox(module.init(k, *args, method=method))["params"])
    return init(key)
