"""Crello's parquet files in small, with the schema that the public ones have."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# The columns of revision 5, as `datasets` writes them; labels are numbers, names in the metadata.
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("length", pa.int64()),
        ("group", pa.int64()),
        ("format", pa.int64()),
        ("category", pa.int64()),
        ("canvas_width", pa.int64()),
        ("canvas_height", pa.int64()),
        ("suitability", pa.list_(pa.int64())),
        ("keywords", pa.list_(pa.string())),
        ("industries", pa.list_(pa.int64())),
        ("title", pa.string()),
        ("preview", _PICTURE),
        ("cluster_index", pa.int64()),
        ("type", pa.list_(pa.int64())),
        ("left", pa.list_(pa.float32())),
        ("top", pa.list_(pa.float32())),
        ("width", pa.list_(pa.float32())),
        ("height", pa.list_(pa.float32())),
        ("angle", pa.list_(pa.float32())),
        ("opacity", pa.list_(pa.float32())),
        ("color", pa.list_(pa.list_(pa.string()))),
        ("image", pa.list_(_PICTURE)),
        ("text", pa.list_(pa.string())),
        ("font", pa.list_(pa.int64())),
        ("font_size", pa.list_(pa.float32())),
        ("font_bold", pa.list_(pa.list_(pa.bool_()))),
        ("font_italic", pa.list_(pa.list_(pa.bool_()))),
        ("text_color", pa.list_(pa.list_(pa.string()))),
        ("text_line", pa.list_(pa.list_(pa.int64()))),
        ("text_align", pa.list_(pa.int64())),
        ("capitalize", pa.list_(pa.bool_())),
        ("line_height", pa.list_(pa.float32())),
        ("letter_spacing", pa.list_(pa.float32())),
    ]
)
RED, GREEN = (200, 0, 0, 255), (0, 160, 0, 255)


def _encoded(height, width, colour):
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 4), colour, np.uint8)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def _element(kind, left, top, width, height, colour, angle=0.0, opacity=1.0):
    picture = _encoded(max(round(height), 1), max(round(width), 1), colour)
    return (kind, left, top, width, height, angle, opacity, picture)


def row(name, elements, canvas=(60, 80)):
    lists = list(zip(*elements, strict=True)) or [()] * 8
    names = ("type", "left", "top", "width", "height", "angle", "opacity", "image")
    made = {field.name: [] if pa.types.is_list(field.type) else 0 for field in _SCHEMA}
    made |= dict(zip(names, map(list, lists), strict=True))
    made |= {"preview": _encoded(4, 4, RED), "text": [""] * len(elements)}
    made |= {"id": name, "title": f"Title of {name}", "length": len(elements)}
    return made | {"canvas_height": canvas[0], "canvas_width": canvas[1]}


def design(name, shift=0):
    """A background, a red box, a green box turned by a right angle, half opaque."""
    return row(
        name,
        [
            (3, 0.0, 0.0, 80.0, 60.0, 0.0, 1.0, _encoded(1, 1, (250, 240, 230, 255))),
            _element(0, 10.0 + shift, 5.0, 20.0, 10.0, RED),
            _element(2, 30.0, 30.0, 24.0, 8.0, GREEN, 90.0, 0.5),
        ],
    )


def write_split(folder, split, rows, part=0, of=1, metadata=None):
    folder.mkdir(parents=True, exist_ok=True)
    features = metadata or {"canvas_width": {"dtype": "int64", "_type": "Value"}}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata(told))
    pq.write_table(table, folder / f"{split}-{part:05d}-of-{of:05d}.parquet")
