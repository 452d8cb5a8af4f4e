"""Models as systems: prompts are kept, and seeds are checked before anything is loaded."""

from types import SimpleNamespace

import pytest

from sl_jax.eval import systems
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.systems import ModelConfig
from sl_jax.inference import prompts


def test_prompts_are_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SL_JAX_CACHE", str(tmp_path))
    pipeline = SimpleNamespace(params={}, time_params=None)
    monkeypatch.setattr(systems, "load_pipeline", lambda *_: pipeline)
    config = ModelConfig("tiny", "a prompt", dtype="float32")
    first = systems._load(config, {}).prompts
    assert len(list((tmp_path / "prompts").iterdir())) == 2
    monkeypatch.setattr(prompts, "_loaded", None)
    assert (systems._load(config, {}).prompts.hidden == first.hidden).all()


def test_seeds_of_all_pictures_are_in_range(tmp_path):
    model = ModelConfig("tiny", "a prompt", seed=2**32 - 2)
    config = EvaluationConfig("procedural:B:3:2:32", str(tmp_path / "out"), model)
    with pytest.raises(ValueError, match="of the first of 3 pictures; please use 0 to 4294967295"):
        evaluate(config)
    assert not (tmp_path / "out").exists()
