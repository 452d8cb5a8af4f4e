"""Pictures in, layers out: one compiled program per picture size, number of layers and sampler.

`Decomposer` works on arrays, with prompts that are already hidden states. What
`Decomposer.from_pretrained` returns, a `PictureDecomposer`, works on Pillow images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from PIL import Image

from sl_jax.checkpoints.adapters import load_adapter
from sl_jax.checkpoints.pipeline import (
    ComputeConfig,
    Pipeline,
    abstract_params,
    load_pipeline,
    make_model,
    shard_adapter,
)
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data.pictures import area_size, longest_side_size, resize_to, to_rgba
from sl_jax.flow.sampler import OdeMethod, initial_noise, sample
from sl_jax.imaging import flatten
from sl_jax.inference.modulation import ModulationTables
from sl_jax.inference.prompts import (
    DEFAULT_PROMPT,
    PromptEmbeddings,
    encode_prompts,
    user_cache,
)
from sl_jax.inference.sampling import (
    Condition,
    Decoded,
    Guidance,
    decode_layers,
    modulation_rows,
    velocity_function,
)
from sl_jax.models.codec import encode_frames, opaque
from sl_jax.models.lora import Adapter
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.modulation import ModulationTable
from sl_jax.models.packing import pack
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, batch_sharding, batch_shards, make_layout

SizeRule = Literal["longest", "area"]

MAX_SEED = 2**32 - 1
NOT_FINITE = (
    "the layers are not finite (nan, or too large for their type); please look whether model and "
    "adapter were trained together, and try float32"
)


class DecompositionError(ValueError):
    """Layers that are not finite: there is nothing to show, or to measure."""


class Decomposer:
    """Samples layers of pictures from a loaded pipeline, by the ODE."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._tables = ModulationTables(pipeline)
        self._program = jax.jit(self._sampled, static_argnames=("grid", "method"))

    @property
    def transformer(self) -> MMDiTConfig:
        """Sizes of the model that is evaluated."""
        return self._pipeline.model.config

    @staticmethod
    def from_pretrained(
        model: str,
        adapter: str | None = None,
        *,
        prompt: str = DEFAULT_PROMPT,
        negative_prompt: str = " ",
        dtype: str = "bfloat16",
        mesh: MeshConfig | None = None,
        prompt_cache: epath.PathLike | None = None,
    ) -> "PictureDecomposer":
        """Loads a model for Pillow images; see `PictureDecomposer`.

        Args:
            model: a folder in the diffusers layout, local or gs://…, a hub id, or "tiny".
            adapter: PEFT folder, diffusers LoRA file, work directory of a run, or hub id; see
                `checkpoints.adapters.locate_adapter`. None decomposes with the base.
            prompt: for all pictures.
            negative_prompt: used where guidance is not 1.
            dtype: "bfloat16" or "float32".
            mesh: how the devices share the work; by default the parameters are sharded over all.
            prompt_cache: folder of encoded prompts; None is `inference.prompts.user_cache()`. With
                the prompts of an earlier call, the text encoder is not loaded.

        Raises:
            CheckpointError: model or adapter are missing or damaged, or do not fit each other.
        """
        folder = resolve_model(model)
        layout = make_layout(mesh or MeshConfig())
        compute = ComputeConfig(dtype, remat="none")
        loaded = None
        if adapter is not None:  # Before the model, which takes long: it may not fit.
            shapes = layout.abstract(abstract_params(make_model(folder, compute, layout)))
            loaded = load_adapter(adapter, shapes)
        # The text encoder is gone from memory before the model is loaded.
        cache = user_cache() if prompt_cache is None else prompt_cache
        prompts = encode_prompts(folder, [prompt, negative_prompt], cache_dir=cache, dtype=dtype)
        pipeline = load_pipeline(folder, compute, layout, [loaded] if loaded else [])
        if loaded is not None:
            loaded = shard_adapter(loaded, pipeline.params)
        return PictureDecomposer(Decomposer(pipeline), prompts, loaded, layout)

    def __call__(
        self,
        pictures: UInt8[Array, "b h w c"],
        text: Float[Array, "b s e"],
        text_lengths: Int[Array, " b"] | None,
        keys: PRNGKeyArray,
        *,
        layers: int,
        steps: int,
        method: OdeMethod = "heun",
        shift: float | None = None,
        adapter: Adapter | None = None,
        guidance: Guidance | None = None,
    ) -> Decoded:
        """Layers of every picture, back to front.

        Args:
            pictures: RGB (taken as opaque) or straight RGBA; sides must be multiples of 16.
            text, text_lengths: prompts, see `Condition`.
            keys: one per picture; a picture's layers depend on its own key alone.
            layers: L.
            steps, method: of the sampler; Heun evaluates twice per step but for the last.
            shift: μ of the σ grid; None takes the checkpoint's own rule.
            adapter: None samples the base.
            guidance: None follows the prompt alone.
        """
        _, height, width, _ = pictures.shape
        grid = LatentGrid.of_pixels(layers, height, width)
        sigmas = self._pipeline.scheduler.sigmas(steps, grid.frame_tokens, shift)
        noise = initial_noise(keys, grid.generated_tokens, self._pipeline.model.config.in_channels)
        return self._program(
            self._pipeline.params,
            self._pipeline.vae_params,
            adapter.variables() if adapter else {},
            pictures,
            text,
            text_lengths,
            noise,
            self._tables(sigmas),
            guidance,
            grid=grid,
            method=method,
        )

    def _sampled(
        self,
        params: Any,
        vae_params: Any,
        variables: Any,
        pictures: Array,
        text: Array,
        text_lengths: Array | None,
        noise: Array,
        table: ModulationTable,
        guidance: Guidance | None,
        *,
        grid: LatentGrid,
        method: OdeMethod,
    ) -> Decoded:
        model, vae = self._pipeline.model, self._pipeline.vae
        frames = pictures if pictures.shape[-1] == 4 else opaque(pictures)
        latents = encode_frames(vae, vae_params, frames).astype(jnp.float32)
        condition = Condition(pack(latents[:, None]), text, text_lengths)
        rows = modulation_rows(model, params, variables, table)
        velocity = velocity_function(model, params, variables, condition, rows, grid, guidance)
        return decode_layers(vae, vae_params, sample(velocity, noise, table.sigmas, method), grid)


@dataclass(frozen=True)
class Sampling:
    """How pictures become layers; the defaults are those of the Stable-Layers release.

    Attributes:
        layers: number of layers, at least 1.
        steps: of the sampler; with fewer than 50, the release warns, results are garbled.
        sampler: "heun" or "euler".
        size: pixels of the longest side, or the side of the square whose area pictures get.
        resize: "longest" (the release: longest side `size`, sides multiples of 16, transparency
            flattened over white) or "area" (diffusers' pipeline: area `size`², sides multiples of
            32, transparency kept).
        guidance: scale of classifier-free guidance; 1 is off.
        normalize: whether guidance keeps the norm of the velocity; see `Guidance`.

    Raises:
        ValueError: a value is out of range.
    """

    layers: int = 4
    steps: int = 50
    sampler: OdeMethod = "heun"
    size: int = 640
    resize: SizeRule = "longest"
    guidance: float = 1.0
    normalize: bool = True

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("steps", 1), ("size", PACKED_PIXELS)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}; please use {least} or more")
        for name, known in (("sampler", ("heun", "euler")), ("resize", ("longest", "area"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}; please use one of {', '.join(known)}"
                )
        if not np.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance}; please use a finite number, 1 for none")

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which a picture of that size is decomposed."""
        if self.resize == "longest":
            return longest_side_size(height, width, self.size)
        return area_size(height, width, self.size**2)

    def frame(self, picture: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h2 w2 4"]:
        """A straight RGBA picture as the model is shown it."""
        size = self.frame_size(*picture.shape[:2])
        if self.resize == "area":
            return resize_to(picture, size)
        resized = resize_to(flatten(picture), size)
        return np.concatenate([resized, np.full_like(resized[..., :1], 255)], axis=-1)


RELEASE = Sampling()


def check_seeds(first: int, count: int = 1) -> None:
    """Makes sure that `count` pictures in a row have seeds.

    Raises:
        ValueError: a seed is out of range.
    """
    if first < 0 or first + count - 1 > MAX_SEED:
        if count == 1:
            raise ValueError(f"seed = {first}; please use 0 to {MAX_SEED}")
        raise ValueError(
            f"seed = {first}, of the first of {count} pictures; please use 0 to {MAX_SEED}, so "
            "that the last one, whose seed is larger by one for each picture, is in range too"
        )


def picture_keys(seeds: Sequence[int]) -> PRNGKeyArray:
    """The random key of each seed.

    Raises:
        ValueError: a seed is out of range.
    """
    for seed in seeds:
        check_seeds(seed)
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


class PictureDecomposer:
    """A loaded model with its prompt and adapter: one Pillow image in, a list of layers out."""

    def __init__(
        self,
        decomposer: Decomposer,
        prompts: PromptEmbeddings,
        adapter: Adapter | None,
        layout: Layout,
    ):
        """Takes parts that are loaded; `prompts` are the prompt and the negative one."""
        self._decomposer = decomposer
        self._prompts = prompts
        self._adapter = adapter
        self._layout = layout

    @property
    def batch_multiple(self) -> int:
        """Batches are multiples of this, so that every device has its share."""
        return batch_shards(self._layout.mesh)

    def __call__(
        self,
        image: Image.Image,
        layers: int = 4,
        *,
        seed: int = 42,
        steps: int = 50,
        sampler: OdeMethod = "heun",
        size: int = 640,
        resize: SizeRule = "longest",
        guidance: float = 1.0,
    ) -> list[Image.Image]:
        """Layers of one picture as RGBA images, back to front; the first is the background.

        They have the size at which the picture was decomposed, see `Sampling`. The picture is read
        as files are: upright by its EXIF orientation, of 16 bits the upper ones. The same arguments
        give the same layers, and those of the command's first picture.

        Args:
            seed: 0 to 2³² − 1.

        Raises:
            DecompositionError: the layers are not finite.
            ValueError: an argument is out of range.
        """
        sampling = Sampling(layers, steps, sampler, size, resize, guidance)
        frame = sampling.frame(to_rgba(image))
        stack = self.decompose(frame[None], picture_keys([seed]), sampling)[0]
        return [Image.fromarray(layer) for layer in stack]

    def decompose(
        self,
        frames: UInt8[np.ndarray, "b h w 4"],
        keys: PRNGKeyArray,
        sampling: Sampling,
        batch: int | None = None,
    ) -> UInt8[np.ndarray, "b l h w 4"]:
        """Layers of pictures of one size, back to front.

        Args:
            frames: from `Sampling.frame`.
            keys: one per picture.
            sampling: its size rule is not applied again.
            batch: the batch is filled up to so many, and to a multiple of `batch_multiple`; one
                number for all calls means one program for all.

        Raises:
            DecompositionError: those of some pictures are not finite; `decoded` gives the others.
        """
        found = self.decoded(frames, keys, sampling, batch)
        if not found.finite.all():
            raise DecompositionError(
                f"{np.sum(~found.finite)} of {len(frames)} pictures: {NOT_FINITE}"
            )
        return found.layers

    def decoded(
        self,
        frames: UInt8[np.ndarray, "b h w 4"],
        keys: PRNGKeyArray,
        sampling: Sampling,
        batch: int | None = None,
    ) -> Decoded:
        """As `decompose`, and which pictures' layers are finite, as numpy arrays."""
        count = len(frames)
        rows = -(-max(count, batch or 1) // self.batch_multiple) * self.batch_multiple
        chosen = np.minimum(np.arange(rows), count - 1)
        text = partial(_prompt, self._prompts, rows=rows)
        guidance = None
        if sampling.guidance != 1.0:
            guidance = Guidance(sampling.guidance, text(1), None, sampling.normalize)
        pictures, positive, keys = jax.device_put(
            (frames[chosen], text(0), keys[chosen]), batch_sharding(self._layout.mesh)
        )
        found = self._decomposer(
            pictures,
            positive,
            None,
            keys,
            layers=sampling.layers,
            steps=sampling.steps,
            method=sampling.sampler,
            adapter=self._adapter,
            guidance=guidance,
        )
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], found)


def _prompt(prompts: PromptEmbeddings, index: int, *, rows: int) -> np.ndarray:
    """Hidden states of one prompt, without padding, for every row of a batch."""
    return np.repeat(prompts.hidden[index : index + 1, : prompts.lengths[index]], rows, axis=0)
