"""What TensorBoard would read of a run: records of length, checksum, message, checksum."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


def read_events(folder):
    """{tag: [(step, value), …]}: numbers, pictures as uint8 [H, W, 3]; texts as "tag.text"."""
    found = {}
    for event in (event for events in read_files(folder) for event in events):
        for value in event.summary.value:
            tag = value.tag.replace("/text_summary", ".text")
            found.setdefault(tag, []).append((event.step, _read(value)))
    return found


def read_files(folder):
    """[[Event, …], …]: of each file, in the order in which TensorBoard reads them."""
    files = []
    for path in sorted((folder / "tensorboard").iterdir()):
        first, *events = (Event.FromString(content) for content in _records(path.read_bytes()))
        assert first.file_version == "brain.Event:2", path
        assert not any(event.file_version for event in events), path
        files.append(events)
    return files


def _records(rest):
    while rest:
        length, rest = _checked(rest, 8)
        content, rest = _checked(rest, *struct.unpack("<Q", length))
        yield content


def _checked(content, size):
    """So many bytes, once they are known to be there and to have their checksum, and the rest."""
    part, checksum = content[:size], content[size : size + 4]
    assert len(part) == size and checksum == struct.pack("<I", masked_crc32c(part))
    return part, content[size + 4 :]


def _read(value):
    if value.HasField("image"):
        picture = Image.open(io.BytesIO(value.image.encoded_image_string))
        return np.asarray(picture.convert("RGB"))
    if value.HasField("tensor"):
        return value.tensor.string_val[0].decode()
    return value.simple_value
