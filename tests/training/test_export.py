"""A checkpoint folder appears whole, or not at all."""

import pytest

from sl_jax.training.export import in_place_of, place_problems


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "runs" / "export"
    with in_place_of(target) as place:
        (place / "config.json").write_text("{}")
        assert not target.exists()
    assert (target / "config.json").read_text() == "{}"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("earlier", [False, True])
def test_cut_short_it_leaves_what_was_there(tmp_path, earlier):
    target = tmp_path / "export"
    if earlier:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(KeyboardInterrupt), in_place_of(target) as place:
        (place / "config.json").write_text("{")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "old"] * earlier


def test_what_a_killed_process_left_is_not_taken_along(tmp_path):
    target = tmp_path / "export"
    for path in (target / "old", tmp_path / ".export.partial" / "half"):
        path.parent.mkdir()
        path.touch()
    with in_place_of(target) as place:
        (place / "config.json").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "config.json"]


def test_only_a_checkpoint_is_replaced(tmp_path):
    assert list(place_problems(str(tmp_path / "new"))) == []
    (problem,) = place_problems(str(tmp_path))
    assert "exists and is no checkpoint" in problem
    (tmp_path / "model_index.json").touch()
    assert list(place_problems(str(tmp_path))) == []
    assert "local disk" in next(place_problems("gs://bucket/base"))
    assert "config.export is ''" in next(place_problems(""))
