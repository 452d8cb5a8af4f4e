"""Tables of a comparison: who is in which row, paired with whom, over which pictures."""

import math

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.eval.baselines import BASELINES
from sl_jax.eval.compare import Measurement, comparison_tables, flat_records, measure
from sl_jax.eval.layerd import EditScores, layerd_scores
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.report import Report, render_html
from sl_jax.eval.stable_layers import layer_l1


def design(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    layers = np.zeros((count, 24, 24, 4), np.uint8)
    layers[0] = (*rng.integers(0, 256, 3), 255)
    for layer in layers[1:]:
        top, left = rng.integers(0, 14, 2)
        layer[top : top + 10, left : left + 10] = (*rng.integers(0, 256, 3), 255)
    return layers


def measured(names=("all in background", "truth"), pictures=4) -> list[Measurement]:
    found = []
    for index in range(pictures):
        reference = design(index, 2 + index % 2)
        source = imaging.recompose(reference)
        for name in names:
            layers = reference if name == "truth" else BASELINES[name](source, len(reference))
            found.append(measure(f"p{index}", name, layers, source, reference))
    return found


def test_measure_holds_what_the_metrics_say():
    reference, source = design(0, 3), imaging.recompose(design(0, 3))
    layers = BASELINES["colour components"](source, 4)
    got = measure("p", "m", layers, source, reference, seed=7, reward=0.5)
    assert (got.layers, got.seed, got.reward) == (3, 7, 0.5)
    assert got.layer_l1 == layer_l1(layers, reference)
    assert got.layerd == layerd_scores(layers, reference)
    assert got.free == reference_free(layers, source)
    alone = measure("p", "m", layers, source)
    assert (alone.layers, alone.layer_l1, alone.layerd) == (4, None, None)
    # LayerD's own script leaves out stacks of a single layer.
    assert measure("p", "m", layers[:1], source, reference).layerd is None


def test_tables_of_a_comparison():
    measurements = measured()
    tables = {table.title: table for table in comparison_tables(measurements, "all in background")}
    assert list(tables) == [
        "Per-layer L1",
        "LayerD",
        "Without a reference",
        "Difference from all in background, reference-based",
        "Difference from all in background, without a reference",
    ]
    l1 = tables["Per-layer L1"].rows
    assert [row[:2] for row in l1] == [
        (heading, model)
        for heading in ("L = 2", "L = 3", "All")
        for model in ("all in background", "truth")
    ]
    assert [row[-1] for row in l1] == [2, 2, 2, 2, 4, 4]
    of_two = [m.layer_l1.mean for m in measurements if m.model != "truth" and m.layers == 2]
    assert l1[0][2].mean == pytest.approx(np.mean(of_two))
    assert l1[5][2].mean == 0.0

    difference = tables["Difference from all in background, reference-based"]
    assert [row[0] for row in difference.rows] == ["truth"]
    assert difference.rows[0][1].mean == pytest.approx(-l1[4][2].mean)
    assert difference.rows[0][1].high < 0 and difference.columns[1].signed
    assert difference.rows[0][-1] == 4 and difference.columns[-1].name == "Pictures"
    page = render_html(
        Report("T", tables=tuple(tables.values()), records=flat_records(measurements))
    )
    assert page.count("<table>") == 5


def test_per_layer_l1_by_the_reference_and_of_all():
    white = np.full((1, 1, 2, 4), 255, np.uint8)
    red = np.zeros((1, 1, 2, 4), np.uint8)
    red[..., 0, :] = (255, 0, 0, 255)  # and the second pixel is clear: 2 of 8 values
    two = np.concatenate([white, red])
    measurements = [
        Measurement(name, "m", len(reference), 0, None, layer_l1(layers, reference))
        for name, layers, reference in (("a", two, two), ("b", white, two), ("c", white, white))
    ]
    (table,) = comparison_tables(measurements)
    assert [(row[0], *(cell.mean for cell in row[2:5]), row[5]) for row in table.rows] == [
        ("L = 1", 0.0, 0.0, 0.0, 1),
        ("L = 2", 0.0625, 0.0, 0.0625, 2),
        ("All", pytest.approx(0.125 / 3), 0.0, pytest.approx(0.125 / 3), 3),
    ]


def test_layerd_table_of_designs_whose_edits_stop_early():
    def level(edits, cost):
        return EditScores(edits, cost, cost / 2, 1 - cost, ((0, 0),))

    short, long = (level(0, 0.4),), (level(0, 0.8), level(1, 0.2), level(2, 0.1))
    measurements = [
        Measurement(name, "m", 2, 0, None, layerd=scores)
        for name, scores in (("short", short), ("long", long))
    ]
    (table,) = comparison_tables(measurements, edits=(0, 1, 2))
    shown = [[cell.mean for cell in row[2:5]] for row in table.rows]
    np.testing.assert_allclose(shown, [[0.3, 0.4, 0.6], [0.15, 0.7, 0.3], [0.125, 0.75, 0.25]])
    assert [row[5] for row in table.rows] == [2, 2, 2]


def test_layerd_table_carries_last_scores():
    rows = {table.title: table for table in comparison_tables(measured())}["LayerD"].rows
    truth = [row for row in rows if row[1] == "truth"]
    assert [row[0] for row in truth] == ["0 merges", "1 merge", "5 merges"]
    assert all(row[2].mean == 0.0 and row[3].mean == 1.0 for row in truth)


def test_seeds_are_averaged_within_their_picture_and_paired_by_seed():
    def judged(picture, model, seed, reward):
        free = measured(pictures=1)[0].free
        return Measurement(picture, model, 2, seed, free, reward=reward)

    measurements = [
        judged("a", "base", 0, 0.2),
        judged("a", "base", 1, 0.4),
        judged("b", "base", 0, 0.5),
        judged("a", "tuned", 0, 0.3),
        judged("b", "tuned", 1, 0.9),  # has no partner
    ]
    tables = comparison_tables(measurements, "base")
    assert [table.title for table in tables] == [
        "Without a reference",
        "Judge",
        "Difference from base, without a reference",
    ]
    base, tuned = tables[1].rows
    assert base[1].mean == pytest.approx((0.3 + 0.5) / 2) and base[-1] == 2
    assert tuned[1].mean == pytest.approx(0.6)
    (difference,) = tables[2].rows
    place = [column.name for column in tables[2].columns].index("Judge score")
    assert difference[place].mean == pytest.approx(0.1) and difference[place].count == 1


def test_what_some_pictures_lack_shows_in_the_count():
    free = measured(pictures=1)[0].free
    measurements = [
        Measurement("a", "base", 2, 0, free, reward=0.5, criteria=(0.1, 0.2, 0.3, 0.4, 0.5)),
        Measurement("b", "base", 2, 0, free, reward=0.7),
        Measurement("a", "tuned", 2, 0, None, wins=0.75),
        Measurement("b", "tuned", 2, 0, free, wins=0.25),
    ]
    tables = {table.title: table for table in comparison_tables(measurements, "base")}
    assert [row[-1] for row in tables["Judge"].rows] == ["1 to 2"]
    assert [row[-1] for row in tables["Without a reference"].rows] == [2, 1]
    (wins,) = tables["Win rate against base"].rows
    assert wins[:1] == ("tuned",) and wins[1].mean == 0.5 and wins[-1] == 2


def test_records_are_flat():
    record = flat_records(measured(pictures=1))[1]
    assert record["picture"] == "p0" and record["model"] == "truth" and record["layers"] == 2
    assert record["layer_l1_mean"] == 0.0 and record["layerd_alpha_iou_0"] == 1.0
    assert math.isnan(record["reward"]) and record["blank_rate"] == 0.0
    assert all(isinstance(value, str | int | float) for value in record.values())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="not among"):
        comparison_tables(measured(pictures=1), "tuned")
    with pytest.raises(ValueError, match="not among"):
        comparison_tables([])
    with pytest.raises(ValueError, match="two measurements"):
        comparison_tables(measured(pictures=1) * 2)
