"""The page of fifty pictures at the size of the release: below twenty megabytes, all on it."""

import io
import re
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.systems import System

PICTURES, SIDE, LAYERS = 50, 640, 4
MOST_BYTES = 20_000_000
LEAST_SIDE = 160  # of what is shown, in pixels: enough for a phone's width

pytestmark = pytest.mark.slow


def _grainy(name: str, strength: float) -> System:
    """Layers with the grain of photographs, which pack badly."""

    def make(tasks):
        made = []
        for task in tasks:
            assert task.sample.reference is not None
            grain = np.random.default_rng(task.picture.index).normal(0, strength, (SIDE, SIDE, 1))
            layers = task.sample.reference.astype(np.float32)
            layers[..., :3] += grain
            layers[1:, ..., 3] += np.where(layers[1:, ..., 3] > 0, grain[..., 0], 0)
            made.append(np.clip(np.rint(layers), 0, 255).astype(np.uint8))
        return made

    return System(name, "layers", {"kind": "layers", "strength": strength}, make)


def test_fifty_pictures_stay_below_twenty_megabytes(tmp_path):
    config = EvaluationConfig(
        f"procedural:B:{PICTURES}:{LAYERS}:{SIDE}",
        str(tmp_path),
        protocols=("stable_layers",),
        baselines=False,
    )
    evaluate(config, [_grainy("base", 40.0), _grainy("tuned", 20.0)])
    page = (tmp_path / "report.html").read_bytes()
    print(f"{len(page) / 1e6:.1f} MB")
    assert len(page) < MOST_BYTES
    assert page.count(b'<article class="card picture') == PICTURES
    shown = re.findall(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", page)
    assert len(shown) >= PICTURES * 2 * LAYERS
    sides = [max(Image.open(io.BytesIO(b64decode(content))).size) for content in shown[::10]]
    assert min(sides) >= LEAST_SIDE
