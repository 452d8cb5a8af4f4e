"""Procedural designs: pinned pixels, canonical order, visibility, families that differ."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from sl_jax.data._draws import Draws, circle
from sl_jax.data.procedural import FAMILIES, MAX_LAYERS, canonical_order, flatten, make_design

SEEDS = range(700, 724)


def _solid(layers: np.ndarray) -> np.ndarray:
    """bool [L-1, H, W]: where objects are; shadows stay below alpha 128."""
    return layers[1:, ..., 3] >= 128


def _shown(solid: np.ndarray) -> list[int]:
    """Pixels of each object that no object in front hides."""
    hidden = np.zeros(solid.shape[1:], bool)
    counts = []
    for mask in solid[::-1]:
        counts.append(int(np.count_nonzero(mask & ~hidden)))
        hidden |= mask
    return counts[::-1]


# Pixels of family A are what the tiny base was trained on: they must never change.
@pytest.mark.parametrize(
    ("family", "seed", "size", "layers", "digest"),
    [
        ("A", 0, 64, 3, "96fe75328d457db4"),
        ("A", 1, 64, 3, "d203ebdcc7fa2891"),
        ("A", 2, 64, 5, "4382b4d81a313a17"),
        ("A", 3, (64, 96), 4, "33dc9de00c47d96d"),
        ("A", 4, 128, 2, "a3ae83cd4c8a5f4d"),
        ("A", 5, 64, 1, "745451abaf83bdce"),
        ("A", 6, 64, 8, "ee121c40ceec8e2a"),
        ("B", 0, 64, 3, "9cae476bdfe798a5"),
        ("B", 1, 64, 3, "4cab678311cccf20"),
        ("B", 2, 64, 5, "fa2abff4d9d899cc"),
        ("B", 3, (64, 96), 4, "2236544aca2ff747"),
        ("B", 4, 128, 2, "f79df876bb97bc38"),
        ("B", 5, 64, 1, "991ad2a4130b4547"),
        ("B", 6, 64, 8, "c5e158d7aa1bde4b"),
    ],
)
def test_pixels_are_pinned(family, seed, size, layers, digest):
    pixels = make_design(family, seed, size, layers).layers
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == digest


def test_draws_are_pinned():
    draws = Draws((1, 2, 3))
    numbers = [int(draws.unit() * 2**32) for _ in range(300)]
    assert (numbers[0], numbers[255], numbers[299]) == (3173871304, 2879656440, 2710992166)


def test_circle_is_the_unit_circle():
    turns = np.linspace(0.0, 1.0, 1001)
    points = np.array([circle(turn) for turn in turns])
    angles = 2 * np.pi * turns
    np.testing.assert_allclose(points, np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-8)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("size", "count"), [(64, 3), ((64, 80), 5), (97, 2), (64, 1)])
def test_layers_are_clean_rgba(family, size, count):
    height, width = (size, size) if isinstance(size, int) else size
    for seed in range(4):
        layers = make_design(family, seed, size, count).layers
        assert layers.dtype == np.uint8
        assert layers.shape == (count, height, width, 4)
        assert (layers[0, ..., 3] == 255).all()
        assert not layers[layers[..., 3] == 0].any()
        for layer in layers[1:]:
            alpha = layer[..., 3]
            assert (alpha == 0).mean() > 0.3, "an object's surroundings must be transparent"
            assert (alpha == 255).any()
            assert ((alpha > 127) & (alpha < 255)).any(), "edges must be antialiased"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("count", [3, 5])
def test_picture_determines_the_order(family, count):
    for seed in SEEDS if count == 3 else SEEDS[:6]:
        layers = make_design(family, seed, 64, count).layers
        assert canonical_order(layers[1:]) == tuple(range(count - 1))
        solid = _solid(layers)
        areas, shown = [int(mask.sum()) for mask in solid], _shown(solid)
        for behind, front in zip(range(count - 1), range(1, count - 1), strict=False):
            assert areas[behind] >= 1.12 * areas[front]
            assert shown[behind] >= 1.03 * shown[front]


def test_canonical_order_sorts_by_area_then_place():
    layers = np.zeros((5, 20, 20, 4), np.uint8)
    layers[0, 12:14, 2:4] = 255  # 4 pixels, low
    layers[1, 2:4, 9:11] = 255  # 4 pixels, high and right
    layers[2, 2:4, 4:6] = 255  # 4 pixels, high and left
    layers[3, 5:10, 5:10] = 255  # the largest
    layers[4, :, :, 3] = 127  # nothing solid
    assert canonical_order(layers) == (3, 2, 1, 0, 4)


@pytest.mark.parametrize(("family", "least"), [("A", 0.55), ("B", 0.45)])
def test_objects_stay_visible(family, least):
    for seed in SEEDS:
        solid = _solid(make_design(family, seed).layers)
        for mask, shown in zip(solid, _shown(solid), strict=True):
            assert shown >= least * int(mask.sum())
            assert 0.006 * mask.size <= int(mask.sum()) <= 0.36 * mask.size


def test_the_visible_share_of_the_table_is_kept(monkeypatch):
    monkeypatch.setitem(FAMILIES, "A", replace(FAMILIES["A"], visible=0.9, least_overlap=0.0))
    for seed in SEEDS:
        solid = _solid(make_design("A", seed).layers)
        assert _shown(solid)[0] >= 0.85 * int(solid[0].sum())


def test_objects_occlude_one_another_and_more_so_in_b():
    hidden = {}
    for family in FAMILIES:
        pairs = [_solid(make_design(family, seed).layers) for seed in SEEDS]
        shares = np.array([(behind & front).sum() / front.sum() for behind, front in pairs])
        assert (shares >= 0.12).mean() >= 0.75
        hidden[family] = shares.mean()
    assert hidden["B"] > hidden["A"] + 0.05


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_objects_differ_from_what_lies_behind(family):
    for seed in SEEDS:
        layers = make_design(family, seed).layers
        for index in range(1, len(layers)):
            opaque = layers[index, ..., 3] == 255
            behind = flatten(layers[:index])[opaque].astype(int)
            difference = np.abs(layers[index, opaque, :3].astype(int) - behind).max(axis=-1)
            assert np.median(difference) >= 40


def test_flat_is_the_over_composite():
    for family in FAMILIES:
        design = make_design(family, 11, 64, 4)
        exact = np.zeros((64, 64, 3))
        for layer in design.layers / 255.0:
            exact = exact * (1.0 - layer[..., 3:]) + layer[..., :3] * layer[..., 3:]
        assert design.flat.dtype == np.uint8
        assert np.abs(design.flat - exact * 255.0).max() <= 0.51


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_same_seed_is_the_same_design_at_other_sizes(family):
    small = make_design(family, 3, 64).flat.astype(float)
    large = make_design(family, 3, 192).flat.astype(float)
    reduced = large.reshape(64, 3, 64, 3, 3).mean(axis=(1, 3))
    assert np.abs(small - reduced).mean() < 3.0


def test_order_holds_at_the_largest_size():
    layers = make_design("A", 21, 640, 4).layers
    assert layers.shape == (4, 640, 640, 4)
    assert canonical_order(layers[1:]) == (0, 1, 2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_most_layers_and_long_canvases_work(family):
    for seed in range(2):
        layers = make_design(family, seed, 64, MAX_LAYERS).layers
        assert canonical_order(layers[1:]) == tuple(range(MAX_LAYERS - 1))
    assert make_design(family, 0, (160, 64), 3).layers.shape == (3, 160, 64, 4)


def test_seeds_and_layer_counts_give_other_designs():
    pictures = {make_design("A", seed).flat.tobytes() for seed in SEEDS}
    assert len(pictures) == len(SEEDS)
    assert (make_design("A", 1, 64, 2).layers[0] != make_design("A", 1, 64, 3).layers[0]).any()


def test_families_differ_in_distribution():
    backdrops = {name: [make_design(name, s, 64, 1).flat for s in SEEDS] for name in FAMILIES}
    brightness = {n: np.mean([flat.mean() for flat in flats]) for n, flats in backdrops.items()}
    assert brightness["A"] > brightness["B"] + 60

    def steps(flats: list[np.ndarray]) -> float:
        return float(np.mean([np.abs(np.diff(flat.astype(int), axis=1)).max() for flat in flats]))

    assert steps(backdrops["B"]) > 1.5 * steps(backdrops["A"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("D", 0), "please use one of"),
        (("A", -1), "please use 0 or more"),
        (("A", 0, 8), "at least 16"),
        (("A", 0, 64, 0), "please use 1 to 8"),
        (("A", 0, 64, 9), "please use 1 to 8"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_design(*arguments)
