"""The miniature reproduction: its designs, its controls, its tables, and one small run of it."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from judged import judged
from PIL import Image

from sl_jax.imaging import recompose
from sl_jax.scoring import Group, cases

_HERE = Path(__file__).parent
_PATHS = (_HERE, _HERE / "reproduction")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Its files import each other, as launch/reproduce.sh has it."""
    for path in _PATHS:
        monkeypatch.syspath_prepend(str(path))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """Archives named and laid out like the real ones, with pictures made here."""
    from PIL import ImageDraw

    folder, random = tmp_path_factory.mktemp("wheels"), np.random.default_rng(0)
    sys.path.insert(0, str(_PATHS[1]))
    try:
        import artwork
    finally:
        sys.path.remove(str(_PATHS[1]))

    def encoded(picture: Image.Image) -> bytes:
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    with zipfile.ZipFile(folder / "arcade-3.3.3-py3-none-any.whl", "w") as archive:
        for number in range(6):
            sprite = Image.new("RGBA", (64, 64))
            colour = tuple(int(c) for c in random.integers(0, 256, 3))
            ImageDraw.Draw(sprite).ellipse((8, 4, 50 + number, 60), (*colour, 255))
            name = f"{artwork._SPRITES}/items/item{number}.png"
            archive.writestr(name, encoded(sprite))
        speck = Image.new("RGBA", (64, 64))
        speck.putpixel((3, 3), (255, 0, 0, 255))
        archive.writestr(f"{artwork._SPRITES}/items/speck.png", encoded(speck))
        archive.writestr(f"{artwork._SPRITES}/tiles/tile.png", encoded(Image.new("RGBA", (64, 64))))
    for package, names in artwork._PHOTOGRAPHS.items():
        with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
            for name in names:
                pixels = random.integers(0, 256, (9, 12, 3), np.uint8)
                archive.writestr(name, encoded(Image.fromarray(pixels).resize((160, 120))))
    return folder


def test_artwork_is_read_without_specks_and_other_rooms(wheels):
    import artwork

    found = artwork.read_artwork(wheels)
    assert len(found.sprites) == 6
    assert len(found.photographs) == sum(map(len, artwork._PHOTOGRAPHS.values()))
    assert all(sprite.getchannel("A").getbbox() == (0, 0, *sprite.size) for sprite in found.sprites)


def test_a_missing_wheel_is_said_with_the_way_to_get_it(tmp_path):
    import artwork

    with pytest.raises(FileNotFoundError, match="pip download --no-deps"):
        artwork.read_artwork(tmp_path)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_designs_of_artwork_are_canonical_and_repeatable(wheels, layers):
    import artwork

    found = artwork.read_artwork(wheels)
    for seed in range(4):
        design = artwork.compose(found, seed, 64, layers).layers
        assert design.shape == (layers, 64, 64, 4)
        assert (design[0, ..., 3] == 255).all()
        areas = [np.count_nonzero(layer[..., 3] >= 128) for layer in design[1:]]
        assert areas == sorted(areas, reverse=True) and min(areas) > 0
        assert (design[design[..., 3] == 0] == 0).all()
        again = artwork.compose(found, seed, 64, layers)
        np.testing.assert_array_equal(design, again.layers)
    other = artwork.compose(found, seed + 1, 64, layers).layers
    assert not np.array_equal(design, other)


def _group(name: str, count: int, blank: int = 0) -> Group:
    """Of candidates that are as good as each other, but for the last, which show nothing."""
    design = cases.design(32)
    candidates = (design,) * (count - blank) + (cases.all_in_background(design),) * blank
    return Group(name, recompose(design), candidates)


def test_shuffled_rewards_are_the_defaults_in_an_order_of_the_groups_name():
    from controls import shuffled

    rewards = np.arange(1, 9) / 10
    first, again, other = (
        shuffled(_group(name, 8), judged(rewards)) for name in ("1.0.a", "1.0.a", "2.0.a")
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(sorted(first), rewards)
    assert not np.array_equal(first, other)
    # Who has no score gets none, and nobody's is lost.
    missing = shuffled(_group("1.0.a", 8), judged([np.nan, *rewards[1:]]))
    assert np.isnan(missing[0])
    np.testing.assert_allclose(sorted(missing[1:]), rewards[1:])
    # What vetoes take is taken from somebody.
    vetoed = shuffled(_group("v", 8, blank=2), judged(rewards))
    np.testing.assert_allclose(sorted(vetoed), [0.05, 0.05, *rewards[:6]])
    # Over many groups no place is favoured.
    many = _group("many", 8)
    means = np.mean(
        [shuffled(replace(many, group_id=str(n)), judged(rewards)) for n in range(500)], axis=0
    )
    np.testing.assert_allclose(means, rewards.mean(), atol=0.05)


def test_true_layers_reward_what_is_near_them(monkeypatch):
    import controls

    from sl_jax.data.procedural import make_design

    monkeypatch.setattr(controls, "Sizes", partial(controls.Sizes, training=4))
    controls._training_designs.cache_clear()
    design = make_design("B", 100_002, 64, 3)
    blank = np.zeros_like(design.layers)
    exchanged = design.layers[[0, 2, 1]]
    group = Group("g", design.flat, (design.layers, exchanged, blank))
    right, other_order, wrong = controls.truth(group, judged([0, 0, 0]))
    assert right == other_order == 1 > wrong
    stranger = Group("s", make_design("B", 7, 64, 3).flat, (blank,))
    with pytest.raises(ValueError, match="no training design"):
        controls.truth(stranger, judged([0]))
    controls._training_designs.cache_clear()


def test_arms_have_names_of_their_own_and_fields_that_exist():
    from arms import ARMS, PAIRS, RECIPE

    from configs import grpo, sft

    assert len({arm.name for arm in ARMS}) == len(ARMS)
    for arm in ARMS:
        common, config = (RECIPE, grpo) if arm.kind == "rl" else (PAIRS, sft)
        known = config.get_config("tiny")
        for field in {**common, **arm.settings}:
            *parts, last = field.split(".")
            owner = known
            for part in parts:
                owner = owner[part]
            assert last in owner, field


def test_no_set_has_designs_of_another():
    from judge_fidelity import FIRST_SEED
    from measuring import Sizes

    sizes = Sizes()
    development = int(sizes.development_set.rpartition(":")[2])
    sets = {
        "training": sizes.training_seeds,
        "development": range(development, development + sizes.development),
        "held out": sizes.held_out_seeds,
        "seen while the judge was made": range(1000),
        "of the judge's fidelity": range(FIRST_SEED, FIRST_SEED + 10_000),
    }
    for name, other in combinations(sets, 2):
        assert set(sets[name]).isdisjoint(sets[other]), (name, other)
    assert int(sizes.held_out_set.rpartition(":")[2]) == sizes.held_out_seeds.start


def test_results_are_of_the_arms_as_they_are():
    """A recipe that changes leaves no result of another behind, nor does a base."""
    from arms import ARMS
    from measuring import SETTINGS, Sizes, base_digest
    from run import RESULTS, settings_of

    digest, settings = base_digest(), {str(setting) for setting in SETTINGS}

    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert set(found) == {f"{arm.name}_{seed}" for arm in ARMS for seed in arm.seeds}
    for arm in ARMS:
        for seed in arm.seeds:
            result = found[f"{arm.name}_{seed}"]
            assert result["settings"] == dict(settings_of(arm)), arm.name
            assert result["sets"] == Sizes().sets_of(arm.part), arm.name
            assert result["base_sha256"] == digest
            assert set(result.get("development", settings)) == settings


def test_a_result_of_other_designs_is_not_taken(tmp_path):
    from arms import ARMS
    from measuring import Sizes, base_digest
    from run import Bench

    arm = next(arm for arm in ARMS if arm.kind == "base")
    sets = Sizes().sets_of(arm.part)
    told = {"settings": {}, "base_sha256": base_digest(), "sets": sets}
    path = tmp_path / "base_0.json"
    path.write_text(json.dumps(told))
    bench = Bench(tmp_path / "work", tmp_path, tmp_path)
    bench.run(arm, 0)
    path.write_text(json.dumps(told | {"sets": sets | {"B": "procedural:B:256:3:64"}}))
    with pytest.raises(ValueError, match=r"base_0.json was made from other sets; please move"):
        bench.run(arm, 0)


def test_the_favourite_is_a_candidate_with_a_score():
    from run import _liked

    rewards = {"a": None, "b": 0.2, "c": 0.4, "d": None}
    records = [{"picture": "p", "model": m, "reward": r} for m, r in rewards.items()]
    assert _liked(records) == {"p": "c"}


def test_seconds_add_up_over_starts(tmp_path, monkeypatch):
    import run

    clock = iter((10.0, 12.5, 100.0, 100.25))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    path = tmp_path / "arm" / "spent.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), run._adding_up(path):
            raise KeyboardInterrupt
    assert json.loads(path.read_text())["seconds"] == 2.75


def test_what_a_ratio_spreads_is_told_for_a_policy_that_moves_as_far():
    from run import _spread_per_movement
    from tables import ratios

    log = [
        {
            "learner/ratio_std/step_0": 0.2,
            "learner/kl_old/step_0": 0.02,
            "learner/ratio_std/all": 1,
        },
        {"learner/ratio_std/step_1": 0.6, "learner/kl_old/step_1": 0.02},
        {"judge/reward_mean": 0.1},  # nothing to learn from
    ]
    assert _spread_per_movement(log) == pytest.approx((1 * 3) ** 0.5)
    assert _spread_per_movement(log[2:]) is None

    def result(side, spread):
        log = {"learner/clipped_low/all": 0.1, "learner/clipped_high/all": 0.05}
        return {
            "arm": f"plain_{side}",
            "settings": {"objective.clip_low": "1e-4", "objective.ratio": "plain"},
            "training": {
                "all": log | {"learner/ratio_std/all": 1e-4},
                "spread_per_movement": spread,
            },
        }

    both = ratios([result(32, 0.03), result(64, 0.02)])
    assert both[2].endswith("| 15.0 % | 1.00e-04 | 1.50 |") and both[3].endswith("| 1.00 |")
    assert ratios([result(32, 0.03)])[2].endswith("| 1.00e-04 |  |")


def test_the_best_setting_has_the_least_error():
    from measuring import SETTINGS, best

    errors = {str(setting): 1.0 for setting in SETTINGS} | {str(SETTINGS[3]): 0.5}
    assert best(errors) == SETTINGS[3]


@pytest.mark.slow
def test_a_small_reproduction_measures_trains_and_goes_on(wheels, tmp_path):
    """Base, tuned and best of n, with few designs; what is finished is not made again."""
    script = tmp_path / "small.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import arms, measuring, run, tables\n"
        "short = {**arms.RECIPE, 'epochs': '1', 'evaluation.pictures': '4',\n"
        "         'evaluation.steps': '2'}\n"
        "run.RECIPE, run._SAMPLES = short, 2\n"
        "measuring.SETTINGS = measuring.SETTINGS[:2]\n"
        "sizes = measuring.Sizes(training=24, development=4, held_out=4)\n"
        "work, wheels, results = map(Path, sys.argv[1:])\n"
        "bench = run.Bench(work, wheels, results, sizes)\n"
        "for arm in arms.ARMS:\n"
        "    if arm.name in ('base', 'tuned', 'best_of'):\n"
        "        bench.run(arm, 0)\n"
        "found = tables.read_results(results)\n"
        "print('\\n'.join(tables.headline(found) + tables.controls(found)))\n"
        "tables._curve(tables._of(found, 'tuned'), results / 'curve.svg')\n"
        "layers = work / 'tuned_0' / 'held_out_B' / 'layers'\n"
        "tables._picture(layers, sizes.held_out_seeds).save(results / 'l.png')\n"
    )
    paths = os.pathsep.join(map(str, _PATHS))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def reproduce() -> str:
        return subprocess.run(
            [sys.executable, script, tmp_path / "work", wheels, tmp_path / "results"],
            check=True,
            env=environment,
            cwd=_HERE.parents[1],
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    told = reproduce()
    results = tmp_path / "results"
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert set(found) == {"base_0", "tuned_0", "best_of_0"}
    assert len({result["base_sha256"] for result in found.values()}) == 1
    tuned = found["tuned_0"]
    assert len(tuned["development"]) == 2 and tuned["chosen"] in tuned["development"]
    assert tuned["training"]["epochs"] == 1
    assert [point["epoch"] for point in tuned["curve"]] == [0, 1]
    for name in ("B", "C"):
        change = tuned["held_out"][name]["layer_l1_order_free"]
        assert change["low"] <= change["change"] <= change["high"]
        # The best of several by the judge is liked no less than the first of them.
        assert found["best_of_0"]["held_out"][name]["reward"]["change"] >= 0
    assert "| order-free L1 |" in told and "best of 8 samples" in told
    assert "Held-out B with two layers:" in told and set(tuned["held_out"]) == {"B", "C", "B2"}
    page = json.loads((tmp_path / "work" / "tuned_0" / "held_out_B" / "report.json").read_text())
    assert "tuned: Training reward" in [curve["title"] for curve in page["curves"]]
    assert (results / "curve.svg").exists() and (results / "l.png").exists()
    times = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    reproduce()
    assert times == {path: path.stat().st_mtime_ns for path in results.glob("*.json")}


def test_pictures_that_share_a_photograph_are_resampled_together():
    """Few photographs behind many designs: the interval is that of the few."""
    from held_out import changes

    generator = np.random.default_rng(0)
    of_photograph = generator.normal(0.5, 1.0, 10)
    groups = {f"p{n:03d}": n % 10 for n in range(200)}
    records = [
        {"picture": p, "model": model, "x": of_photograph[g] * (model == "new")}
        for p, g in groups.items()
        for model in ("base", "new")
    ]
    alone, together = (changes(records, "new", {"x": 1}, g)["x"] for g in (None, groups))
    assert (
        together["change"] == pytest.approx(alone["change"]) == pytest.approx(of_photograph.mean())
    )
    few = changes([r for r in records if int(r["picture"][1:]) < 10], "new", {"x": 1}, None)["x"]
    for end in ("low", "high"):
        assert together[end] == pytest.approx(few[end], abs=0.05)
    assert together["high"] - together["low"] > 3 * (alone["high"] - alone["low"])
