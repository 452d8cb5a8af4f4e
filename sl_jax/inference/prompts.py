"""Prompts as hidden states of the text encoder, computed once and kept on disk.

Behaviour of `_get_qwen_prompt_embeds` in diffusers' Qwen-Image pipelines: the prompt is set into a
template, and of the hidden states after the last norm only those of the template's beginning are
dropped. The encoder lives no longer than the call; nothing of it stays in memory.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int32
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm import tqdm

from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.disk import write_whole
from sl_jax.checkpoints.huggingface import CheckpointError, TensorFiles, load_params, read_config
from sl_jax.checkpoints.naming import TEXT_ENCODER
from sl_jax.inference.fingerprints import add_tensors
from sl_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DEFAULT_PROMPT = "a clean, well composed image"

CACHE_VARIABLE = "SL_JAX_CACHE"

_REAL_VOCABULARY = 151643
_REAL_PREFIX = 34
_MAX_TOKENS = 1024
_BATCH = 8
_HELD = 64  # Prompts of a run that stay in memory: one without captions reads its only one once.
_TOKENIZED = 1000
_WIDTH = 64  # Prompts are padded to multiples of it, so that few programs serve all lengths.
_UNUSED = ("visual.", "lm_head.", "rotary_emb.")


class PromptEmbeddings(NamedTuple):
    """Hidden states of P prompts, on the host.

    Attributes:
        hidden: one row of S vectors per prompt, zero beyond its length; S is the longest length.
        lengths: valid vectors per prompt, at least 1.
    """

    hidden: Float[np.ndarray, "p s e"]
    lengths: Int32[np.ndarray, " p"]


def user_cache() -> epath.Path:
    """Where prompts are kept that belong to no run: `prompts` in the folder SL_JAX_CACHE.

    Without that variable the folder is `sl_jax` in XDG_CACHE_HOME, or in ~/.cache.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return epath.Path(named).expanduser() / "prompts"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return epath.Path(home).expanduser() / "sl_jax" / "prompts"


def encode_prompts(
    checkpoint: epath.PathLike,
    prompts: Sequence[str],
    *,
    max_tokens: int = 512,
    cache_dir: epath.PathLike | None = None,
    dtype: Any,
) -> PromptEmbeddings:
    """Encodes prompts with `checkpoint/tokenizer` and `checkpoint/text_encoder`.

    The weights are spread over the devices of this process while it computes, and freed before it
    returns. What is in the cache is not computed again; if all is, no weights are loaded.

    Args:
        checkpoint: folder in the diffusers layout, local or remote.
        prompts: at least one; equal ones are encoded once.
        max_tokens: tokens kept per prompt (suffix of the template included), 1 to 1024.
        cache_dir: folder for hidden states, one file per prompt, named by the content of prompt,
            template, tokenizer and weights (see `user_cache` for one that runs share); None keeps
            nothing. A folder that cannot be written is warned of.
        dtype: of weights, computation and result.

    Raises:
        CheckpointError: tokenizer or text encoder are missing or do not fit their config.
        ValueError: no prompts, or `max_tokens` out of range.
    """
    _check(prompts, max_tokens)
    folder, dtype = epath.Path(checkpoint), np.dtype(dtype)
    cache = None if cache_dir is None else _Cache(folder, cache_dir, max_tokens, dtype)
    hidden = {prompt: cache.read(prompt) if cache else None for prompt in prompts}
    absent = [prompt for prompt, states in hidden.items() if states is None]
    for prompt, states in _encode(folder, absent, max_tokens, dtype) if absent else ():
        hidden[prompt] = states
        if cache:
            try:
                cache.write(prompt, states)
            except OSError as error:
                warnings.warn(f"{prompt!r} is not kept: {error}", stacklevel=2)
    rows = [hidden[prompt] for prompt in prompts]
    return _padded(rows, max(map(len, rows)))


class PromptStore:
    """Any number of prompts as hidden states on disk, of which memory holds what is read.

    Arguments and errors are those of `encode_prompts`; here the folder has to be writable.
    """

    def __init__(
        self,
        checkpoint: epath.PathLike,
        cache_dir: epath.PathLike,
        *,
        max_tokens: int = 512,
        dtype: Any,
    ):
        self._checkpoint = epath.Path(checkpoint)
        self._max_tokens = max_tokens
        self._dtype = np.dtype(dtype)
        self._cache = _Cache(self._checkpoint, cache_dir, max_tokens, self._dtype)

    def complete(self, prompts: Sequence[str]) -> dict[str, int]:
        """Encodes what is absent; interrupted, it loses the few prompts in work.

        Returns:
            Number of valid vectors of each prompt.

        Raises:
            OSError: the folder cannot be written.
        """
        _check(prompts, self._max_tokens)
        absent = self._cache.absent(prompts)
        for prompt, states in _encode(self._checkpoint, absent, self._max_tokens, self._dtype):
            self._cache.write(prompt, states)
        prefix, rows = _tokenized(self._checkpoint, prompts, self._max_tokens)
        return {prompt: len(row) - prefix for prompt, row in zip(prompts, rows, strict=True)}

    def read(self, prompt: str) -> Float[np.ndarray, "s e"]:
        """Hidden states of a prompt that `complete` was given.

        A file that is damaged or gone is made again, which warns.
        """
        states = self._cache.read(prompt)
        if states is None:
            [(_, states)] = _encode(self._checkpoint, [prompt], self._max_tokens, self._dtype)
            self._cache.write(prompt, states)
        return states


class PromptBatches:
    """The prompts of a run, batch by batch as hidden states.

    They are on disk; memory holds the lengths, and what the last few batches needed.

    Attributes:
        padded: whether a row of some batch is.
    """

    def __init__(self, store: PromptStore, prompts: Sequence[str]):
        """`prompts` are all that batches are made of; what the store lacks is encoded."""
        lengths = store.complete(prompts)
        self._read = functools.lru_cache(_HELD)(store.read)
        self._width = max(lengths.values())  # of all batches, so that one program serves them
        self.padded = min(lengths.values()) < self._width

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """A row for each prompt, as wide as the longest of the run."""
        return _padded([self._read(prompt) for prompt in prompts], self._width)


def _check(prompts: Sequence[str], max_tokens: int) -> None:
    if not prompts or not 1 <= max_tokens <= _MAX_TOKENS:
        raise ValueError(
            f"please pass at least one prompt and max_tokens between 1 and {_MAX_TOKENS}, "
            f"not {len(prompts)} prompts and {max_tokens}"
        )


def _padded(rows: Sequence[np.ndarray], width: int) -> PromptEmbeddings:
    lengths = np.array([len(row) for row in rows], np.int32)
    hidden = np.zeros((len(rows), width, rows[0].shape[1]), rows[0].dtype)
    for target, row in zip(hidden, rows, strict=True):
        target[: len(row)] = row
    return PromptEmbeddings(hidden, lengths)


def _encode(
    folder: epath.Path, prompts: Sequence[str], max_tokens: int, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Each prompt with its hidden states, without prefix and padding, shortest prompts first."""
    if not prompts:
        return
    prefix, rows = _tokenized(folder, prompts, max_tokens)
    batch = min(_BATCH, len(rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    with (
        _loaded(folder / "text_encoder", dtype) as encode,
        tqdm(total=len(rows), desc="prompts", unit="prompt", delay=2.0) as progress,
    ):
        for start in range(0, len(rows), batch):
            chosen = order[start : start + batch]
            width = math.ceil(len(rows[chosen[-1]]) / _WIDTH) * _WIDTH
            tokens = np.zeros((batch, width), np.int32)
            for target, row in zip(tokens, chosen, strict=False):
                target[: len(rows[row])] = rows[row]
            for row, states in zip(chosen, encode(tokens), strict=False):
                yield prompts[row], states[prefix : len(rows[row])].copy()
            progress.update(len(chosen))


def _tokenized(
    folder: epath.Path, prompts: Sequence[str], max_tokens: int
) -> tuple[int, list[Int32[np.ndarray, " s"]]]:
    """Length of the template's beginning, and the tokens of each prompt in the template."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    prefix = prefix_length(tokenizer)
    texts = [PROMPT_TEMPLATE.format(prompt) for prompt in prompts]
    # Attention is causal: what is cut off after encoding may as well be cut off before.
    return prefix, [
        np.array(row[: prefix + max_tokens], np.int32)
        for start in range(0, len(texts), _TOKENIZED)
        for row in tokenizer(texts[start : start + _TOKENIZED])["input_ids"]
    ]


def load_tokenizer(folder: epath.PathLike) -> Any:
    """The Qwen2 tokenizer in `folder`, local or remote, read from its files alone.

    Raises:
        CheckpointError: the folder holds no tokenizer.
    """
    from transformers import Qwen2Tokenizer

    folder = epath.Path(folder)
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise CheckpointError(
            f"{folder} holds neither tokenizer.json nor vocab.json; please pass a checkpoint in "
            "the diffusers folder layout, with its tokenizer/"
        )
    with tempfile.TemporaryDirectory() as local:
        if is_remote(folder):
            for file in folder.iterdir():
                if not file.is_dir():
                    epath.Path(local, file.name).write_bytes(file.read_bytes())
            folder = epath.Path(local)
        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)


def prefix_length(tokenizer: Any) -> int:
    """Tokens of the template before the prompt, as `tokenizer` counts them.

    Warns if they are not 34 with a vocabulary of the real size: then this is another tokenizer than
    the one the model was trained with.

    Raises:
        CheckpointError: the tokenizer merges the end of the prefix with a prompt.
    """
    prefix = tokenizer.encode(PROMPT_TEMPLATE.partition("{}")[0])
    whole = tokenizer.encode(PROMPT_TEMPLATE.format(DEFAULT_PROMPT))
    if whole[: len(prefix)] != prefix:
        raise CheckpointError(
            "the tokenizer merges the end of the prompt template with the prompt, so that the "
            "template cannot be cut off; please use the Qwen2 tokenizer of the checkpoint"
        )
    if tokenizer.vocab_size >= _REAL_VOCABULARY and len(prefix) != _REAL_PREFIX:
        warnings.warn(
            f"the prompt template has {len(prefix)} tokens before the prompt, but {_REAL_PREFIX} "
            "with Qwen2.5-VL's tokenizer; please check that tokenizer/ belongs to this checkpoint",
            stacklevel=2,
        )
    return len(prefix)


@contextmanager
def _loaded(folder: epath.Path, dtype: np.dtype) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """The encoder as a function of tokens; its arrays are deleted on leaving."""
    try:
        config = TextEncoderConfig.from_dict(read_config(folder))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    model = TextEncoder(config, dtype=dtype, param_dtype=dtype)
    with TensorFiles(folder) as files:
        nested = "model.language_model.norm.weight" in files
    naming = dataclasses.replace(
        TEXT_ENCODER, prefix="model.language_model." if nested else TEXT_ENCODER.prefix
    )
    params = load_params(folder, naming, _abstract(model), _UNUSED)
    encode = jax.jit(model.apply)
    try:
        yield lambda tokens: np.asarray(encode({"params": params}, tokens))
    finally:
        for leaf in jax.tree.leaves(params):
            leaf.delete()


def _abstract(model: TextEncoder) -> dict[str, Any]:
    """Shapes of the parameters, their input features spread over the devices of this process."""
    layout = Layout(make_mesh(MeshConfig(), jax.local_devices()))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return layout.abstract(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def fingerprint(checkpoint: epath.PathLike) -> str:
    """A hash of what decides a prompt's hidden states: tokenizer, config and weights.

    It depends on content alone, not on times, paths or how weights are split into files, of which
    samples are read (`fingerprints.add_tensors`).

    Raises:
        CheckpointError: files are missing or damaged.
    """
    folder = epath.Path(checkpoint)
    digest = hashlib.sha256()
    texts = [folder / "text_encoder" / "config.json"]
    if (folder / "tokenizer").exists():
        texts += sorted((folder / "tokenizer").iterdir())
    for file in texts:
        if file.exists() and not file.is_dir():
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    with TensorFiles(folder / "text_encoder") as tensors:
        used = (n for n in tensors.names() if not any(part in n for part in _UNUSED))
        add_tensors(digest, tensors, used)
    return digest.hexdigest()


class _Cache:
    """Hidden states on disk, one safetensors file per prompt; float32 holds every dtype exactly."""

    def __init__(
        self,
        checkpoint: epath.Path,
        folder: epath.PathLike,
        max_tokens: int,
        dtype: np.dtype,
    ):
        self._folder = epath.Path(folder)
        self._key = json.dumps((PROMPT_TEMPLATE, max_tokens, dtype.name, fingerprint(checkpoint)))
        self._dtype = dtype

    def _path(self, prompt: str) -> epath.Path:
        name = hashlib.sha256(json.dumps([self._key, prompt]).encode()).hexdigest()
        return self._folder / f"{name}.safetensors"

    def absent(self, prompts: Sequence[str]) -> list[str]:
        """The prompts without a file, each once; the folder is listed, not asked for each."""
        there = {path.name for path in self._folder.iterdir()} if self._folder.exists() else ()
        return [p for p in dict.fromkeys(prompts) if self._path(p).name not in there]

    def read(self, prompt: str) -> np.ndarray | None:
        """Hidden states of `prompt`; None if absent, or damaged, which warns."""
        path = self._path(prompt)
        if not path.exists():
            return None
        try:
            return load(path.read_bytes())["hidden"].astype(self._dtype)
        except (SafetensorError, KeyError, OSError) as error:
            warnings.warn(f"{path} is damaged ({error}); encoding {prompt!r} again", stacklevel=4)
            path.unlink(missing_ok=True)
            return None

    def write(self, prompt: str, hidden: np.ndarray) -> None:
        content = save({"hidden": hidden.astype(np.float32)}, {"prompt": prompt})
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(prompt), content, shared=True)
