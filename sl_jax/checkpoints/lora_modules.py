"""An adapter as PyTorch's files hold it, module by module, and as this package holds it, stacked.

PyTorch's files have two matrices for every adapted module, and each module may have its own rank
and alpha. `models.lora.Adapter` stacks the modules of all blocks for the scan. In the stack lower
ranks are padded with zeros to the largest, and the scale, alpha / r, of every module stands in
`lora_scale`; modules of a stack without an adapter have zeros and scale 0. All of it is exact, and
stays so in training: the gradient of padding is zero. Going back, padding is cut off again.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import Float32

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.safetensors_file import TensorFile
from sl_jax.models.lora import Adapter

PREFIXES = ("base_model.model.", "transformer.", "")
# Settings of PEFT that change what the two matrices mean, with their values at rest.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA …) change its weights.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_IDLE_CONFIGS = frozenset(
    {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
)
_REASONS = (
    ("lora_magnitude_vector", "DoRA's magnitudes"),
    ("dora_scale", "DoRA's magnitudes"),
    ("modules_to_save", "a module trained whole"),
    (".bias", "a bias"),
    ("lora_embedding_", "an adapted embedding"),
    (".lora_down.", "another naming: please load it in diffusers and save it from there"),
    (".lora_up.", "another naming: please load it in diffusers and save it from there"),
    (".alpha", "another naming: please load it in diffusers and save it from there"),
)
# What a pattern, and the name that it is matched with, may be so that matching ends: strangers
# write both.
_LONGEST_NAME, _LONGEST_PATTERN, _MOST_REPEATS = 128, 256, 3
_LARGEST = 1e30  # well within float32


class LoraModule(NamedTuple):
    """The adapter of one linear layer; its update of the weight is scale · up @ down.

    Attributes:
        down: lora_A.
        up: lora_B.
        scale: alpha / r; float32 at least in precision.
    """

    down: Float32[np.ndarray, "r i"]
    up: Float32[np.ndarray, "o r"]
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def alpha(self) -> float:
        """The shortest decimal whose alpha / r is `scale` in float32."""
        exact = float(np.float32(self.scale)) * self.rank
        for digits in range(18):
            rounded = round(exact, digits)
            if np.float32(rounded / self.rank) == np.float32(self.scale):
                return rounded
        return exact


Modules = Mapping[str, LoraModule]


def refuse(source: object, problems: Iterable[str]) -> None:
    """Raises CheckpointError with all problems of an adapter, if there are any."""
    listed = list(problems)
    if listed:
        raise CheckpointError(
            f"{source} cannot be used; please pass a plain PEFT LoRA of this base model:\n  "
            + "\n  ".join(listed)
        )


def pair_tensors(
    file: TensorFile, prefix: str, problems: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B of every module, in float32, by its dotted name without `prefix`.

    What is not one of two such matrices that fit each other goes to `problems`, by name.
    """
    problems += [f"{name} is of type {dtype}, not a float" for name, dtype in file.others.items()]
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in sorted(file.tensors.items()):
        module, _, leaf = name.removeprefix(prefix).rpartition(".lora_")
        if not (module and name.startswith(prefix) and leaf in ("A.weight", "B.weight")):
            reason = next((r for part, r in _REASONS if part in f".{name}"), "not known")
            problems.append(f"{name}: {reason}")
        elif len(module) > _LONGEST_NAME:
            problems.append(f"{module[:_LONGEST_NAME]}… is no name of a module")
        elif not np.isfinite(tensor).all():
            problems.append(f"{name} holds values that are not finite")
        else:
            pairs.setdefault(module, {})[leaf[0]] = tensor.astype(np.float32)
    for module, pair in pairs.items():
        problems += [f"{module} has no lora_{part}" for part in "AB" if part not in pair]
    whole = {m: (pair["A"], pair["B"]) for m, pair in pairs.items() if len(pair) == 2}
    if not pairs:
        problems.append("it holds no lora_A and lora_B")
    fitting = {}
    for module, (down, up) in whole.items():
        if down.ndim == up.ndim == 2 and len(down) == up.shape[1] > 0:
            fitting[module] = (down, up)
        else:
            problems.append(f"{module}: lora_A {down.shape} and lora_B {up.shape} do not fit")
    return fitting


def find_prefix(names: Iterable[str]) -> str:
    """The prefix that most tensor names have: PEFT's, diffusers', or none."""
    listed = list(names)
    counts = {p: sum(n.startswith(p) for n in listed) for p in PREFIXES if p}
    best = max(counts, key=lambda prefix: counts[prefix])
    return best if counts[best] else ""


def check_settings(settings: Mapping[str, Any], problems: list[str]) -> None:
    """Puts into `problems` what a PEFT configuration asks for beyond a plain LoRA."""
    wrong = {
        name: value
        for name, value in settings.items()
        if (name in _PLAIN and value not in (_PLAIN[name], None, []))
        or (name == "init_lora_weights" and value not in _HARMLESS_INITS)
        or (name.startswith("use_") and name not in ("use_rslora", *_PLAIN) and value)
        or (name.endswith("_config") and name not in _IDLE_CONFIGS and value)
    }
    problems += [f"{ {name: value} } is not supported" for name, value in wrong.items()]
    problems += [
        f"{name} is {settings.get(name)!r}, not a positive number"
        for name in ("r", "lora_alpha")
        if not _is_number(settings.get(name)) or (name == "r" and settings["r"] < 1)
    ]
    for table in ("rank_pattern", "alpha_pattern"):
        _check_patterns(table, settings.get(table) or {}, problems)


def _check_patterns(table: str, patterns: Any, problems: list[str]) -> None:
    if not isinstance(patterns, Mapping):
        problems.append(f"{table} is {patterns!r}, not a table")
        return
    for pattern, value in patterns.items():
        if wrong := _wrong_pattern(pattern):
            problems.append(f"{table}: {pattern[:_LONGEST_PATTERN]!r} {wrong}")
        if not _is_number(value):
            problems.append(f"{table}: {pattern!r} has {value!r}, not a number")


def _wrong_pattern(pattern: str) -> str:
    """Why module names are not matched with a pattern; "" if they are."""
    if len(pattern) > _LONGEST_PATTERN:
        return f"has more than {_LONGEST_PATTERN} letters"
    if sum(map(pattern.count, "*+?{")) > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        return f"repeats groups, or more than {_MOST_REPEATS} things, which may take for ever"
    try:
        re.compile(_anywhere(pattern))
    except (re.error, OverflowError) as error:
        return f"is no regular expression: {error}"
    return ""


def _anywhere(pattern: str) -> str:
    """A pattern as PEFT applies it: to the end of a module's name, from any dot on."""
    return rf"(.*\.)?({pattern})$"


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -_LARGEST < value < _LARGEST


def with_scales(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Mapping[str, Any],
    problems: list[str],
) -> dict[str, LoraModule]:
    """Modules with the scales that a PEFT configuration gives them.

    alpha / r, or alpha / √r with `use_rslora`, where `alpha_pattern` may name another alpha by a
    regular expression over module names, and r is the rank of the tensors. Settings that tell
    another rank, with which PEFT would not load the tensors, go to `problems`, by module.
    """
    modules = {}
    for name, (down, up) in pairs.items():
        rank = len(down)
        told = _setting(settings, "rank_pattern", "r", name)
        if told != rank:
            problems.append(f"{name} has rank {rank}, but the settings tell {told}")
        alpha = _setting(settings, "alpha_pattern", "lora_alpha", name)
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        modules[name] = LoraModule(down, up, float(alpha) / divisor)
    return modules


def _setting(settings: Mapping[str, Any], table: str, default: str, module: str) -> float:
    for pattern, value in (settings.get(table) or {}).items():
        if re.match(_anywhere(pattern), module):
            return value
    return settings[default]


def to_adapter(modules: Modules, params: Mapping[str, Any], problems: list[str]) -> Adapter:
    """Stacks modules as an adapter of the model that `params` belong to.

    Args:
        modules: by dotted name.
        params: parameters of the base, or their shapes.
        problems: gets what does not fit the model.

    Returns:
        float32 arrays on the host; `checkpoints.pipeline.shard_adapter` puts them in place.
    """
    left = dict(modules)
    lora: dict[tuple[str, ...], np.ndarray] = {}
    scales: dict[tuple[str, ...], np.ndarray] = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
        if path[-1] != "kernel":
            continue
        template, (*stacked, inputs, outputs) = MMDIT.module(path[:-1]), kernel.shape
        names = [template.format(layer) for layer in range(*(stacked or [1]))]
        found = {i: left.pop(name) for i, name in enumerate(names) if name in left}
        unfit = [i for i, m in found.items() if (*m.down.shape[1:], len(m.up)) != (inputs, outputs)]
        problems += [
            f"{names[i]} has lora_A {found[i].down.shape} and lora_B {found[i].up.shape}, "
            f"but the model's layer maps {inputs} to {outputs}"
            for i in unfit
        ]
        if found and not unfit:
            here = slice(None) if stacked else 0
            a, b, scale = _stacked(found, len(names), inputs, outputs)
            lora[(*path[:-1], "a")], lora[(*path[:-1], "b")] = a[here], b[here]
            scales[(*path[:-1], "scale")] = np.asarray(scale[here])
    if left:
        problems.append(f"modules that the model does not have: {', '.join(sorted(left))}")
    return Adapter(traverse_util.unflatten_dict(lora), traverse_util.unflatten_dict(scales))


def _stacked(
    found: Mapping[int, LoraModule], layers: int, inputs: int, outputs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rank = max(module.rank for module in found.values())
    a = np.zeros((layers, inputs, rank), np.float32)
    b = np.zeros((layers, rank, outputs), np.float32)
    scale = np.zeros(layers, np.float32)
    for layer, module in found.items():
        a[layer, :, : module.rank], b[layer, : module.rank] = module.down.T, module.up.T
        scale[layer] = module.scale
    return a, b, scale


def stack_size(adapter: Adapter) -> int | None:
    """Number of blocks of the model, where the adapter targets any of their modules."""
    leaves = traverse_util.flatten_dict(adapter.lora).values()
    return next((leaf.shape[0] for leaf in leaves if leaf.ndim == 3), None)


def to_modules(adapter: Adapter) -> dict[str, LoraModule]:
    """The inverse of `to_adapter`.

    Rank components whose two vectors are zero are padding and are left out, and so are modules of
    zeros with scale 0.
    """
    weights = traverse_util.flatten_dict(adapter.lora)
    scales = traverse_util.flatten_dict(adapter.lora_scale)
    modules = {}
    for path in sorted({p[:-1] for p in weights}):
        a, b = (np.asarray(weights[(*path, leaf)], np.float32) for leaf in "ab")
        scale = np.asarray(scales[(*path, "scale")], np.float32)
        if a.ndim == 2:
            modules[MMDIT.module(path)] = _module(a, b, scale, a.shape[1])
            continue
        ranks = [_rank(*pair) for pair in zip(a, b, strict=True)]
        for layer, rank in enumerate(ranks):
            if rank or scale[layer]:
                used = rank if rank and max(ranks) == a.shape[2] else a.shape[2]
                module = _module(a[layer], b[layer], scale[layer], used)
                modules[MMDIT.module(path).format(layer)] = module
    return modules


def _rank(a: np.ndarray, b: np.ndarray) -> int:
    used = np.flatnonzero(a.any(0) | b.any(1))
    return int(used[-1]) + 1 if used.size else 0


def _module(a: np.ndarray, b: np.ndarray, scale: np.ndarray, rank: int) -> LoraModule:
    down, up = np.ascontiguousarray(a[:, :rank].T), np.ascontiguousarray(b[:rank].T)
    return LoraModule(down, up, float(scale))
