"""The whole way from pictures to layers, alone and against diffusers' pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from peft import PeftModel
from PIL import Image

from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data.procedural import make_design
from sl_jax.eval.baselines import BASELINES
from sl_jax.eval.layerd import layerd_scores
from sl_jax.flow.sampler import initial_noise
from sl_jax.imaging import recompose
from sl_jax.inference.decomposer import Decomposer, DecompositionError, PictureDecomposer
from sl_jax.inference.prompts import DEFAULT_PROMPT, PromptEmbeddings, encode_prompts
from sl_jax.models.lora import Adapter, LoRAConfig, init_adapter
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipeline(random_checkpoint):
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    return load_pipeline(random_checkpoint, ComputeConfig("float32"), layout)


@pytest.fixture(scope="module")
def decomposer(pipeline):
    """Pictures, prompts and keys → layers."""
    decompose = Decomposer(pipeline)
    return lambda *args, **settings: decompose(*args, **settings).layers


def random_inputs(count, height, width, words=5):
    draw = np.random.default_rng(count * height + width)
    pictures = draw.integers(0, 256, (count, height, width, 3), np.uint8)
    text = draw.normal(size=(count, words, 64)).astype(np.float32)
    return pictures, text, jax.random.split(jax.random.key(7), count)


def assert_alike(found, wanted, levels):
    found, wanted = np.asarray(found, int), np.asarray(wanted, int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= levels


def test_layers_depend_on_their_own_picture_prompt_and_key_alone(decomposer):
    pictures, text, keys = random_inputs(3, 16, 32)
    lengths = np.array([2, 5, 3])
    settings = {"layers": 2, "steps": 2, "method": "heun"}
    together = np.asarray(decomposer(pictures, text, lengths, keys, **settings))
    assert together.shape == (3, 2, 16, 32, 4) and together.dtype == np.uint8
    # In another order, with other companions, and with something else behind the prompt's end.
    order = [2, 0, 1]
    text = np.where((np.arange(5) < lengths[:, None])[..., None], text, 9.0).astype(np.float32)
    again = decomposer(
        pictures[order], text[order], lengths[order], keys[jnp.array(order)], **settings
    )
    assert_alike(again, together[order], 1)
    others = decomposer(pictures, text, lengths, keys[::-1], **settings)
    assert np.abs(np.asarray(others, int) - together).max() > 10


def test_layers_that_are_not_finite_are_told_apart(pipeline):
    """The others are what they are without them; shown are transparent ones, or none at all."""
    pictures, text, keys = random_inputs(3, 16, 32)
    lengths, settings = np.array([2, 5, 3]), {"layers": 2, "steps": 2, "method": "heun"}
    decompose = Decomposer(pipeline)
    whole = decompose(pictures, text, lengths, keys, **settings)
    # A copy: JAX may still be reading the array that it was given.
    spoiled_text = text.copy()
    spoiled_text[1, 0, 0] = np.nan
    found = decompose(pictures, spoiled_text, lengths, keys, **settings)
    assert np.array_equal(whole.finite, [True] * 3)
    assert np.array_equal(found.finite, [True, False, True])
    assert not np.any(np.asarray(found.layers)[1])
    assert np.array_equal(found.layers[::2], whole.layers[::2])
    hidden = np.full((2, 3, 64), np.nan, np.float32)
    prompts = PromptEmbeddings(hidden, np.array([3, 3]))
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    spoiled = PictureDecomposer(decompose, prompts, None, layout)
    picture = Image.fromarray(pictures[0])
    with pytest.raises(DecompositionError, match=r"^1 of 1 pictures: .* not finite"):
        spoiled(picture, layers=1, steps=1, size=32)


@pytest.mark.slow
def test_a_picture_alone_gives_what_it_gives_in_a_batch(decomposer):
    pictures, text, keys = random_inputs(3, 16, 32)
    settings = {"layers": 1, "steps": 3, "method": "euler"}
    together = decomposer(pictures, text, None, keys, **settings)
    for row in (slice(0, 1), slice(2, 3)):
        alone = decomposer(pictures[row], text[row], None, keys[row], **settings)
        assert_alike(alone, together[row], 1)


def sampled_by_diffusers(peer, monkeypatch, picture, text, noise, layers, steps):
    """Layers of one picture in its own size, by diffusers' pipeline."""
    height, width, _ = picture.shape
    monkeypatch.setattr(
        pipeline_qwenimage_layered, "calculate_dimensions", lambda *_: (width, height)
    )
    peer.set_progress_bar_config(disable=True)
    alpha = np.full((height, width, 1), 255, np.uint8)
    images = peer(
        Image.fromarray(np.concatenate([picture, alpha], axis=-1)),
        prompt="in place of which the embeddings are taken",
        prompt_embeds=torch.from_numpy(text),
        true_cfg_scale=1.0,
        layers=layers,
        num_inference_steps=steps,
        latents=torch.from_numpy(np.array(noise)),
    ).images[0]
    return np.stack([np.asarray(image) for image in images])


def random_adapter(params):
    fresh = init_adapter(jax.random.key(0), params, LoRAConfig(4, 8.0))
    draw = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype), fresh.lora)
    return Adapter(lora, fresh.lora_scale)


@pytest.mark.parametrize(
    "adapted",
    [pytest.param(False, id="base"), pytest.param(True, id="adapter", marks=pytest.mark.slow)],
)
def test_layers_equal_diffusers(
    decomposer, pipeline, random_checkpoint, monkeypatch, tmp_path, adapted
):
    layers, steps = 3, 6
    pictures, text, keys = random_inputs(1, 48, 80)
    noise = initial_noise(keys, (layers + 1) * 3 * 5, 64)
    peer = QwenImageLayeredPipeline.from_pretrained(
        random_checkpoint, processor=None, dtype=torch.float32
    )
    adapter = random_adapter(pipeline.params) if adapted else None
    if adapted:
        save_peft(tmp_path, adapter, str(random_checkpoint))
        peer.transformer = PeftModel.from_pretrained(peer.transformer, tmp_path).merge_and_unload()
    wanted = sampled_by_diffusers(peer, monkeypatch, pictures[0], text, noise, layers, steps)
    np.testing.assert_allclose(
        pipeline.scheduler.sigmas(steps, 15), peer.scheduler.sigmas.numpy(), atol=1e-6
    )
    # The layers are no plain surfaces, and differ.
    assert wanted.shape == (layers, 48, 80, 4)
    assert wanted.std(axis=(1, 2)).min() > 5 and np.ptp(wanted.astype(int), axis=0).max() > 30
    settings = {"layers": layers, "steps": steps, "method": "euler"}
    found = decomposer(pictures, text, None, keys, adapter=adapter, **settings)
    assert_alike(found[0], wanted, 2)
    if adapted:
        base = decomposer(pictures, text, None, keys, **settings)
        assert np.abs(np.asarray(base[0], int) - wanted).max() > 10


@pytest.fixture(scope="module")
def tiny():
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    return load_pipeline(resolve_model("tiny"), ComputeConfig("float32", remat="none"), layout)


@pytest.fixture(scope="module")
def tiny_text():
    return encode_prompts(resolve_model("tiny"), [DEFAULT_PROMPT], dtype=np.float32).hidden


@pytest.mark.parametrize("family", ["A", "B"])
def test_layers_of_the_tiny_base_equal_diffusers(tiny, tiny_text, monkeypatch, family):
    picture = recompose(make_design(family, 11, 64, 3).layers)
    keys = jax.random.split(jax.random.key(3), 1)
    peer = QwenImageLayeredPipeline.from_pretrained(
        resolve_model("tiny"), processor=None, dtype=torch.float32
    )
    noise = initial_noise(keys, 4 * 16, 64)
    wanted = sampled_by_diffusers(peer, monkeypatch, picture, tiny_text, noise, 3, 10)
    settings = {"layers": 3, "steps": 10, "method": "euler"}
    found = Decomposer(tiny)(picture[None], tiny_text, None, keys, **settings).layers
    assert_alike(found[0], wanted, 2)


@pytest.mark.slow
def test_the_tiny_base_beats_every_baseline(tiny, tiny_text):
    designs = np.stack([make_design("A", seed, 64, 3).layers for seed in range(48)])
    pictures = np.stack([recompose(design) for design in designs])
    keys = jax.random.split(jax.random.key(0), len(designs))
    text = np.repeat(tiny_text, len(designs), axis=0)
    found = Decomposer(tiny)(pictures, text, None, keys, layers=3, steps=10, method="euler").layers

    def cost(stacks):
        scores = [layerd_scores(a, b, 0)[0].cost for a, b in zip(stacks, designs, strict=True)]
        return np.mean(scores)

    base = cost(np.asarray(found))
    for name, baseline in BASELINES.items():
        assert base < 0.8 * cost([baseline(picture, 3) for picture in pictures]), name
