"""Which checkpoint tensor fills which parameter: one rule table per model.

A parameter's path mirrors the dotted name of its tensor. Three rules make one from the other:

1. list indices: `to_out.0` ↔ `to_out_0` (only for module lists named in the table);
2. the last part: Linear and Conv `weight` ↔ `kernel` (transposed), norm `weight` or `gamma` ↔
   `scale`, Embedding `weight` ↔ `embedding`;
3. stacked blocks: `transformer_blocks.{i}.attn…` ↔ `blocks/attn…` with a leading layer axis.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Path = tuple[str, ...]


class Source(NamedTuple):
    """The tensors behind one parameter.

    Attributes:
        names: checkpoint names; one per layer for a stacked parameter, else one.
        shape: shape of each of them in the checkpoint.
        layout: how a tensor becomes (a row of) the parameter; see `to_parameter`.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str


@dataclass(frozen=True)
class Naming:
    """The rule table of one model.

    Attributes:
        lists: names of module lists, whose indices stand behind a dot in the checkpoint.
        stacked: first path part → dotted name of the list whose items are stacked.
        gamma: names of norm modules whose weight is called gamma, with its trailing unit axes.
        flat_convolutions: convolution modules that are 2-D in the checkpoint too; every other
            4-axis kernel is the last temporal tap of a causal 3-D one.
        prefix: dotted prefix of every tensor.
    """

    lists: tuple[str, ...]
    stacked: Mapping[str, str] = field(default_factory=dict)
    gamma: Mapping[str, int] = field(default_factory=dict)
    flat_convolutions: tuple[str, ...] = ()
    prefix: str = ""

    def source(self, path: Path, shape: tuple[int, ...]) -> Source:
        """The tensors that fill the parameter at `path` of `shape`."""
        layers = shape[0] if path[0] in self.stacked else None
        row = shape if layers is None else shape[1:]
        leaf, tensor_shape, layout = self._leaf(path, row)
        template = ".".join([*map(self._dotted, path[:-1]), leaf])
        if layers is None:
            return Source((self.prefix + template,), tensor_shape, layout)
        head, _, tail = template.partition(".")
        names = tuple(f"{self.prefix}{self.stacked[head]}.{i}.{tail}" for i in range(layers))
        return Source(names, tensor_shape, layout)

    def module(self, path: Path) -> str:
        """Dotted module name of a path without its leaf; `{}` stands for the layer index."""
        dotted = ".".join(map(self._dotted, path))
        head, _, tail = dotted.partition(".")
        return f"{self.stacked[head]}.{{}}.{tail}" if head in self.stacked else dotted

    def _dotted(self, part: str) -> str:
        return re.sub(rf"^({'|'.join(self.lists)})_(\d+)$", r"\1.\2", part)

    def _leaf(self, path: Path, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], str]:
        module, leaf = path[-2], path[-1]
        if leaf == "kernel" and len(shape) == 2:
            return "weight", shape[::-1], "linear"
        if leaf == "kernel":
            height, width, inputs, outputs = shape
            if module in self.flat_convolutions:
                return "weight", (outputs, inputs, height, width), "conv2d"
            return "weight", (outputs, inputs, height, height, width), "conv3d"
        if leaf == "scale" and module in self.gamma:
            return "gamma", shape + (1,) * self.gamma[module], "gamma"
        if leaf in ("scale", "embedding"):
            return "weight", shape, "same"
        return leaf, shape, "same"


MMDIT = Naming(
    lists=("to_out", "net", "img_mod", "txt_mod"),
    stacked={"blocks": "transformer_blocks", "modulation": "transformer_blocks"},
)
VAE = Naming(
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "upsamplers", "resample"),
    gamma={"norm1": 3, "norm2": 3, "norm_out": 3, "norm": 2},
    flat_convolutions=("resample_1", "to_qkv", "proj"),
)
TEXT_ENCODER = Naming(lists=(), stacked={"layers": "layers"}, prefix="model.")


def to_parameter(tensor: np.ndarray, layout: str) -> np.ndarray:
    """A checkpoint tensor as (a row of) its parameter. Views where possible."""
    match layout:
        case "linear":
            return tensor.T
        case "conv2d":
            return tensor.transpose(2, 3, 1, 0)
        case "conv3d":
            return tensor[:, :, -1].transpose(2, 3, 1, 0)
        case "gamma":
            return tensor.reshape(-1)
    return tensor


def to_tensor(parameter: np.ndarray, source: Source) -> np.ndarray:
    """The inverse of `to_parameter`; temporal taps that one frame never reaches are zero."""
    match source.layout:
        case "linear":
            return parameter.T
        case "conv2d":
            return parameter.transpose(3, 2, 0, 1)
        case "conv3d":
            tensor = np.zeros(source.shape, parameter.dtype)
            tensor[:, :, -1] = parameter.transpose(3, 2, 0, 1)
            return tensor
    return parameter.reshape(source.shape)


def sources(
    naming: Naming, shapes: Mapping[Path, tuple[int, ...]]
) -> Iterator[tuple[Path, Source]]:
    """The tensors behind every parameter of a flattened tree of shapes, in sorted order."""
    for path in sorted(shapes):
        yield path, naming.source(path, shapes[path])
