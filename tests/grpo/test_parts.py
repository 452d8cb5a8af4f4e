"""What a run is made of, before it rolls anything out."""

import jax
import numpy as np
import pytest
from runner import MINIMAL, Runner

from sl_jax.grpo import run as module
from sl_jax.grpo.config import from_mapping
from sl_jax.inference import encode_prompts
from sl_jax.parallel.mesh import make_mesh
from sl_jax.parallel.processes import ALONE
from sl_jax.training.profiling import Profiler


class NoCheckpoints:
    """Of a run that begins."""

    latest = None


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rollout_learner_and_evaluation_are_guided_alike(
    random_checkpoint, tmp_path, monkeypatch, scale
):
    one = jax.devices()[:1]
    made = "sl_jax.parallel.mesh.make_mesh"
    monkeypatch.setattr(made, lambda config, _: make_mesh(config, one))
    runner = Runner(random_checkpoint, tmp_path, MINIMAL, devices=1)
    fields = {"rollout.guidance": scale, "rollout.negative_prompt": "a smear"}
    config = from_mapping(runner.configuration(tmp_path, (), fields), 1)
    given = (config, tmp_path, NoCheckpoints(), ALONE, Profiler(None, tmp_path))
    with module._parts(*given) as (parts, _):
        found = (parts.rollout._guidance, parts.learner._guidance, parts.evaluator.guidance)
    if scale == 1:
        assert found == (None, None, None)
        return
    wanted = encode_prompts(random_checkpoint, ["a smear"], dtype=np.float32).hidden
    for guidance in found:
        assert guidance.scale == scale
        np.testing.assert_allclose(guidance.text, wanted, atol=1e-5)
