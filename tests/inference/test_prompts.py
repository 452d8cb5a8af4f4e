"""Prompt embeddings against diffusers, their cache, and the tiny base's text encoder."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageLayeredPipeline
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.inference import DEFAULT_PROMPT, PROMPT_TEMPLATE, encode_prompts, prompts
from sl_jax.inference.tiny_text import make_tiny_text_encoder

torch.set_num_threads(1)

TINY = Path(prompts.__file__).parents[1] / "assets" / "tiny"
PROMPTS = [
    DEFAULT_PROMPT,
    "",
    "a poster, with «Grüße» and 图层 in red {braces} <|im_end|>",
    "\n\nstarts with newlines",
    "word " * 60,
]


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny base's text folders, to be changed."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY / part, tmp_path / "base" / part)
    return tmp_path / "base"


def _pipeline(folder):
    """diffusers' pipeline with nothing but the text part."""
    index = {
        "_class_name": "QwenImageLayeredPipeline",
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    }
    absent = {part: None for part in ("scheduler", "vae", "processor", "transformer")}
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    assert isinstance(pipeline, QwenImageLayeredPipeline)
    return pipeline


def _assert_equal_to_diffusers(folder):
    with torch.no_grad():
        states, mask = _pipeline(folder)._get_qwen_prompt_embeds(PROMPTS, device="cpu")
    found = encode_prompts(folder, PROMPTS, dtype=np.float32)
    assert found.lengths.tolist() == mask.sum(1).tolist()
    assert found.hidden.shape == states.shape
    np.testing.assert_allclose(found.hidden, states.numpy(), atol=1e-5, rtol=0)


def test_tiny_base_equals_diffusers(checkpoint):
    _assert_equal_to_diffusers(checkpoint)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_other_layouts_equal_diffusers(checkpoint, prefix):
    """Untied head, nested config, bfloat16 weights, either prefix of the tensor names."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**json.loads((checkpoint / "text_encoder/config.json").read_text()))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.text_config.initializer_range = 0.12
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    shutil.rmtree(checkpoint / "text_encoder")
    model.save_pretrained(checkpoint / "text_encoder", max_shard_size="200KB")
    files = sorted((checkpoint / "text_encoder").glob("*.safetensors"))
    assert len(files) > 1 and "text_config" in json.loads(
        (checkpoint / "text_encoder/config.json").read_text()
    )
    for file in [*files, checkpoint / "text_encoder/model.safetensors.index.json"]:
        _rename(file, prefix)
    _assert_equal_to_diffusers(checkpoint)


def _rename(file, prefix):
    def renamed(name):
        bare = name.replace("language_model.", "").removeprefix("model.")
        if bare.startswith(("lm_head", "visual")):
            return bare if prefix == "model." else name
        return prefix + bare

    if file.suffix == ".json":
        index = json.loads(file.read_text())
        index["weight_map"] = {renamed(k): v for k, v in index["weight_map"].items()}
        file.write_text(json.dumps(index))
    else:
        tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


def test_default_prompt_of_the_tiny_base():
    before = len(jax.live_arrays())
    found = encode_prompts(TINY, [DEFAULT_PROMPT], dtype=jnp.bfloat16)
    assert found.hidden.shape == (1, 11, 64) and found.hidden.dtype == jnp.bfloat16
    assert found.lengths.tolist() == [11] and found.lengths.dtype == np.int32
    assert 0.9 < np.square(found.hidden.astype(np.float32)).mean() < 1.1
    assert len(jax.live_arrays()) == before, "the encoder stayed on the devices"


def test_batches_and_truncation():
    """Thirteen prompts in two batches, cut to nine tokens, equal each of them alone and whole."""
    many = [f"{'very ' * (i % 5)}number {i}" for i in range(13)]
    found = encode_prompts(TINY, many, max_tokens=9, dtype=np.float32)
    assert found.hidden.shape == (13, 9, 64)
    chosen = [0, 4, 7, 8, 9, 12]
    whole = encode_prompts(TINY, [many[i] for i in chosen], dtype=np.float32)
    for i, states, length in zip(chosen, *whole, strict=True):
        kept = min(length, 9)
        assert found.lengths[i] == kept and not found.hidden[i, kept:].any()
        np.testing.assert_allclose(found.hidden[i, :kept], states[:kept], atol=1e-5)


def test_weights_are_spread_over_the_devices(monkeypatch):
    loaded = []
    load = prompts.load_params
    monkeypatch.setattr(
        prompts, "load_params", lambda *args: loaded.append(load(*args)) or loaded[-1]
    )
    encode_prompts(TINY, [""], dtype=np.float32)
    (params,) = loaded
    kernel = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape((2, 64, 64)) == (2, 64 // len(jax.local_devices()), 64)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.fixture
def encoded(monkeypatch):
    """Replaces the encoder by numbers that stand for prompts; lists what it was asked for."""
    asked = []

    def encode(folder, absent, max_tokens, dtype):
        if absent:
            asked.append(absent)
        for prompt in absent:
            yield prompt, np.full((len(prompt) + 1, 4), len(prompt) / 7).astype(dtype)

    monkeypatch.setattr(prompts, "_encode", encode)
    return asked


def test_cached_prompts_are_not_encoded_again(checkpoint, tmp_path, encoded):
    arguments = {"cache_dir": tmp_path / "cache", "dtype": jnp.bfloat16}
    first = encode_prompts(checkpoint, ["one", "", "one"], **arguments)
    again = encode_prompts(checkpoint, ["one", "", "one"], **arguments)
    assert encoded == [["one", ""]]
    np.testing.assert_array_equal(first.hidden, again.hidden)
    assert again.hidden.dtype == jnp.bfloat16 and again.lengths.tolist() == [4, 1, 4]
    moved = checkpoint.rename(tmp_path / "moved")
    (moved / "text_encoder/model.safetensors").touch()
    (moved / "text_encoder/model.safetensors").rename(moved / "text_encoder/other.safetensors")
    encode_prompts(moved, ["one", ""], **arguments)
    assert len(encoded) == 1
    encode_prompts(moved, ["one", "three"], **arguments)
    assert encoded[1:] == [["three"]]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("change", ["weight", "config", "tokenizer", "max_tokens", "dtype"])
def test_cache_follows_the_content(checkpoint, tmp_path, encoded, change):
    arguments = {"cache_dir": tmp_path / "cache", "max_tokens": 512, "dtype": np.float32}
    encode_prompts(checkpoint, [DEFAULT_PROMPT], **arguments)
    match change:
        case "weight":
            file = checkpoint / "text_encoder/model.safetensors"
            tensors = load_file(file)
            tensors["model.layers.1.self_attn.k_proj.bias"][3] += 1
            save_file(tensors, file)
        case "config":
            file = checkpoint / "text_encoder/config.json"
            file.write_text(file.read_text().replace("1e-06", "1e-05"))
        case "tokenizer":
            file = checkpoint / "tokenizer/tokenizer.json"
            file.write_text(file.read_text().replace('"NFC"', '"NFKC"'))
        case "max_tokens":
            arguments["max_tokens"] = 511
        case "dtype":
            arguments["dtype"] = jnp.bfloat16
    encode_prompts(checkpoint, [DEFAULT_PROMPT], **arguments)
    assert encoded == [[DEFAULT_PROMPT], [DEFAULT_PROMPT]]


def test_large_tensors_enter_the_fingerprint(checkpoint):
    before = prompts.fingerprint(checkpoint)
    file = checkpoint / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] *= np.float16(1.01)
    save_file(tensors, file)
    assert prompts.fingerprint(checkpoint) != before


def test_a_damaged_cache_file_is_replaced(tmp_path, encoded):
    arguments = {"cache_dir": tmp_path, "dtype": np.float32}
    expected = encode_prompts(TINY, [DEFAULT_PROMPT], **arguments)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.warns(UserWarning, match="is damaged"):
        found = encode_prompts(TINY, [DEFAULT_PROMPT], **arguments)
    np.testing.assert_array_equal(found.hidden, expected.hidden)
    assert file.read_bytes() == content and len(encoded) == 2


def test_any_number_of_prompts_is_encoded_in_steps_that_are_kept(tmp_path, monkeypatch):
    """The second of three batches fails: the first is on disk, and is not computed again."""
    many = [f"{'very ' * (i % 5)}number {i}" for i in range(20)] + ["word " * 60]
    batches = []
    loaded = prompts._loaded

    @contextmanager
    def failing(*arguments):
        with loaded(*arguments) as encode:

            def counted(tokens):
                batches.append(tokens.shape)
                if len(batches) == 2:
                    raise KeyboardInterrupt
                return encode(tokens)

            yield counted

    monkeypatch.setattr(prompts, "_loaded", failing)
    store = prompts.PromptStore(TINY, tmp_path, dtype=np.float32)
    with pytest.raises(KeyboardInterrupt):
        store.complete(many)
    assert len(list(tmp_path.iterdir())) == 8
    lengths = store.complete(many)
    # Rows of a batch are about as long as each other: one long prompt costs the others nothing.
    assert batches == [(8, 64), (8, 64), (8, 64), (8, 384)]
    whole = encode_prompts(TINY, many, dtype=np.float32)
    for prompt, states, length in zip(many, *whole, strict=True):
        assert lengths[prompt] == length
        np.testing.assert_allclose(store.read(prompt), states[:length], atol=1e-5)
    assert store.complete(many) == lengths and len(batches) == 4 + 3


def test_a_store_makes_a_damaged_file_again(tmp_path, encoded):
    store = prompts.PromptStore(TINY, tmp_path, dtype=np.float32)
    store.complete(["a prompt"])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.read("a prompt").shape == (9, 4)
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_warning(tmp_path, encoded):
    (tmp_path / "file").write_text("no folder")
    arguments = {"cache_dir": tmp_path / "file", "dtype": np.float32}
    with pytest.warns(UserWarning, match="'a prompt' is not kept: .*file"):
        found = encode_prompts(TINY, ["a prompt"], **arguments)
    assert found.lengths.tolist() == [9]


def test_where_prompts_are_kept_that_belong_to_no_run(monkeypatch):
    monkeypatch.delenv("SL_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(prompts.user_cache()) == "/home/someone/.cache/sl_jax/prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert str(prompts.user_cache()) == "/scratch/sl_jax/prompts"
    monkeypatch.setenv("SL_JAX_CACHE", "~/kept")
    assert str(prompts.user_cache()) == "/home/someone/kept/prompts"


class _Words:
    """A tokenizer whose tokens are the pieces between separators."""

    def __init__(self, separator, vocab_size):
        self.separator = separator
        self.vocab_size = vocab_size

    def encode(self, text):
        return text.split(self.separator)


def test_prefix_length_comes_from_the_tokenizer():
    tokenizer = prompts.load_tokenizer(TINY / "tokenizer")
    assert prompts.prefix_length(tokenizer) == 34
    assert prompts.prefix_length(_Characters(300)) == PROMPT_TEMPLATE.index("{}")
    with pytest.warns(UserWarning, match="but 34 with"):
        prompts.prefix_length(_Characters(151643))
    with pytest.raises(CheckpointError, match="merges the end"):
        prompts.prefix_length(_Words("\n", 300))


class _Characters(_Words):
    def __init__(self, vocab_size):
        super().__init__("", vocab_size)

    def encode(self, text):
        return list(text)


def test_tokenizer_needs_only_vocabulary_and_merges(checkpoint):
    full = prompts.load_tokenizer(checkpoint / "tokenizer")
    (checkpoint / "tokenizer/tokenizer.json").unlink()
    bare = prompts.load_tokenizer(checkpoint / "tokenizer")
    texts = [PROMPT_TEMPLATE.format(prompt) for prompt in PROMPTS]
    assert bare(texts)["input_ids"] == full(texts)["input_ids"]


@pytest.mark.parametrize(("count", "max_tokens"), [(0, 512), (1, 0), (1, 1025)])
def test_arguments_are_checked(count, max_tokens):
    with pytest.raises(ValueError, match="at least one prompt and max_tokens between 1 and 1024"):
        encode_prompts(TINY, ["x"] * count, max_tokens=max_tokens, dtype=np.float32)


def test_missing_parts_are_named(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer holds neither"):
        encode_prompts(tmp_path / "none", ["x"], dtype=np.float32)
    file = checkpoint / "text_encoder/config.json"
    config = json.loads(file.read_text())
    del config["num_key_value_heads"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: .*missing \['num_key_value_heads'\]"):
        encode_prompts(checkpoint, ["x"], dtype=np.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        encode_prompts(checkpoint, ["x"], dtype=np.float32)


def test_tiny_base_can_be_made_again(tmp_path):
    make_tiny_text_encoder(tmp_path)
    made, kept = (load_file(f / "text_encoder/model.safetensors") for f in (tmp_path, TINY))
    assert made.keys() == kept.keys()
    for name in made:
        np.testing.assert_array_equal(made[name], kept[name])
    for name in ("text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (tmp_path / name).read_text() == (TINY / name).read_text()
    files = [f for part in ("text_encoder", "tokenizer") for f in (TINY / part).iterdir()]
    assert sum(f.stat().st_size for f in files) < 400_000


def test_tiny_base_loads_completely_in_transformers():
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        TINY / "text_encoder", output_loading_info=True
    )
    assert not any(report.values())
    tokenizer = Qwen2Tokenizer.from_pretrained(TINY / "tokenizer")
    config = json.loads((TINY / "text_encoder/config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]
    text = "Any bytes: \x00 é 图 😀\n\n  end"
    assert tokenizer.decode(tokenizer.encode(text)) == text
