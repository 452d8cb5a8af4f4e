"""What TensorBoard would read of a run: records of length, checksum, message, checksum."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event


def read_events(folder):
    """{tag: [(step, value), …]}: numbers, pictures as uint8 [H, W, 3]; texts as "tag.text"."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                tag = value.tag.replace("/text_summary", ".text")
                found.setdefault(tag, []).append((event.step, _read(value)))
            content = content[16 + length :]
    return found


def _read(value):
    if value.HasField("image"):
        picture = Image.open(io.BytesIO(value.image.encoded_image_string))
        return np.asarray(picture.convert("RGB"))
    if value.HasField("tensor"):
        return value.tensor.string_val[0].decode()
    return value.simple_value
