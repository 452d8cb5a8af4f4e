"""The programs of an epoch as `planning` takes them: of shapes, for devices that need not exist."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sl_jax.checkpoints.pipeline import Pipeline, abstract_adapter, abstract_pipeline
from sl_jax.data.buckets import make_buckets
from sl_jax.flow.sampler import WindowSteps, evaluations, window_starts
from sl_jax.grpo.config import GrpoConfig, RolloutConfig
from sl_jax.grpo.learner import Learner, LearnerState, Step
from sl_jax.grpo.rollout import Candidates, Rollout, sampled_velocities
from sl_jax.inference.modulation import abstract_table
from sl_jax.inference.sampling import GUIDANCE_SCOPE, Condition, Guidance
from sl_jax.models.lora import Adapter
from sl_jax.models.modulation import ModulationTable, time_modules
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout, batch_sharding, replicated
from sl_jax.planning.phases import Phase, Phases, Workload
from sl_jax.training.adapter import first_adapter

_LOOPS = ("/prefix/while/body", "/window/while/body")  # of `Rollout` with all candidates together
_TURNS = "/candidates/while/body"  # with one at a time: the sampler's loop is in that of the turns


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
        self.adapter: Adapter = abstract_adapter(shapes, self.pipeline.params)
        self.grid = largest_grid(config)
        placed = (layout, self._guidance())
        self._rollout = Rollout(self.pipeline, config.rollout, *placed)
        learning = (config.objective, config.optimizer, config.learner)
        model = (self.pipeline, self.adapter)
        self._learner = Learner(*model, config.rollout, *learning, *placed)
        self.state: LearnerState = self._learner.abstract

    def resident(self) -> dict[str, Any]:
        """What is on the devices all the time, by name."""
        state = self.state
        sampler = {"sampling adapter": state.sampler.lora} if self._stale else {}
        return {
            "base": self.pipeline.params,
            "autoencoder": self.pipeline.vae_params,
            "adapter": state.adapter,
            "average": state.ema.lora,
            "initial adapter": state.initial.lora,
            "optimizer": state.optimizer,
        } | sampler

    @property
    def tokens(self) -> int:
        """Of one sample: of all frames, and of the longest prompt."""
        image = self.grid.generated_tokens + self.grid.frame_tokens
        return image + self._config.data.max_text_tokens

    def learning(self) -> Any:
        """What is on the devices while the learner works, but for one micro-batch's passes.

        Gradients are there three times: of the update, of a window step, and of the micro-batch.
        """
        gradients = [self.state.adapter.lora] * 3
        waiting = self._waiting[1:]  # The sampling adapter is among what is always there.
        return self.resident(), self._before, self._batches, waiting, self._reference, gradients

    def kept_bytes(self, samples: int) -> int:
        """Of all devices: what a forward pass of so many samples keeps for the backward pass."""
        step, table = self._step(samples), self._table()
        traced = self._learner.trace_forward(self.adapter, step, table, self.grid)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(traced.out_info))

    def chains(self) -> tuple[Phases, ...]:
        """The programs of an epoch, in chains that can be compiled side by side."""
        return self._learner_phases(), self._rollout_phases(), self._small_phases()

    def _rollout_phases(self) -> Phases:
        batches = self._batches
        trips, loops, passes = self._sampling()
        rows, key = self._config.rollout.batch_groups, jax.eval_shape(jax.random.key, 0)
        groups, keys = self._condition(rows), self._array((rows,), key.dtype)
        yield Phase(
            "rollout",
            self._rollout.trace(self.adapter, groups, keys, self._table(), self.grid),
            len(batches),
            trips,
            (*loops, *self._loops),
            (self.pipeline.vae_params, self._learning, batches[1:], self._waiting),
            self._weights(passes),
        )

    def _small_phases(self) -> Phases:
        state, (batch, *others) = self.state, self._batches
        params, kept = self.pipeline.params, batch._replace(latents=None)
        yield Phase(
            "decode",
            self._rollout.trace_decode(batch.latents, self.grid),
            len(self._batches),
            (),
            (),
            (params, self.adapter, self._learning, others, kept, self._waiting),
            0.0,
            quick=True,
        )
        height, width = (PACKED_PIXELS * side for side in self.grid[1:])
        pixels = (self._config.rollout.batch_groups, height, width, 3)
        yield Phase(
            "encode",
            self._rollout.trace_encode(self._array(pixels, jnp.uint8)),
            len(self._batches),
            (),
            (),
            (params, self.adapter, self._learning, others, self._waiting),
            0.0,
            quick=True,
        )
        begun = (self._before, self._batches, self._waiting, self._reference)
        rest = (state.initial.lora, state.adapter.lora_scale, begun)
        yield Phase(
            "apply",
            self._learner.trace_apply(state),
            self._config.learner.updates,
            (),
            (),
            (params, self.pipeline.vae_params, rest),
            0.0,
        )

    @property
    def _batches(self) -> list[Candidates]:
        """What the rollouts of an epoch leave."""
        rollout = self._config.rollout
        return [self._candidates()] * (rollout.groups // rollout.batch_groups)

    @property
    def _stale(self) -> bool:
        return self._config.rollout.max_staleness > 0

    @property
    def _waiting(self) -> Any:
        """Of the epoch before or after what waits for the judge, and whose it is."""
        return (self.state.sampler.lora, self._batches) if self._stale else ()

    @property
    def _learning(self) -> Any:
        """Of the state what sampling does not use."""
        return self.state.ema.lora, self.state.initial.lora, self.state.optimizer

    @property
    def _before(self) -> Any:
        """The state that the epoch began with, which outlives its updates but the last."""
        state = self.state
        begun = (state.adapter.lora, state.ema.lora, state.optimizer)
        return begun if self._config.learner.updates > 1 else ()

    @property
    def _reference(self) -> Any:
        """The zeros that stand for the base while an update computes its KL."""
        config = self._config
        if config.objective.kl_weight and config.learner.reference == "base":
            return self.adapter.lora
        return ()

    def _learner_phases(self) -> Phases:
        """What the forward program leaves to the compiler is the backward one's argument."""
        config, learning = self._config, self._learning
        epoch = (self._before, self._batches, self._waiting, self._reference)
        gradients = (self.state.adapter.lora, self.state.adapter.lora)
        samples = config.rollout.groups * config.rollout.group_size
        steps = config.rollout.window_size * samples // config.learner.micro_batch
        step, table, vae = (
            self._step(config.learner.micro_batch),
            self._table(),
            self.pipeline.vae_params,
        )
        traced = self._learner.trace_forward(self.adapter, step, table, self.grid)
        velocities = self._velocities_per_step()
        rest = (step.x_next, step.mean, step.advantage, step.weight)
        held = (vae, epoch, learning, gradients, rest)
        blocks, once = self._loops, self._weights(1)
        shardings = yield Phase(
            "learner forward", traced, steps * velocities, (), blocks, held, once
        )
        if shardings is None:
            return
        forward = _laid_out(traced, shardings)
        traced = self._learner.trace_backward(self.adapter, forward, step, table.sigmas, self.grid)
        weights = jax.tree.leaves(
            (self.adapter.lora, self.adapter.lora_scale, self.pipeline.params)
        )
        # The rest of the weights are among what the program takes, as parts of the vjp.
        unused = [x for place, x in enumerate(weights) if place not in forward[1].inputs]
        held = (vae, epoch, learning, gradients[:1], unused)
        yield Phase("learner backward", traced, steps, (), blocks, held, 2 * once)

    @property
    def _loops(self) -> tuple[tuple[str, float], ...]:
        """Over the transformer's blocks, forward and backward, and over prompts with guidance."""
        blocks = (r"MMDiT\)*/while/body", self.pipeline.model.config.num_layers)
        prompts = (rf"{GUIDANCE_SCOPE}\)*/while/body", self._prompts)
        return blocks, prompts

    @property
    def _prompts(self) -> int:
        """Passes through the transformer for one velocity."""
        return 1 if self._config.rollout.guidance == 1 else 2

    def _guidance(self) -> Guidance | None:
        """By a negative prompt as long as the longest prompts."""
        if self._prompts == 1:
            return None
        channels = self.pipeline.model.config.joint_attention_dim
        shape = (1, self._config.data.max_text_tokens, channels)
        text = self._whole(shape, jnp.dtype(self._config.compute.dtype))
        return Guidance(self._whole((), np.float32), text, None)

    def _weights(self, velocities: float) -> float:
        """Bytes that so many velocities of the transformer read on every chip."""
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.pipeline.params))
        return velocities * self._prompts * whole / self._layout.mesh.shape["tensor"]

    def _velocities_per_step(self) -> float:
        """Forward passes per micro-batch: the sampling adapter's, if it is another; a reference."""
        config = self._config
        later = 1 if self._stale else (config.learner.updates - 1) / config.learner.updates
        return 1 + later + (1 if config.objective.kl_weight else 0)

    def _sampling(self) -> tuple[tuple[float, ...], tuple[tuple[str, float], ...], float]:
        """Trips of the sampler's loops, how often what lies in them runs, passes of the model.

        On average over the positions of the window.
        """
        rollout = self._config.rollout
        start, shared = _mean_start(rollout), rollout.group_noise == "shared"
        if self._rollout.one_by_one(self.grid):
            turns, passes = rollout.group_size + shared, sampled_velocities(rollout, 1, start)
            return (passes / turns,), ((_TURNS, passes),), passes
        before, after = evaluations(rollout.steps, start, rollout.window_size, rollout.ode_method)
        trips = (before, after) if shared else (before + after,)
        return trips, tuple(zip(_LOOPS[-len(trips) :], trips, strict=True)), before + after

    def _array(self, shape: tuple[int, ...], dtype: Any, leading: int = 0) -> Any:
        sharding = batch_sharding(self._layout.mesh, leading)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _whole(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self._layout.mesh))

    def _table(self) -> ModulationTable:
        table = abstract_table(self.pipeline.model, self._config.rollout.steps, self._layout)
        return table._replace(rows=None) if time_modules(self.adapter.lora) else table

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

    def _step(self, rows: int) -> Step:
        x, number = self._latents(rows), self._array((rows,), jnp.float32)
        return Step(x, x, x, self._whole((), jnp.int32), self._condition(rows), number, number)


def _laid_out(traced: jax.stages.Traced, shardings: Any) -> Any:
    """What a program returns, with the compiler's shardings."""
    leaves, structure = jax.tree.flatten(traced.out_info)
    return jax.tree.unflatten(
        structure,
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        ],
    )


def largest_grid(config: GrpoConfig) -> LatentGrid:
    """The bucket and number of layers with the most tokens."""
    layers = max(config.data.layers)
    grids = (LatentGrid.of_pixels(layers, *bucket) for bucket in make_buckets(config.data.buckets))
    return max(grids, key=lambda grid: grid.generated_tokens)


def workload(config: GrpoConfig) -> Workload:
    """What the run asks of accelerators and judges, whatever they are."""
    judge, rollout, evaluation = config.judge, config.rollout, config.evaluation
    heun, start = evaluation.method == "heun", _mean_start(rollout)
    per_picture = 2 * evaluation.steps - 1 if heun else evaluation.steps
    shared = dataclasses.replace(rollout, group_noise="shared")
    spread = evaluation.spread_draws * sampled_velocities(shared, rollout.batch_groups, start)
    passes = evaluation.times(config.epochs) * (evaluation.pictures * per_picture + spread)
    # Beside the first one, what the rollout's own sampler makes of some of the pictures.
    passes += sampled_velocities(rollout, rollout.batch_groups, start)
    return Workload(
        epochs=config.epochs,
        updates=config.learner.updates,
        groups=rollout.groups,
        group_size=rollout.group_size,
        judge_calls=rollout.group_size + (judge.grids if judge.two_stage else 0),
        evaluations=passes / config.epochs,
        rollouts=sampled_velocities(rollout, rollout.groups, start),
    )


def _mean_start(rollout: RolloutConfig) -> float:
    """Of the window, over its positions."""
    starts = window_starts(rollout.window_range, rollout.window_size)
    return sum(starts) / len(starts)
