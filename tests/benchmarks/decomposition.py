"""Pictures taken apart by the tiny base, as the README shows them.

    python tests/benchmarks/decomposition.py --output tests/benchmarks/results/decomposition.png

Designs of family A with seeds 0, 1, 2 …, which training has never seen: the first ones, not chosen.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import sl_jax
from sl_jax import imaging
from sl_jax.data.procedural import make_design

_LAYERS = 3
_SIZE = 64
_LABELS = ("picture", "layer 0", "layer 1", "layer 2", "together again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--designs", type=int, default=3)
    parser.add_argument("--magnified", type=int, default=2)
    arguments = parser.parse_args()
    decompose = sl_jax.Decomposer.from_pretrained("tiny", dtype="float32")
    cells, labels = [], []
    for seed in range(arguments.designs):
        picture = Image.fromarray(imaging.recompose(make_design("A", seed, _SIZE, _LAYERS).layers))
        made = decompose(picture, _LAYERS, seed=seed, steps=10, sampler="euler", size=_SIZE)
        layers = np.stack([np.asarray(layer) for layer in made])
        shown = (np.asarray(picture), *imaging.on_checkerboard(layers), imaging.recompose(layers))
        cells += [np.kron(cell, _block(arguments.magnified)) for cell in shown]
        labels += _LABELS
    sheet = imaging.contact_sheet(cells, len(_LABELS), labels)
    Image.fromarray(sheet).save(arguments.output, optimize=True)


def _block(times: int) -> np.ndarray:
    return np.ones((times, times, 1), np.uint8)


if __name__ == "__main__":
    main()
