"""The tiny base's tokenizer and text encoder, made from nothing.

Both are of the real classes and in the real files, so that they go through the same code as
Qwen2.5-VL-7B here and in PyTorch. The weights are random: prompts are told apart, but mean nothing.
Every word of the prompt template is one token, as in the real vocabulary, so that the template's
prefix has its 34 tokens here too and pipelines that count on this number work.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sl_jax.checkpoints.huggingface import named_tensors, save_params
from sl_jax.checkpoints.naming import TEXT_ENCODER
from sl_jax.inference.prompts import DEFAULT_PROMPT, PROMPT_TEMPLATE
from sl_jax.models.text_encoder import TextEncoder, TextEncoderConfig

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_MAX_MERGES = 1024  # More than the texts below have: every word ends as one token.
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [0],
    "tokens_per_second": 2,
    "hidden_act": "silu",
    "model_type": "qwen2_5_vl",
}


def make_tiny_text_encoder(folder: Path | str, seed: int = 0) -> None:
    """Writes `folder/tokenizer` and `folder/text_encoder`, under 1 MB together.

    The same seed gives the same files. Weights are float16: hidden size 64, two layers and one
    block of vision tower. Hidden states have unit mean square.
    """
    folder = Path(folder)
    ids = _write_tokenizer(folder / "tokenizer")
    config = _config(ids)
    generator = np.random.default_rng(seed)
    tensors = dict(_language_tensors(TextEncoderConfig.from_dict(config), generator))
    tensors |= _vision_tensors(generator)
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_params(folder / "text_encoder", tensors, config, stem="model")


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """Writes a byte-level BPE with merges learnt from our own prompts; returns all ids."""
    from transformers import Qwen2Tokenizer

    texts = [PROMPT_TEMPLATE.format(DEFAULT_PROMPT)]
    for token in _SPECIAL_TOKENS:
        texts = [part for text in texts for part in text.split(token)]
    learnt = Qwen2Tokenizer().train_new_from_iterator(texts, 256 + _MAX_MERGES, show_progress=False)
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    words = [w for w in sorted(model["vocab"], key=model["vocab"].get) if w not in _SPECIAL_TOKENS]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL_TOKENS)})

    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: len(vocab) + number for number, token in enumerate(_SPECIAL_TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    )
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str() + "\n")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(ids))
    return vocab | ids


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": token, **flags, "special": True} for token, i in ids.items()}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": list(_SPECIAL_TOKENS[1:]),
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "split_special_tokens": False,
        "unk_token": None,
    }


def _config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": -(-len(ids) // 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": _VISION,
    }


def _language_tensors(
    config: TextEncoderConfig, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    abstract = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), tokens)["params"]
    flat = traverse_util.flatten_dict(nn.meta.unbox(abstract))
    params = {path: _draw(path[-1], flat[path].shape, generator) for path in sorted(flat)}
    return named_tensors(TEXT_ENCODER, traverse_util.unflatten_dict(params))


def _draw(leaf: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Unit-variance kernels and embeddings, small biases, norms of one."""
    if leaf == "scale":
        return np.ones(shape)
    deviation = {"kernel": shape[max(len(shape) - 2, 0)] ** -0.5, "bias": 0.1}.get(leaf, 1.0)
    return generator.standard_normal(shape) * deviation


def _vision_tensors(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The vision tower, which only the PyTorch class needs."""
    width, inner = _VISION["hidden_size"], _VISION["intermediate_size"]
    merged = width * _VISION["spatial_merge_size"] ** 2
    patch = (3, _VISION["temporal_patch_size"], _VISION["patch_size"], _VISION["patch_size"])
    block = "visual.blocks.0."
    linears = {
        f"{block}attn.qkv": (3 * width, width),
        f"{block}attn.proj": (width, width),
        f"{block}mlp.gate_proj": (inner, width),
        f"{block}mlp.up_proj": (inner, width),
        f"{block}mlp.down_proj": (width, inner),
        "visual.merger.mlp.0": (merged, merged),
        "visual.merger.mlp.2": (_VISION["out_hidden_size"], merged),
    }
    tensors = {"visual.patch_embed.proj.weight": generator.standard_normal((width, *patch)) * 0.03}
    for name, shape in linears.items():
        tensors[f"{name}.weight"] = generator.standard_normal(shape) * shape[1] ** -0.5
        tensors[f"{name}.bias"] = np.zeros(shape[0])
    for name in (f"{block}norm1", f"{block}norm2", "visual.merger.ln_q"):
        tensors[f"{name}.weight"] = np.ones(width)
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
