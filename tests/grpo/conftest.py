"""What tests share: the random checkpoint on a mesh, and served judges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from served import ServedJudge

from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline, shard_adapter
from sl_jax.grpo.config import RolloutConfig
from sl_jax.grpo.rollout import Pictures
from sl_jax.models.lora import LoRAConfig, init_adapter
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh


class Bench:
    """A float32 pipeline on a mesh, pictures to roll out, and an adapter whose update is not 0.

    `adapters` is for `load_pipeline`; by default modulation comes from tables, as in a run.
    """

    grid = LatentGrid(2, 2, 1)
    groups = 8
    config = RolloutConfig(
        groups=8, batch_groups=8, group_size=2, steps=4, window_range=(0, 3), noise_level=0.7
    )

    def __init__(self, folder, adapters=(), **mesh):
        devices = jax.devices()[: np.prod(list(mesh.values()))]
        self.layout = Layout(make_mesh(MeshConfig(**mesh), devices))
        self.pipeline = load_pipeline(folder, ComputeConfig("float32"), self.layout, adapters)
        targets = ("to_q", "to_out.0", "add_k_proj", "img_mlp.net.2")
        fresh = init_adapter(jax.random.key(3), self.pipeline.params, LoRAConfig(4, 8.0, targets))
        rng = np.random.default_rng(4)
        moved = jax.tree.map(
            lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), fresh.lora
        )
        self.fresh = shard_adapter(fresh, self.pipeline.params)
        self.adapter = shard_adapter(fresh.replace(lora=moved), self.pipeline.params)

    def pictures(self, seed=0):
        rng = np.random.default_rng(seed)
        keys = jax.vmap(jax.random.key)(jnp.arange(self.groups) + 100 * seed)
        pixels = rng.integers(0, 256, (self.groups, 32, 16, 3), np.uint8)
        text = rng.normal(size=(self.groups, 5, 64)).astype(np.float32)
        lengths = rng.integers(2, 6, self.groups).astype(np.int32)
        return Pictures(jnp.asarray(pixels), jnp.asarray(text), jnp.asarray(lengths), keys)


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs run a few times here: optimizing them costs more than it saves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def bench(random_checkpoint, quick_compilation):
    """On one device."""
    return Bench(random_checkpoint, data=1, fsdp=1)


@pytest.fixture(scope="module")
def wide_bench(random_checkpoint, quick_compilation):
    """On eight devices, split in all ways that the model knows."""
    return Bench(random_checkpoint, data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="session")
def judge_token():
    """What served judges want to see."""
    return "a-token-of-the-test"


@pytest.fixture
def servers(judge_token):
    """Two served judges."""
    yield from _served(2, judge_token)


@pytest.fixture
def four_servers(judge_token):
    """Four served judges."""
    yield from _served(4, judge_token)


def _served(count, token):
    started = [ServedJudge(token) for _ in range(count)]
    yield started
    for served in started:
        served.stop()
        served.thread.join(10)
