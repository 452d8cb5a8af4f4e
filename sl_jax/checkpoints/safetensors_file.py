"""Single safetensors files, with the metadata in their headers and 16-bit floats.

For adapters, which are small and may lie on a remote store, and for rewriting the shards of a large
model tensor by tensor. Whole component folders are `checkpoints.huggingface`'s.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from sl_jax.checkpoints.errors import CheckpointError

FLOATS: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# All types of which tensors are read from the folders of models.
NUMBERS: Mapping[str, np.dtype] = {
    **FLOATS,
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # as the format has it
_MOST_NUMBERS = 2**56  # of a tensor, empty axes aside: numpy counts bytes in 63 bits


class TensorFile(NamedTuple):
    """The content of a safetensors file.

    Attributes:
        tensors: every tensor of 16 or 32-bit floats.
        others: name → dtype of tensors of any other type, which are not read.
        metadata: texts of the header.
    """

    tensors: dict[str, np.ndarray]
    others: dict[str, str]
    metadata: dict[str, str]


class Entry(NamedTuple):
    """Where one tensor lies, in bytes behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A header as it stands in the file, and what it says: entries in the order of their bytes."""

    content: bytes
    entries: list[Entry]
    metadata: dict[str, str]


def read_tensors(path: epath.PathLike) -> TensorFile:
    """Reads a whole file, local or remote.

    Raises:
        CheckpointError: it is missing, truncated or damaged.
    """
    path = epath.Path(path)
    tensors: dict[str, np.ndarray] = {}
    others: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            metadata = read_header(file, path).metadata
        for name, found in deserialize(path.read_bytes()):
            if found["dtype"] in FLOATS:
                flat = np.frombuffer(found["data"], FLOATS[found["dtype"]])
                tensors[name] = flat.reshape(found["shape"])
            else:
                others[name] = found["dtype"]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing, truncated or damaged: {error}") from error
    return TensorFile(tensors, others, metadata)


def read_header(file: BinaryIO, path: epath.PathLike) -> Header:
    """Reads the header at the start of an open file; the file then stands at the first tensor.

    Args:
        file: opened in binary mode.
        path: of the file, for errors.

    Raises:
        CheckpointError: there is no such header, or the file is truncated or damaged.
    """

    def read(begin: int, end: int) -> bytes:
        file.seek(begin)
        return file.read(end - begin)

    return parse_header(read, file.seek(0, 2), path)


def parse_header(read: Callable[[int, int], Any], size: int, path: epath.PathLike) -> Header:
    """Reads the header of a file, and checks that its tensors fill the file.

    Args:
        read: gives the bytes from, up to.
        size: bytes of the file.
        path: of the file, for errors.

    Raises:
        CheckpointError: the file is truncated or damaged; names the tensor concerned.
    """
    prefix = bytes(read(0, _LENGTH_BYTES))
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
        raise CheckpointError(f"{path} is truncated or damaged: it has no safetensors header")
    text = bytes(read(_LENGTH_BYTES, _LENGTH_BYTES + length))
    try:
        content = json.loads(text)
        metadata = _texts(content.pop("__metadata__", None) or {})
        entries = [_entry(name, told) for name, told in content.items()]
        ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
        problem = _misfit(ordered, size - _LENGTH_BYTES - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: it has no safetensors header ({error})"
        ) from error
    if problem:
        raise CheckpointError(
            f"{path} is truncated or damaged: {problem}; please fetch the file again"
        )
    return Header(prefix + text, ordered, metadata)


def _texts(metadata: Mapping[str, str]) -> Mapping[str, str]:
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ holds something else than texts")
    return metadata


def _entry(name: str, told: Mapping[str, Any]) -> Entry:
    begin, end = told["data_offsets"]
    entry = Entry(name, told["dtype"], tuple(told["shape"]), begin, end)
    numbers = (*entry.shape, begin, end)
    if not isinstance(entry.dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"tensor {name} is {told}")
    if math.prod(n or 1 for n in entry.shape) > _MOST_NUMBERS:
        raise ValueError(f"tensor {name} has the shape {entry.shape}")
    return entry


def _misfit(entries: Sequence[Entry], size: int) -> str | None:
    """How tensors, ordered, do not fill `size` bytes one after another; None if they do."""
    place = 0
    for name, dtype, shape, begin, end in entries:
        count = math.prod(shape)
        known = NUMBERS.get(dtype)
        if begin != place:
            return f"tensor {name} begins at byte {begin}, where {place} was to come"
        if end < begin or (known is not None and end - begin != count * known.itemsize):
            return f"tensor {name}, {dtype} {shape}, cannot have {end - begin} bytes"
        if end > size:
            return f"tensor {name} ends at byte {end}, and there are {size}"
        place = end
    if place != size:
        return f"{size - place} bytes belong to no tensor"
    return None


def write_tensors(
    path: epath.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file, local or remote; the format is PyTorch's for those who ask the metadata.

    Equal tensors and metadata give equal bytes, so that two runs can be compared by a checksum.
    """
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path.write_bytes(_ordered(save(arrays, {"format": "pt", **(metadata or {})})))


def _ordered(content: bytes) -> bytes:
    """The file with its metadata in order: the library writes them in a new order every time."""
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    begin = _LENGTH_BYTES + length
    header = json.loads(content[_LENGTH_BYTES:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + content[begin:]
