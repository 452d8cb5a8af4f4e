"""Plans: what counts as fitting, times by the slowest of three rates, forecasts, suggestions."""

import json
import runpy
from pathlib import Path

import pytest

from sl_jax.grpo.config import from_mapping
from sl_jax.grpo.programs import workload
from sl_jax.parallel.mesh import MeshConfig
from sl_jax.planning import suggestions
from sl_jax.planning.compiled import Memory, out_of_memory
from sl_jax.planning.roofline import JudgePool, PhasePlan, Plan
from sl_jax.planning.text import to_json, to_text
from sl_jax.planning.topologies import PlanError, topology
from sl_jax.training.configuration import ConfigError

SLICE = topology("v5e:2x4")
CHIP = SLICE.chip
GIB = 2**30
CONFIGS = Path(__file__).parents[2] / "configs" / "grpo.py"
REFUSAL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 17.90G of 15.75G hbm. Exceeded hbm capacity by 2.15G."
)


def _work(**rollout):
    settings = runpy.run_path(str(CONFIGS))["get_config"]().to_dict()
    settings["data"]["path"] = "pictures"
    settings["rollout"] |= rollout
    return workload(from_mapping(settings, SLICE.chips))


WORK = _work()


def _phase(name, calls=1.0, memory=(4, 2, 1), held=1, flops=1e12, hbm=0.0, sent=0.0):
    return PhasePlan(
        name,
        calls,
        Memory(*(size * GIB for size in memory)) if memory else None,
        None if memory else out_of_memory(REFUSAL),
        held * GIB,
        flops,
        hbm,
        {"all-gather": sent},
    )


def _plan(*phases, resident=4 * GIB, pool=None, work=WORK):
    mesh = {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    return Plan(SLICE, mesh, {"base": resident}, phases, work, 8, pool)


def test_a_phase_takes_as_long_as_the_slowest_of_three():
    second = {"flops": CHIP.flops, "hbm": CHIP.bandwidth, "sent": SLICE.ici}
    for slowest in second:
        rates = {name: rate * (3 if name == slowest else 1) for name, rate in second.items()}
        assert _phase("rollout", calls=4, **rates).seconds(SLICE) == pytest.approx(12)


def test_memory_is_what_the_program_takes_and_what_lies_beside_it():
    fitting = _plan(_phase("rollout"), _phase("learner forward", memory=(9, 4, 1)))
    assert fitting.most.name == "learner forward" and fitting.fits
    assert fitting.most.needed == 15 * GIB
    too_much = _plan(_phase("rollout"), _phase("learner forward", memory=(9, 4, 2)))
    assert not too_much.fits
    assert "0.25 GiB too much on each chip in learner forward" in to_text(too_much)
    assert "micro_batch" in to_text(too_much)


def test_what_the_compiler_refuses_does_not_fit():
    refused = _plan(_phase("rollout", memory=None))
    assert not refused.fits
    assert refused.most.needed == pytest.approx(18.9 * GIB)
    text = to_text(refused)
    assert "does not fit: 3.15 GiB too much on each chip in rollout" in text
    assert "lower config.rollout.batch_groups" in text
    assert "Used 17.90G" in to_json(refused)["phases"][0]["refused"]


def test_where_a_phase_is_missing_there_is_no_forecast():
    """The backward pass's program is made of what the forward one's compilation leaves."""
    phases = (_phase("learner forward", memory=None), _phase("rollout"))
    plan = _plan(*phases, pool=JudgePool(1.0, 8))
    assert plan.forecast() is None
    found = to_json(plan)
    assert found["forecast"] is None and found["judge_replicas"] is None
    text = to_text(plan)
    assert "No forecast: the compiler refused learner forward" in text
    assert "epochs" not in text and "Judge" not in text
    # What the compiler names may be a part of what it would need.
    small = phases[0]._replace(refused=phases[0].refused._replace(needed=GIB / 2))
    assert "does not fit: the compiler refused learner forward" in to_text(_plan(small))
    fitting = _plan(_phase("rollout"))
    assert suggestions.best([_plan(small), fitting]) is fitting


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (REFUSAL, 17.9 * GIB, 15.75 * GIB),
        (
            "CompileTimeHbmOom: the total memory required for HLO temporaries (512.00M) exceeds "
            "available HBM (256.00M)",
            2**29,
            2**28,
        ),
    ],
)
def test_refusals_are_understood(message, needed, available):
    found = out_of_memory(message)
    assert (found.needed, found.available) == (pytest.approx(needed), pytest.approx(available))
    assert out_of_memory("INTERNAL: something else") is None
    assert out_of_memory("RESOURCE_EXHAUSTED: too many requests") is None


# Per epoch: 64 pictures of 50 Heun steps before the first of 300 epochs and after every twentieth,
# and a batch of the rollout's own once. Its window of 2 of 10 steps starts at 0 to 3.
EVALUATIONS = (16 * 64 * 99 + 8 * (1.5 + 8 * 8.5)) / 300


@pytest.mark.parametrize(
    ("rollout", "per_group"),
    [
        ({}, 1.5 + 8 * 8.5),
        ({"group_noise": "independent"}, 8 * 10),
        ({"ode_method": "heun"}, 3 + 8 * (2 + 2 * 6.5 - 1)),
        ({"ode_method": "heun", "group_noise": "independent"}, 8 * (3 + 2 + 2 * 6.5 - 1)),
    ],
)
def test_an_evaluation_takes_its_share_of_a_rollout(rollout, per_group):
    """One forward pass a second: a stochastic step has one, and so has the last one of Heun's."""
    work = _work(**rollout)
    phase = _phase("rollout", calls=32 * per_group, flops=CHIP.flops)
    found = _plan(phase, work=work).forecast()
    once = 8 * per_group - 8 * (1.5 + 8 * 8.5)
    assert found.evaluation_seconds == pytest.approx(EVALUATIONS + once / 300)


def test_the_forecast_of_a_run():
    plan = _plan(_phase("rollout", calls=4, flops=10 * CHIP.flops), _phase("apply", calls=2, hbm=0))
    found = plan.forecast()
    assert found.epoch_seconds == pytest.approx(40, rel=1e-3)
    evaluation = 40 * EVALUATIONS / 2224
    assert found.evaluation_seconds == pytest.approx(evaluation, rel=1e-3)
    assert found.hours == pytest.approx(300 * (40 + evaluation) / 3600, rel=1e-3)
    assert found.judge_calls == 300 * 32 * 9
    assert found.pictures_per_second == pytest.approx(32 * 8 / 40, rel=1e-3)
    text = to_text(plan)
    assert "Epoch 40 s, and 6 s of evaluation per epoch on average" in text
    assert "300 epochs (600 updates) 3.8 h" in text and "86400 calls" in text
    assert json.loads(json.dumps(to_json(plan)))["forecast"]["judge_calls"] == 86400


@pytest.mark.parametrize(
    ("seconds", "concurrency", "replicas"),
    [(0.1, 8, "1 replica with"), (10.0, 8, "9 replicas with"), (10.0, 1, "72 replicas with")],
)
def test_the_judge_pool_that_keeps_up(seconds, concurrency, replicas):
    """An epoch of 40 seconds asks for 288 calls, 7.2 a second."""
    phase = _phase("rollout", calls=4, flops=10 * CHIP.flops)
    plan = _plan(phase, pool=JudgePool(seconds, concurrency))
    assert f"7.20 calls per second: {replicas} {concurrency} calls at a time" in to_text(plan)
    assert to_json(plan)["judge_replicas"] == int(replicas.split()[0])
    assert (
        "--judge_seconds" in to_text(_plan(phase)) and not to_json(_plan(phase))["judge_replicas"]
    )


def test_suggestions_split_tensors_least_and_keep_copies_where_there_is_room():
    def check(mesh):
        if mesh.tensor > 2:
            raise ConfigError("heads")

    small = suggestions.meshes(SLICE, check, lambda mesh: 8 * GIB // mesh.fsdp // mesh.tensor)
    assert small[0] == MeshConfig(data=8, fsdp=1, tensor=1) and len(small) == 3
    large = suggestions.meshes(SLICE, check, lambda mesh: 80 * GIB // mesh.fsdp // mesh.tensor)
    assert large == [MeshConfig(data=1, fsdp=8, tensor=1), MeshConfig(data=1, fsdp=4, tensor=2)]
    with pytest.raises(PlanError, match=r"take at least 20\.0 of 15\.8 GiB per chip"):
        suggestions.meshes(SLICE, check, lambda mesh: 160 * GIB // mesh.fsdp // mesh.tensor)


def test_where_no_mesh_will_do_the_reason_is_told():
    def check(mesh):
        raise ConfigError("rollout.groups is 7")

    with pytest.raises(PlanError, match=r"no mesh of the 8 chips .* rollout\.groups is 7"):
        suggestions.meshes(SLICE, check, lambda mesh: 0)


def test_of_several_plans_the_fastest_that_fits():
    slow = _plan(_phase("rollout", flops=2 * CHIP.flops))
    fast = _plan(_phase("rollout", flops=CHIP.flops))
    large = _plan(_phase("rollout", memory=(14, 2, 1)))
    larger = _plan(_phase("rollout", memory=(14, 2, 2)))
    assert suggestions.best([large, slow, fast]) is fast
    assert suggestions.best([larger, large]) is large
