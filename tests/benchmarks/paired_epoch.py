"""An epoch of the quickstart on the tiny base, beside the same work in PyTorch."""

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from pairing import Side, copy_adapter, relative_error, rows, torch_device
from peer_epoch import PeerEpoch, peer_batch
from peft import LoraConfig

from sl_jax.checkpoints.pipeline import load_pipeline, shard_adapter
from sl_jax.flow.sampler import initial_noise
from sl_jax.grpo.config import GrpoConfig, from_mapping
from sl_jax.grpo.learner import Learner, LearnerState, Scored
from sl_jax.grpo.rollout import Decoded, Pictures, Rollout
from sl_jax.models.lora import Adapter, init_adapter
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout, make_mesh
from sl_jax.training.flags import packaged

CPU_DEVICES = packaged("grpo", "tiny").distributed.cpu_devices

_WINDOW_START = 1
_TEXT_TOKENS = 8
_TOLERANCE = 0.05  # of the adapter's second factors: AdamW's first steps are signs of gradients


class _Epoch:
    """This package's side: the parts of `grpo.run`, with made-up advantages for a judge's."""

    def __init__(self, config: GrpoConfig, folder: Path):
        layout = Layout(make_mesh(config.mesh))
        self.config = config
        self.pipeline = load_pipeline(folder, config.compute, layout)
        adapter = init_adapter(jax.random.key(0), self.pipeline.params, config.lora)
        self.adapter = shard_adapter(adapter, self.pipeline.params)
        bucket = config.data.buckets[0]
        sides = (side // PACKED_PIXELS for side in (bucket[1], bucket[0]))
        self.grid = LatentGrid(config.data.layers[0], *sides)
        self.rollout = Rollout(self.pipeline, config.rollout, layout)
        self._learner = Learner(
            *(self.pipeline, self.adapter, config.rollout, config.objective),
            *(config.optimizer, config.learner, layout),
        )
        samples = config.rollout.batch_groups * config.rollout.group_size
        draw = np.random.default_rng(0)
        self.batches = [self._pictures(draw, number) for number in range(config.learner.updates)]
        self.advantages = draw.normal(size=(len(self.batches), samples)).astype(np.float32)
        self._weight = np.full(samples, 1 / samples, np.float32)

    def _pictures(self, draw: np.random.Generator, number: int) -> Pictures:
        groups = self.config.rollout.batch_groups
        height, width = (PACKED_PIXELS * side for side in self.grid[1:])
        channels = self.pipeline.model.config.joint_attention_dim
        return Pictures(
            jnp.asarray(draw.integers(0, 256, (groups, height, width, 3), np.uint8)),
            jnp.asarray(draw.normal(size=(groups, _TEXT_TOKENS, channels)), jnp.float32),
            None,
            jax.random.split(jax.random.key(number), groups),
        )

    def run(self) -> tuple[LearnerState, list[Decoded]]:
        """An epoch from the first adapter on."""
        state = self._learner.start(self.adapter)
        begun, table = state.adapter, self.rollout.table(self.grid)
        rolled = [self.rollout(begun, p, _WINDOW_START, self.grid) for p in self.batches]
        decoded = [self.rollout.decode(found.latents, self.grid) for found in rolled]
        for candidates, advantage in zip(rolled, self.advantages, strict=True):
            scored = Scored(candidates, table, advantage, self._weight, self.grid)
            old = None if state.adapter is begun else begun
            state, _ = self._learner.update(state, [scored], old, donate=old is not None)
        return state, decoded

    def flops(self) -> float:
        """Of the transformer in one epoch."""
        found = self.rollout(self.adapter, self.batches[0], _WINDOW_START, self.grid)
        table = self.rollout.table(self.grid)
        scored = Scored(found, table, self.advantages[0], self._weight, self.grid)
        return len(self.batches) * self.rollout.work(found, _WINDOW_START, self.grid).flops + sum(
            self._learner.work([scored], old).flops
            for old in (None, *(self.adapter,) * (len(self.batches) - 1))
        )


def _config(small: bool) -> GrpoConfig:
    settings = packaged("grpo", "tiny").to_dict()
    settings["data"]["path"] = "made up"
    if small:
        settings["rollout"] |= {"steps": 5, "window_size": 2, "window_range": (0, 4)}
        settings["rollout"] |= {"groups": 4, "batch_groups": 2, "group_size": 2}
        settings["learner"] |= {"micro_batch": 4}
    return from_mapping(settings, jax.device_count())


def _peer(ours: _Epoch, folder: Path) -> tuple[PeerEpoch, list[tuple[Any, ...]]]:
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    transformer.requires_grad_(False)
    lora = ours.config.lora
    transformer.add_adapter(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    )
    pairs = copy_adapter(ours.adapter, transformer)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae").requires_grad_(False)
    sigmas = np.asarray(ours.rollout.table(ours.grid).sigmas)
    place = torch_device()
    peer = PeerEpoch(
        *(transformer.to(place), vae.to(place), sigmas, ours.config, ours.grid, _WINDOW_START)
    )
    return peer, pairs


def _given(ours: _Epoch, pictures: Pictures, advantage: np.ndarray) -> Any:
    """What the peer needs for the same samples."""
    found = ours.rollout(ours.adapter, pictures, _WINDOW_START, ours.grid)
    pixels = np.asarray(pictures.pixels, np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    alpha = np.ones_like(pixels[:, :1])
    channels = ours.pipeline.model.config.in_channels
    return peer_batch(
        pictures=np.concatenate([pixels, alpha], 1),
        text=pictures.text,
        start=initial_noise(pictures.keys, ours.grid.generated_tokens, channels),
        noise=(found.window.x_next - found.window.mean) / found.window.std[:, None, None, None],
        advantage=advantage,
    )


def _second_factors(adapter: Adapter, pairs: list[tuple[Any, ...]]) -> tuple[Any, Any]:
    """Both sides' second factors as vectors: they start from zero."""

    def ours(path: tuple[str, ...], block: int) -> np.ndarray:
        tree: Any = adapter.lora
        for name in path:
            tree = tree[name]
        return np.asarray(tree[block]).T.ravel()

    theirs = [weight.detach().cpu().numpy().ravel() for _, _, weight in pairs]
    return np.concatenate([ours(path, block) for path, block, _ in pairs]), np.concatenate(theirs)


def measure_epoch(repeats: int, small: bool) -> list[dict[str, Any]]:
    """Rollout, decoding and updates with the quickstart's settings, without the judge."""
    folder = Path(str(resources.files("sl_jax") / "assets" / "tiny"))
    ours = _Epoch(_config(small), folder)
    peer, pairs = _peer(ours, folder)
    batches = [
        _given(ours, pictures, advantage)
        for pictures, advantage in zip(ours.batches, ours.advantages, strict=True)
    ]
    state, decoded = ours.run()
    theirs = peer.run(batches)
    layers = [
        np.abs(
            np.asarray(mine.layers, np.int16)
            - rolled.layers.permute(0, 1, 3, 4, 2).cpu().numpy().astype(np.int16)
        )
        for mine, rolled in zip(decoded, theirs, strict=True)
    ]
    rollout = ours.config.rollout
    return rows(
        "epoch",
        [
            Side("sl_jax", ours.run),
            Side("diffusers + PEFT, eager", partial(peer.run, batches)),
        ],
        shapes={
            "base": "tiny",
            "devices": jax.device_count(),
            "groups": rollout.batch_groups * len(batches),
            "group_size": rollout.group_size,
            "steps": rollout.steps,
            "window": rollout.window_size,
            "updates": len(batches),
            "image_tokens": ours.grid.generated_tokens + ours.grid.frame_tokens,
        },
        dtype="float32",
        flops=ours.flops(),
        repeats=repeats,
        error=relative_error(*_second_factors(state.adapter, pairs)),
        tolerance=_TOLERANCE,
        most_differing_grey_levels_of_layers=int(max(found.max() for found in layers)),
        flops_count="of the transformer",
        left_out="the judge, which is the same code on both sides",
    )
