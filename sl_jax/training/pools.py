"""Training examples with true layers, held in memory, addressed by update number."""

import hashlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8
from tqdm import tqdm

from sl_jax.data.procedural import make_design
from sl_jax.imaging import recompose
from sl_jax.models.codec import encode_frames, to_unit_range
from sl_jax.models.packing import pack
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae
from sl_jax.training.supervised import FlowBatch, Frames

_ENCODED = 32  # designs per call of the encoder


@dataclass(frozen=True)
class DesignsConfig:
    """Procedural designs.

    Attributes:
        family: a key of `data.procedural.FAMILIES`.
        size: side in pixels, a multiple of 16.
        layers: numbers of layers, the background counted; as many designs of each.
    """

    family: str
    size: int
    layers: tuple[int, ...]


def draw_designs(family: str, seeds: Sequence[int], size: int, layers: int) -> np.ndarray:
    """True layers of many procedural designs, uint8 [n, layers, size, size, 4], on all cores."""
    make = partial(_layers, family, size, layers)
    context = multiprocessing.get_context("spawn")
    title = f"designs of family {family}, L = {layers}"
    with context.Pool(multiprocessing.cpu_count()) as workers:
        return np.stack(list(tqdm(workers.imap(make, seeds, 64), title, total=len(seeds))))


def _layers(family: str, size: int, layers: int, seed: int) -> np.ndarray:
    return make_design(family, seed, size, layers).layers


def with_picture(layers: np.ndarray) -> np.ndarray:
    """[n, L, H, W, 4] layers with the flat, opaque picture in front: [n, L + 1, H, W, 4]."""
    opaque = np.full((len(layers), 1, *layers.shape[2:]), 255, np.uint8)
    for picture, design in zip(opaque, layers, strict=True):
        picture[0, ..., :3] = recompose(design)
    return np.concatenate([opaque, layers], axis=1)


def pictures_and_layers(
    data: DesignsConfig, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of `count` designs per number of layers, from seed `first` on: [n, H, W, 4] each."""
    size, seeds = data.size, range(first, first + count)
    drawn = [with_picture(draw_designs(data.family, seeds, size, layers)) for layers in data.layers]
    pictures = np.concatenate([frames[:, 0] for frames in drawn])
    return pictures, np.concatenate([frames[:, 1:].reshape(-1, size, size, 4) for frames in drawn])


def indices(seed: int, step: int, batch: int, total: int) -> np.ndarray:
    """Which examples update `step` sees: each epoch is a permutation of its own."""
    start = step * batch
    picks = np.arange(start, start + batch)
    epochs = np.unique(picks // total)
    orders = {e: np.random.default_rng((seed, int(e))).permutation(total) for e in epochs}
    return np.array([orders[p // total][p % total] for p in picks])


class FramePool:
    """Single RGBA frames for the autoencoder: half of every batch flat pictures, half layers.

    Flat pictures hold the detail that the flow must find its outlines in, and most of the error.
    """

    def __init__(self, pictures: np.ndarray, layers: np.ndarray, batch: int, seed: int):
        """`pictures` and `layers` are uint8 [n, H, W, 4], with as many layers or more."""
        self._sources = (pictures, layers)
        self._half = batch // 2
        self._seed = seed

    def __call__(self, step: int) -> tuple[str, Frames]:
        rng = np.random.default_rng((self._seed, step, 1))
        chosen = [
            augmented(frames, rng)
            for source in self._sources
            for frames in source[rng.integers(len(source), size=(self._half, 4))]
        ]
        return "frames", Frames(to_unit_range(np.stack(chosen)))


def augmented(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One frame out of four [4, H, W, 4]: other detail and colours than the designs have.

    An autoencoder must carry pictures that it was not trained on. A quarter of the frames are
    mosaics of all four at half their size; each frame gets one of the eight symmetries of the
    square, and colours as by `recoloured`.
    """
    frame = frames[0]
    if rng.random() < 0.25:
        small = frames[:, ::2, ::2]
        frame = np.concatenate([np.concatenate(list(pair), 1) for pair in (small[:2], small[2:])])
    if rng.random() < 0.5:
        frame = frame.swapaxes(0, 1)
    frame = frame[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
    return recoloured(frame, rng)


def recoloured(
    frames: UInt8[np.ndarray, "*n h w 4"], rng: np.random.Generator
) -> UInt8[np.ndarray, "*n h w 4"]:
    """Half of the time another order of the colour channels, a quarter of the time the negative.

    All frames alike: recoloured layers recompose to the recoloured picture.
    """
    colour, alpha = frames[..., :3], frames[..., 3:]
    if rng.random() < 0.5:
        colour = colour[..., rng.permutation(3)]
    if rng.random() < 0.25:
        colour = (255 - colour) * (alpha > 0)
    return np.concatenate([colour, alpha], -1)


class LatentPool:
    """Latents of pictures and layers, encoded once; one array per number of layers.

    The number of layers of an update is drawn from its own number, so all processes agree.
    """

    def __init__(self, latents: dict[LatentGrid, np.ndarray], batch: int, seed: int):
        self._latents = latents
        self._grids = list(latents)
        self._batch = batch
        self._seed = seed

    def __call__(self, step: int) -> tuple[LatentGrid, FlowBatch]:
        rng = np.random.default_rng((self._seed, step, 2))
        grid = self._grids[rng.integers(len(self._grids))]
        pool = self._latents[grid]
        return grid, flow_batch(pool[indices(self._seed, step, self._batch, len(pool))])

    def held_out(self) -> list[tuple[LatentGrid, FlowBatch]]:
        """All examples in batches; the last of each kind may be shorter."""
        return [
            (grid, flow_batch(pool[start : start + self._batch]))
            for grid, pool in self._latents.items()
            for start in range(0, len(pool), self._batch)
        ]


def flow_batch(frames: np.ndarray) -> FlowBatch:
    """Packed latents [B, L + 1, N, C] as target sequence and picture."""
    target = jnp.asarray(frames, jnp.float32)
    batch, _, _, channels = target.shape
    return FlowBatch(target.reshape(batch, -1, channels), target[:, 0])


class Encoder:
    """Frames uint8 [B, H, W, 4] → normalised latents [B, h, w, z].

    Attributes:
        fingerprint: of the autoencoder: its shape and its parameters.
    """

    def __init__(self, vae: Vae, params: Any):
        self._encode = jax.jit(partial(encode_frames, vae, params))
        digest = hashlib.sha256(repr(vae.config).encode())
        for path, leaf in jax.tree.leaves_with_path(params):
            values = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
            digest.update(values.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __call__(self, frames: np.ndarray) -> Array:
        return self._encode(frames)


def cached_latents(
    folder: Path,
    encode: Encoder,
    data: DesignsConfig,
    layers: int,
    first: int,
    count: int,
    recolour: bool,
) -> np.ndarray:
    """Packed latents of procedural designs and their pictures, kept in `folder` once made.

    Args:
        folder: files in it are named by all that they depend on.
        encode: the autoencoder.
        data: the designs.
        layers: layers of each design.
        first, count: range of seeds.
        recolour: whether designs get colours as by `recoloured`.

    Returns:
        float16 [count, layers + 1, N, C], the picture first.
    """
    kind = "recoloured" if recolour else "plain"
    name = f"{data.family}_{data.size}_{layers}_{first}_{count}_{kind}_{encode.fingerprint}"
    path = folder / f"{name}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    designs = draw_designs(data.family, range(first, first + count), data.size, layers)
    if recolour:
        rng = np.random.default_rng((first, count, layers))
        designs = np.stack([recoloured(design, rng) for design in designs])
    latents = np.concatenate(
        [
            _encoded(encode, designs[start : start + _ENCODED])
            for start in tqdm(range(0, count, _ENCODED), f"encoding, L = {layers}")
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".partial.npy"), latents)
    path.with_suffix(".partial.npy").replace(path)
    return latents


def _encoded(encode: Encoder, designs: np.ndarray) -> np.ndarray:
    frames = with_picture(designs)
    count, per_design = frames.shape[:2]
    padded = np.zeros((_ENCODED * per_design, *frames.shape[2:]), np.uint8)
    padded[: count * per_design] = frames.reshape(-1, *frames.shape[2:])
    tokens = np.asarray(pack(encode(padded)[:, None]), np.float16)[: count * per_design]
    return tokens.reshape(count, per_design, *tokens.shape[1:])
