"""The prompts of a run: memory holds what a batch needs, whatever the number of captions."""

import weakref

import numpy as np

from sl_jax.checkpoints.source import resolve_model
from sl_jax.data import Bucket, Example
from sl_jax.grpo.config import DataConfig
from sl_jax.grpo.prompts import PromptTable
from sl_jax.inference import encode_prompts, prompts
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

TINY = resolve_model("tiny")
CONFIG = DataConfig(path="", prompt="a prompt")


def example(caption: str) -> Example:
    return Example(np.zeros((0, 0, 3), np.uint8), caption, "", "", 3, Bucket(16, 16), 0, 0)


def test_batches_have_the_width_of_the_run(tmp_path):
    captions = ["a longer caption of something", "", "short"]
    table = PromptTable(TINY, CONFIG, captions, tmp_path, "float32")
    whole = encode_prompts(TINY, [captions[0], "a prompt", "short"], dtype=np.float32)
    hidden, lengths = table([example(caption) for caption in captions])
    assert lengths.tolist() == whole.lengths.tolist()
    np.testing.assert_allclose(hidden, whole.hidden, atol=1e-5)
    hidden, _ = table([example("short")])
    assert hidden.shape == (1, whole.lengths[0], 64) and not hidden[0, whole.lengths[2] :].any()


def test_a_run_without_captions_pads_nothing(tmp_path):
    table = PromptTable(TINY, CONFIG, ["", ""], tmp_path, "float32")
    assert len(list(tmp_path.iterdir())) == 1
    hidden, lengths = table([example(""), example("")])
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert lengths is None and hidden[0].any()


def test_guidance_leads_away_from_a_prompt_of_its_own(tmp_path):
    layout = Layout(make_mesh(MeshConfig()))
    table = PromptTable(TINY, CONFIG, [], tmp_path, "float32", "a prompt of some length")
    whole = encode_prompts(TINY, ["a prompt of some length", "a prompt"], dtype=np.float32)
    guidance = table.guidance(3.0, layout)
    assert guidance.scale == 3 and guidance.text_lengths is None and guidance.normalize
    np.testing.assert_allclose(guidance.text[0], whole.hidden[0], atol=1e-5)
    # Batches are no wider for it.
    hidden, lengths = table([example("")])
    assert hidden.shape[1] == whole.lengths[1] and lengths is None
    assert PromptTable(TINY, CONFIG, [], tmp_path, "float32").guidance(1.0, layout) is None


def test_memory_does_not_grow_with_the_number_of_captions(tmp_path, monkeypatch):
    made, alive = [], []

    def encode(folder, absent, max_tokens, dtype):
        prefix, rows = prompts._tokenized(folder, absent, max_tokens)
        for prompt, row in zip(absent, rows, strict=True):
            states = np.ones((len(row) - prefix, 8), dtype)
            made.append(weakref.ref(states))
            alive.append(sum(ref() is not None for ref in made))
            yield prompt, states

    monkeypatch.setattr(prompts, "_encode", encode)
    captions = [f"caption number {i}" for i in range(100)]
    table = PromptTable(TINY, CONFIG, captions, tmp_path, "float32")
    assert len(made) == 101 and max(alive) <= 2
    assert sum(ref() is not None for ref in made) == 0
    table([example(caption) for caption in captions])
    assert table._batches._read.cache_info().currsize <= 64
