"""The programs of an epoch as `planning` takes them: of shapes, for devices that need not exist."""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sl_jax.checkpoints.pipeline import Pipeline, abstract_pipeline, adapter_shardings
from sl_jax.data.buckets import make_buckets
from sl_jax.flow.sampler import WindowSteps, window_starts
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.learner import Learner, LearnerState, Step
from sl_jax.grpo.rollout import Candidates, Pictures, Rollout
from sl_jax.inference.modulation import abstract_table
from sl_jax.inference.sampling import Condition
from sl_jax.models.lora import Adapter
from sl_jax.models.modulation import ModulationTable, time_modules
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout, batch_sharding, replicated
from sl_jax.planning.phases import Phase, Workload
from sl_jax.training.adapter import first_adapter


class Programs:
    """The programs of a run for its largest bucket and number of layers, and the longest prompts.

    Args:
        config: of the run.
        folder: the checkpoint, of which only configuration files are read.
        layout: of the devices.

    Raises:
        ConfigError: the adapter does not fit the model.
        CheckpointError: `folder` describes no model that is implemented.
    """

    def __init__(self, config: GrpoConfig, folder: epath.Path, layout: Layout):
        self._config, self._layout = config, layout
        shapes = first_adapter(config, folder, layout).shapes
        self.pipeline: Pipeline = abstract_pipeline(folder, config.compute, layout, [shapes])
        self.adapter: Adapter = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            adapter_shardings(shapes, self.pipeline.params),
        )
        self.grid = largest_grid(config)
        self._rollout = Rollout(self.pipeline, config.rollout, layout)
        self._learner = Learner(
            self.pipeline,
            config.rollout,
            config.objective,
            config.optimizer,
            config.learner,
            layout,
        )
        self.state: LearnerState = self._learner.abstract(self.adapter)

    def resident(self) -> dict[str, Any]:
        """What is on the devices all the time, by name."""
        return {
            "base": self.pipeline.params,
            "autoencoder": self.pipeline.vae_params,
            "adapter": self.state.adapter,
            "average": self.state.ema.lora,
            "initial adapter": self.state.initial.lora,
            "optimizer": self.state.optimizer,
        }

    def phases(self) -> Generator[Phase, jax.stages.Compiled | None, None]:
        """The programs in the order in which an epoch runs them.

        What a program leaves to the compiler is the next one's argument: send each one's compiled
        form, or None where it could not be compiled, which ends the phases that depend on it.
        """
        config, state = self._config, self.state
        batches = config.rollout.groups // config.rollout.batch_groups
        per_batch = self._candidates()
        others = [per_batch] * (batches - 1)
        weights = (self.pipeline.params, self.pipeline.vae_params)
        learning = (state.ema.lora, state.initial.lora, state.optimizer)
        yield Phase(
            "rollout",
            self._rollout.trace(self.adapter, self._pictures(), self._table(), self.grid),
            batches,
            self._sampler_trips(),
            (learning, others),
        )
        kept = per_batch._replace(latents=None)
        yield Phase(
            "decode",
            self._rollout.trace_decode(per_batch.latents, self.grid),
            batches,
            (),
            (weights[0], self.adapter, learning, others, kept),
        )
        # Before the last update there are the state that the epoch began with and the current one.
        begun = (state.adapter.lora, state.ema.lora, state.optimizer)
        before = begun if config.learner.updates > 1 else ()
        gradients = (state.adapter.lora, state.adapter.lora)
        epoch = (before, [per_batch, *others])
        yield from self._learner_phases(epoch, learning, gradients)
        yield Phase(
            "apply",
            self._learner.trace_apply(state),
            config.learner.updates,
            (),
            (weights, state.initial.lora, state.adapter.lora_scale, before, epoch[1]),
        )

    def _learner_phases(
        self, epoch: Any, learning: Any, gradients: Any
    ) -> Generator[Phase, jax.stages.Compiled | None, None]:
        config = self._config
        samples = config.rollout.groups * config.rollout.group_size
        steps = config.rollout.window_size * samples // config.learner.micro_batch
        step, table, vae = self._step(), self._table(), self.pipeline.vae_params
        traced = self._learner.trace_forward(self.adapter, step, table, self.grid)
        velocities = self._velocities_per_step()
        rest = (step.x_next, step.mean, step.advantage, step.weight)
        held = (vae, epoch, learning, gradients, rest)
        compiled = yield Phase("learner forward", traced, steps * velocities, (), held)
        if compiled is None:
            return
        forward = _laid_out(traced, compiled)
        traced = self._learner.trace_backward(self.adapter, forward, step, table.sigmas, self.grid)
        weights = jax.tree.leaves((self.adapter.lora, self.adapter.lora_scale, self.pipeline.params))
        # The rest of the weights are among what the program takes, as parts of the vjp.
        unused = [x for place, x in enumerate(weights) if place not in forward[1].inputs]
        held = (vae, epoch, learning, gradients[:1], unused)
        yield Phase("learner backward", traced, steps, (), held)

    def _velocities_per_step(self) -> float:
        """Forward passes per micro-batch: the old adapter's after the first update, a reference."""
        config = self._config
        later = (config.learner.updates - 1) / config.learner.updates
        return 1 + later + (1 if config.objective.kl_weight else 0)

    def _sampler_trips(self) -> tuple[float, ...]:
        """Evaluations before the window, and from it on, on average over its positions."""
        rollout = self._config.rollout
        starts = window_starts(rollout.window_range, rollout.window_size)
        before = sum(starts) / len(starts)
        after = rollout.steps - before
        if rollout.ode_method == "heun":
            return 2 * before, rollout.window_size + 2 * (after - rollout.window_size) - 1
        return before, after

    def _array(self, shape: tuple[int, ...], dtype: Any, leading: int = 0) -> Any:
        sharding = batch_sharding(self._layout.mesh, leading)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _whole(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self._layout.mesh))

    def _table(self) -> ModulationTable:
        table = abstract_table(self.pipeline.model, self._config.rollout.steps, self._layout)
        return table._replace(rows=None) if time_modules(self.adapter.lora) else table

    def _pictures(self) -> Pictures:
        groups, data = self._config.rollout.batch_groups, self._config.data
        height, width = (PACKED_PIXELS * side for side in self.grid[1:])
        key = jax.eval_shape(jax.random.key, 0)
        return Pictures(
            self._array((groups, height, width, 3), jnp.uint8),
            self._text(groups, data.max_text_tokens),
            self._array((groups,), jnp.int32),
            self._array((groups,), key.dtype),
        )

    def _text(self, rows: int, tokens: int) -> Any:
        channels = self.pipeline.model.config.joint_attention_dim
        return self._array((rows, tokens, channels), jnp.dtype(self._config.compute.dtype))

    def _condition(self, rows: int) -> Condition:
        channels = self.pipeline.model.config.in_channels
        return Condition(
            self._array((rows, self.grid.frame_tokens, channels), jnp.float32),
            self._text(rows, self._config.data.max_text_tokens),
            self._array((rows,), jnp.int32),
        )

    def _latents(self, rows: int, *leading: int) -> Any:
        channels = self.pipeline.model.config.in_channels
        shape = (*leading, rows, self.grid.generated_tokens, channels)
        return self._array(shape, jnp.float32, len(leading))

    def _candidates(self) -> Candidates:
        rollout = self._config.rollout
        rows, steps = rollout.batch_groups * rollout.group_size, rollout.window_size
        states = self._latents(rows, steps)
        std, index = self._whole((steps,), np.float32), self._whole((steps,), np.int32)
        window = WindowSteps(states, states, states, std, index)
        condition = self._condition(rows)
        return Candidates(self._latents(rows), window, condition, self._whole((rows,), np.bool_))

    def _step(self) -> Step:
        rows = self._config.learner.micro_batch
        x, number = self._latents(rows), self._array((rows,), jnp.float32)
        return Step(x, x, x, self._whole((), jnp.int32), self._condition(rows), number, number)


def _laid_out(traced: jax.stages.Traced, compiled: jax.stages.Compiled) -> Any:
    """What a program returns, as the compiler has laid it out."""
    leaves, structure = jax.tree.flatten(traced.out_info)
    shardings = jax.tree.leaves(compiled.output_shardings)
    return jax.tree.unflatten(
        structure,
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(leaves, shardings, strict=True)
        ],
    )


def largest_grid(config: GrpoConfig) -> LatentGrid:
    """The bucket and number of layers with the most tokens."""
    layers = max(config.data.layers)
    grids = (
        LatentGrid(layers, bucket.height // PACKED_PIXELS, bucket.width // PACKED_PIXELS)
        for bucket in make_buckets(config.data.buckets)
    )
    return max(grids, key=lambda grid: grid.generated_tokens)


def workload(config: GrpoConfig) -> Workload:
    """What the run asks of accelerators and judges, whatever they are."""
    judge, rollout = config.judge, config.rollout
    return Workload(
        epochs=config.epochs,
        updates=config.learner.updates,
        groups=rollout.groups,
        group_size=rollout.group_size,
        judge_calls=rollout.group_size + (judge.grids if judge.two_stage else 0),
        judge_concurrency=judge.concurrency,
    )
