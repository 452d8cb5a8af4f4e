"""The update of the adapter, from the stored steps of a rollout.

Forward and backward are compiled apart; the vjp travels between them as a pytree. Velocities of the
old and of the current adapter therefore come from one executable, and where the two adapters are
equal, so are the velocities, to the last bit, in any dtype and on any mesh.

Gradients, moments and averages are laid out over devices like the adapter's weights, and stay so.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sl_jax.checkpoints.pipeline import Pipeline
from sl_jax.flow.dynamics import StepCoefficients, step_coefficients
from sl_jax.grpo.config import LearnerConfig, RolloutConfig
from sl_jax.grpo.objective import (
    Mismatch,
    ObjectiveConfig,
    ObjectiveMetrics,
    policy_objective,
    rollout_mismatch,
)
from sl_jax.grpo.phases import Work
from sl_jax.grpo.rollout import Candidates
from sl_jax.inference.sampling import Condition, Guidance, modulation_rows, velocity_function
from sl_jax.models.flops import gradient_flops, sequence_tokens, velocity_flops
from sl_jax.models.lora import Adapter
from sl_jax.models.modulation import ModulationTable
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, batch_sharding, batch_shards, replicated
from sl_jax.parallel.processes import from_everywhere
from sl_jax.training.health import where_finite
from sl_jax.training.optimizer import OptimizerConfig, make_optimizer


class Scored(NamedTuple):
    """A rollout batch with what its samples are worth.

    Attributes:
        candidates: the rollout.
        table: its σ grid and modulation.
        advantage: per sample of the whole batch, in every process.
        weight: likewise, normalised over the whole update.
        grid: static shape.
    """

    candidates: Candidates
    table: ModulationTable
    advantage: Float[np.ndarray, " b"]
    weight: Float[np.ndarray, " b"]
    grid: LatentGrid


class Step(NamedTuple):
    """One window step of a micro-batch."""

    x: Float[Array, "m n c"]
    x_next: Float[Array, "m n c"]
    mean: Float[Array, "m n c"]
    index: Int[Array, ""]
    condition: Condition
    advantage: Float[Array, " m"]
    weight: Float[Array, " m"]


class StepReport(NamedTuple):
    """What one (micro-batch, window step) did.

    Attributes:
        index: position of the step in the σ grid.
        objective, mismatch: per sample.
        weight: per sample, as used in the loss.

    All of it is known to every process.
    """

    index: Array
    objective: ObjectiveMetrics
    mismatch: Mismatch
    weight: Array


class UpdateReport(NamedTuple):
    """What one update did; nothing where there was nothing to learn from.

    Attributes:
        steps: of every micro-batch of every window step.
        gradient_norms: position in the σ grid, and norm of the gradient, of each window step.
        gradient_norm: of the whole gradient, before it is clipped; None where none was applied.
        stopped: whether the policy was so far away that nothing was applied.
    """

    steps: list[StepReport]
    gradient_norms: list[tuple[Array, Array]]
    gradient_norm: Array | None
    stopped: bool = False


class _Changing(NamedTuple):
    """What one update replaces; the rest of `LearnerState` is constant."""

    lora: Any
    ema: Any
    optimizer: optax.OptState
    updates: Array
    skipped: Array


@struct.dataclass
class LearnerState:
    """What training changes: one pytree, checkpointed whole.

    Attributes:
        adapter: current policy.
        ema: average of the adapter's weights, which is evaluated and exported.
        initial: the adapter that training started from.
        optimizer: of optax.
        updates: applied updates.
        skipped: updates that were not finite and left everything as it was.
    """

    adapter: Adapter
    ema: Adapter
    initial: Adapter
    optimizer: optax.OptState
    updates: Array
    skipped: Array


@struct.dataclass
class StaleState(LearnerState):
    """That of a run with `max_staleness`.

    Attributes:
        sampler: the adapter that samples the next epoch's candidates, or has sampled them.
    """

    sampler: Adapter


@struct.dataclass
class Residuals:
    """What of a vjp its forward program has made: of weights that it keeps there are no copies.

    A program returns copies of the inputs that are among its results. The vjp of a scan keeps the
    weights of all blocks, and with them the base would be in memory twice.

    Attributes:
        made: the leaves that are not inputs.
        inputs: for each leaf of the vjp its place among the inputs, or None.
        structure: of the vjp.
    """

    made: list[Array]
    inputs: tuple[int | None, ...] = struct.field(pytree_node=False)
    structure: Any = struct.field(pytree_node=False)

    @classmethod
    def of(cls, vjp: Any, inputs: Any) -> "Residuals":
        """Takes apart a vjp, inside the program that makes it."""
        places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(inputs))}
        leaves, structure = jax.tree.flatten(vjp)
        found = tuple(places.get(id(leaf)) for leaf in leaves)
        made = [leaf for leaf, place in zip(leaves, found, strict=True) if place is None]
        return cls(made, found, structure)

    def with_inputs(self, inputs: Any) -> Any:
        """The vjp, of the inputs that the program was called with."""
        made, given = iter(self.made), jax.tree.leaves(inputs)
        leaves = [next(made) if place is None else given[place] for place in self.inputs]
        return jax.tree.unflatten(self.structure, leaves)


def _changing(state: LearnerState) -> _Changing:
    return _Changing(
        state.adapter.lora, state.ema.lora, state.optimizer, state.updates, state.skipped
    )


class Learner:
    """Updates the adapter by the clipped objective of `grpo.objective`.

    Attributes:
        abstract: shapes and shardings of the state.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        adapter: Adapter,
        rollout: RolloutConfig,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        config: LearnerConfig,
        layout: Layout,
        guidance: Guidance | None = None,
    ):
        """Makes all programs, of which each is compiled where it is first called.

        Args:
            adapter: like those that will be trained, or their shapes with shardings.
        """
        self._pipeline = pipeline
        self._guidance = guidance
        self._rollout = rollout
        self._objective = objective
        self._config = config
        self._layout = layout
        self._optimizer = make_optimizer(optimizer)
        self._forward = jax.jit(self._velocity, static_argnames="grid")
        self._select = jax.jit(self._micro_batch, static_argnames="size")
        self.abstract = self._abstract(adapter)
        # What is replaced is laid out like what replaces it.
        placed = jax.tree.map(lambda leaf: leaf.sharding, _changing(self.abstract))
        known = replicated(layout.mesh)
        summed, updated = (placed.lora, known), (placed, known)
        self._backward = jax.jit(self._gradient, donate_argnums=0, out_shardings=summed)
        self._add = jax.jit(_added, donate_argnums=0, out_shardings=summed)
        self._zeros = jax.jit(_zeros, out_shardings=placed.lora)
        self._apply = jax.jit(self._update, out_shardings=updated)
        self._apply_donating = jax.jit(self._update, donate_argnums=0, out_shardings=updated)

    def start(self, adapter: Adapter) -> LearnerState:
        """The state before training; it holds copies of `adapter`."""
        copy = partial(jax.tree.map, jnp.copy)
        mesh = self._layout.mesh
        optimizer = optax.tree.map_params(
            self._optimizer,
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            self._optimizer.init(adapter.lora),
            adapter.lora,
            transform_non_params=lambda leaf: jax.device_put(leaf, replicated(mesh)),
        )
        counters = (jax.device_put(jnp.int32(0), replicated(mesh)) for _ in range(2))
        return self._state(*(copy(adapter) for _ in range(3)), optimizer, *counters)

    def _abstract(self, like: Adapter) -> LearnerState:
        """Shapes and shardings of the state."""
        whole = replicated(self._layout.mesh)

        def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        adapter = jax.tree.map(lambda leaf: placed(leaf, leaf.sharding), like)
        optimizer = optax.tree.map_params(
            self._optimizer,
            lambda _, like: like,
            jax.eval_shape(self._optimizer.init, adapter.lora),
            adapter.lora,
            transform_non_params=lambda leaf: placed(leaf, whole),
        )
        counters = (placed(jax.ShapeDtypeStruct((), jnp.int32), whole) for _ in range(2))
        return self._state(adapter, adapter, adapter, optimizer, *counters)

    def update(
        self,
        state: LearnerState,
        batches: Sequence[Scored],
        old: Adapter | None = None,
        kl_left: float = 1.0,
        *,
        donate: bool = False,
        too_far: Callable[[Sequence[StepReport]], bool] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> tuple[LearnerState, UpdateReport]:
        """One optimizer step over all samples and window steps of `batches`.

        Where no sample has a weight there is nothing to learn, and nothing changes.

        Args:
            state: to go on from.
            batches: rollout batches of one epoch, whose weights sum to 1 together.
            old: the adapter that rolled them out; None for the state's own.
            kl_left: the share of the KL term's weight that holds now.
            donate: whether nobody needs `state` after an update that is applied.
            too_far: told of all steps before the gradient is applied, says whether it is not to
                be; the same in all processes.
            between: called after each micro-batch of a window step, while devices have one to do
                and one more waiting; what it raises ends the update, and `state` holds.
        """
        if not any(np.any(batch.weight) for batch in batches):
            return state, UpdateReport([], [], None)
        reference = self._reference(state) if self._objective.kl_weight else None
        total, norms, reports = self._zeros(state.adapter), [], []
        for number in range(self._rollout.window_size):
            part = self._zeros(state.adapter)
            for batch in batches:
                for step in self._steps(batch, number):
                    part, report = self._accumulate(
                        state.adapter, batch, step, (old, reference), part, kl_left
                    )
                    jax.block_until_ready(reports[-1:])
                    between()
                    reports.append(report)
            total, norm = self._add(total, part)
            norms.append((reports[-1].index, norm))
        if too_far is not None and too_far(reports):
            return state, UpdateReport(reports, norms, None, stopped=True)
        apply = self._apply_donating if donate else self._apply
        changed, norm = apply(_changing(state), total)
        return state.replace(
            adapter=state.adapter.replace(lora=changed.lora),
            ema=state.ema.replace(lora=changed.ema),
            optimizer=changed.optimizer,
            updates=changed.updates,
            skipped=changed.skipped,
        ), UpdateReport(reports, norms, norm)

    def work(self, batches: Sequence[Scored], old: Adapter | None = None) -> Work:
        """What an update on these asks of the transformer.

        Velocities and their gradient, and velocities of the old adapter and of the reference; what
        is computed twice to save memory does not count, see `models.flops`. Tokens are those of the
        trained velocities alone.
        """
        flops = tokens = 0.0
        if not any(np.any(batch.weight) for batch in batches):
            return Work(flops)
        config, prompts = self._pipeline.model.config, 1 if self._guidance is None else 2
        velocities = 1 + (old is not None) + bool(self._objective.kl_weight)
        for batch in batches:
            trained = self._rollout.window_size * len(batch.advantage)
            sizes = (batch.grid, batch.candidates.condition.text.shape[1])
            once = velocities * velocity_flops(config, *sizes) + gradient_flops(config, *sizes)
            flops += prompts * trained * once
            tokens += trained * sequence_tokens(*sizes)
        return Work(flops, tokens)

    def velocity(
        self, adapter: Adapter, step: Step, table: ModulationTable, grid: LatentGrid
    ) -> tuple[Float[Array, "m n c"], Any]:
        """Velocity of one micro-batch, and its vjp with respect to the adapter's weights."""
        weights = (adapter.lora, adapter.lora_scale, self._pipeline.params)
        sample = (step.x, step.index, step.condition)
        velocity, residuals = self._forward(*weights, *sample, table, self._guidance, grid=grid)
        return velocity, residuals.with_inputs(weights)

    def trace_forward(
        self, adapter: Adapter, step: Step, table: ModulationTable, grid: LatentGrid
    ) -> jax.stages.Traced:
        """The program of `velocity`; for this and the next two, arguments may be shapes."""
        weights = (adapter.lora, adapter.lora_scale, self._pipeline.params)
        sample = (step.x, step.index, step.condition)
        return self._forward.trace(*weights, *sample, table, self._guidance, grid=grid)

    def trace_backward(
        self,
        adapter: Adapter,
        forward: tuple[jax.ShapeDtypeStruct, Residuals],
        step: Step,
        sigmas: Float[Array, " steps_1"],
        grid: LatentGrid,
    ) -> jax.stages.Traced:
        """The program that adds a micro-batch's gradient, after what `trace_forward` returns."""
        velocity, residuals = forward
        vjp = residuals.with_inputs((adapter.lora, adapter.lora_scale, self._pipeline.params))
        reference = velocity if self._objective.kl_weight else None
        known = (velocity, velocity, reference, step, sigmas, np.float32(1), self._trained(grid))
        return self._backward.trace(adapter.lora, vjp, *known)

    def trace_apply(self, state: LearnerState) -> jax.stages.Traced:
        """The program of the optimizer, as it is where nothing may be overwritten."""
        return self._apply.trace(_changing(state), state.adapter.lora)

    def _state(self, adapter: Adapter, *rest: Any) -> LearnerState:
        """Of a run that begins, whose adapter samples as well."""
        if self._rollout.max_staleness:
            return StaleState(adapter, *rest, adapter)
        return LearnerState(adapter, *rest)

    def _accumulate(
        self,
        adapter: Adapter,
        batch: Scored,
        step: Step,
        others: tuple[Adapter | None, Adapter | None],
        gradient: Any,
        kl_left: float,
    ) -> tuple[Any, StepReport]:
        """Adds the gradient of one micro-batch; `others` are the old and the reference adapter."""
        # Of the others' vjps nothing is kept: their residuals are as large as the trained one's.
        old, reference = (
            self.velocity(other, step, batch.table, batch.grid)[0] if other else None
            for other in others
        )
        velocity, vjp = self.velocity(adapter, step, batch.table, batch.grid)
        return self._backward(
            gradient,
            vjp,
            velocity,
            velocity if old is None else old,
            reference,
            step,
            batch.table.sigmas,
            np.float32(kl_left),
            self._trained(batch.grid),
        )

    def _trained(self, grid: LatentGrid) -> Bool[np.ndarray, " n"] | None:
        """Tokens that a sample's likelihood is of; None for all."""
        if self._rollout.train_frames == "all":
            return None
        return np.arange(grid.generated_tokens) >= grid.frame_tokens

    def _reference(self, state: LearnerState) -> Adapter:
        if self._config.reference == "init":
            return state.initial
        # b = 0 adds exactly nothing, in the same executable.
        return state.adapter.replace(lora=jax.tree.map(jnp.zeros_like, state.adapter.lora))

    def _steps(self, batch: Scored, number: int) -> Iterator[Step]:
        """Every micro-batch of one window step, cut out when its turn comes."""
        size = self._config.micro_batch
        samples = len(batch.advantage)
        window = batch.candidates.window
        steps = len(window.index)
        rows = batch_sharding(self._layout.mesh)
        advantage, weight = (
            from_everywhere(np.asarray(values, np.float32), rows)
            for values in (batch.advantage, batch.weight / steps)
        )
        per_sample = (batch.candidates.condition, advantage, weight, batch.candidates.finite)
        for part in range(samples // size):
            yield self._select(window, per_sample, jnp.int32(number), jnp.int32(part), size=size)

    def _micro_batch(
        self, window: Any, per_sample: Any, number: Array, part: Array, *, size: int
    ) -> Step:
        """Samples `part` of window step `number`, taken evenly from every shard of the batch.

        Zeros stand for those that are not finite: they have no weight, but 0 · nan is nan.
        """
        shards = batch_shards(self._layout.mesh)

        def chosen(x: Array) -> Array:
            parts = x.reshape(shards, -1, size // shards, *x.shape[1:])
            return self._layout(
                parts[:, part].reshape(size, *x.shape[1:]), ("batch", *(None,) * (x.ndim - 1))
            )

        condition, advantage, weight, finite = jax.tree.map(chosen, per_sample)
        states = (chosen(field[number]) for field in (window.x, window.x_next, window.mean))
        x, x_next, mean, picture, text = (
            jnp.where(finite[:, None, None], values, 0)
            for values in (*states, condition.picture, condition.text)
        )
        condition = condition._replace(picture=picture, text=text)
        return Step(x, x_next, mean, window.index[number], condition, advantage, weight)

    def _velocity(
        self,
        lora: Any,
        lora_scale: Any,
        params: Any,
        x: Array,
        index: Array,
        condition: Condition,
        table: ModulationTable,
        guidance: Guidance | None,
        *,
        grid: LatentGrid,
    ) -> tuple[Array, Residuals]:
        model = self._pipeline.model

        def forward(trained: Any) -> Array:
            variables = Adapter(trained, lora_scale).variables()
            rows = modulation_rows(model, params, variables, table.only(index))
            told = (condition, rows, grid, guidance)
            return velocity_function(model, params, variables, *told)(x, jnp.int32(0))

        velocity, vjp = jax.vjp(forward, lora)
        return velocity, Residuals.of(vjp, (lora, lora_scale, params))

    def _gradient(
        self,
        gradient: Any,
        vjp: Any,
        velocity: Array,
        velocity_old: Array,
        velocity_reference: Array | None,
        step: Step,
        sigmas: Array,
        kl_left: Array,
        trained: Array | None,
    ) -> tuple[Any, StepReport]:
        coefficients = self._coefficients(sigmas, step.index)

        def loss(v: Array) -> tuple[Array, ObjectiveMetrics]:
            return policy_objective(
                v,
                velocity_old=velocity_old,
                x=step.x,
                x_next=step.x_next,
                coefficients=coefficients,
                advantage=step.advantage,
                weight=step.weight,
                config=self._objective,
                velocity_reference=velocity_reference,
                kl_left=kl_left,
                truncate=self._rollout.max_staleness > 0,
                token_mask=trained,
            )

        cotangent, metrics = jax.grad(loss, has_aux=True)(velocity)
        (here,) = vjp(cotangent)
        mismatch = rollout_mismatch(
            self._objective.ratio,
            step.mean,
            velocity_old=velocity_old,
            x=step.x,
            x_next=step.x_next,
            coefficients=coefficients,
            token_mask=trained,
        )
        report = StepReport(step.index, metrics, mismatch, step.weight)
        return jax.tree.map(jnp.add, gradient, here), report

    def _coefficients(self, sigmas: Array, index: Array) -> StepCoefficients:
        rollout = self._rollout
        return step_coefficients(
            rollout.dynamics, sigmas[index], sigmas[index + 1], sigmas[1], rollout.noise_level
        )

    def _update(self, now: _Changing, gradient: Any) -> tuple[_Changing, Array]:
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        updates, optimizer = self._optimizer.update(gradient, now.optimizer, now.lora)
        lora = optax.apply_updates(now.lora, updates)
        ema = optax.incremental_update(lora, now.ema, 1 - self._config.ema)
        changed = _Changing(
            lora=where_finite(norm, lora, now.lora),
            ema=where_finite(norm, ema, now.ema),
            optimizer=where_finite(norm, optimizer, now.optimizer),
            updates=now.updates + finite.astype(jnp.int32),
            skipped=now.skipped + (~finite).astype(jnp.int32),
        )
        return changed, norm


def _zeros(adapter: Adapter) -> Any:
    return jax.tree.map(jnp.zeros_like, adapter.lora)


def _added(total: Any, part: Any) -> tuple[Any, Array]:
    """The sum, and the norm of what was added."""
    return jax.tree.map(jnp.add, total, part), optax.tree.norm(part)
