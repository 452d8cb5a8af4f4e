"""What a plan is told of the variants of a run: more passes, more memory."""

import runpy
from pathlib import Path

import jax
import pytest

from sl_jax.checkpoints.source import resolve_model
from sl_jax.grpo.config import from_mapping
from sl_jax.grpo.programs import Programs, workload
from sl_jax.parallel.mesh import Layout, make_mesh, replicated
from sl_jax.planning.phases import bytes_per_chip
from sl_jax.planning.work import count_work

_FILE = Path(__file__).parents[2] / "configs" / "grpo.py"


def _config(rollout, **others):
    """The tiny configuration with other fields of `rollout`, and of parts that are named."""
    settings = runpy.run_path(str(_FILE))["get_config"]("tiny").to_dict()
    settings["data"]["path"] = "pictures"
    for part, fields in (others | {"rollout": rollout}).items():
        settings[part] |= fields
    return from_mapping(settings, 1)


def _programs(others=None, **rollout):
    config = _config(rollout, **(others or {}))
    layout = Layout(make_mesh(config.mesh, jax.devices()[:1]))
    return Programs(config, resolve_model(config.model), layout)


def _first_phases(programs):
    """The first program of each chain: what the learner computes forward, rollout, decoding."""
    return {phase.name: phase for phase in (next(chain) for chain in programs.chains())}


@pytest.fixture(scope="module")
def plain():
    return _first_phases(_programs())


@pytest.mark.parametrize("rollout", [{}, {"ode_method": "heun", "group_noise": "independent"}])
def test_forward_passes_are_those_of_the_program(plain, rollout):
    """What the rollouts of an epoch multiply, by what one sample's forward pass does."""
    config, phases = _config(rollout), _first_phases(_programs(**rollout)) if rollout else plain
    sampled, once = phases["rollout"], plain["learner forward"]
    passes = sampled.calls * count_work(sampled.traced, sampled.trips).flops
    passes /= count_work(once.traced).flops / config.learner.micro_batch
    assert workload(config).rollouts == pytest.approx(passes, rel=0.01)


def test_evaluations_are_those_of_the_whole_run():
    """24 epochs of the tiny configuration evaluate 48 pictures four times, every eighth epoch."""
    plain = _config({}, evaluation={"method": "euler"})
    # Once a batch of four groups of eight: a mean of 1 step together, then 9 each.
    begin = 4 * (1 + 8 * 9)
    assert workload(plain).evaluations * 24 == pytest.approx(4 * 48 * 20 + begin)
    heun = _config({}, evaluation={"method": "heun"})
    assert workload(heun).evaluations * 24 == pytest.approx(4 * 48 * 39 + begin)
    measured = {"method": "euler", "window_share": True}
    share = _config({"group_noise": "independent"}, evaluation=measured)
    alone, spread = 4 * 8 * 10, 4 * 2 * begin  # two batches whose groups share their noise
    assert workload(share).evaluations * 24 == pytest.approx(4 * 48 * 20 + alone + spread)


def test_guidance_doubles_the_passes(plain):
    guided = _first_phases(_programs(guidance=4.0))

    def flops(phase):
        return count_work(phase.traced, phase.trips).flops

    assert flops(guided["learner forward"]) == pytest.approx(
        2 * flops(plain["learner forward"]), rel=0.01
    )
    # Encoding the pictures stays as it is.
    assert 1.7 < flops(guided["rollout"]) / flops(plain["rollout"]) <= 2.0
    assert flops(guided["decode"]) == flops(plain["decode"])
    for name in ("learner forward", "rollout"):
        assert guided[name].weights == 2 * plain[name].weights
        # What lies in the loops over prompts and blocks runs for both prompts.
        path = "jit(_program)/guidance/while/body/closed_call/MMDiT/while/body/dot_general"
        assert guided[name].times(path) == 2 * plain[name].times(path)


def test_staleness_keeps_another_epoch_and_its_adapter(plain):
    programs = _programs(max_staleness=1)
    stale, adapter = _first_phases(programs), bytes_per_chip(programs.adapter.lora)
    assert bytes_per_chip(programs.resident()["sampling adapter"]) == adapter
    rollout = programs._config.rollout
    epoch = rollout.groups // rollout.batch_groups * bytes_per_chip(programs._candidates())
    for name, phase in stale.items():
        more = bytes_per_chip(phase.held) - bytes_per_chip(plain[name].held)
        assert more == epoch + adapter, name
    # The sampling adapter's velocities are computed in all updates, not in the second alone.
    assert stale["learner forward"].calls / plain["learner forward"].calls == 2 / 1.5


def _held(programs):
    """Bytes beside each program, of the learner's both and of what is not the learner's."""
    learner, _, small = programs.chains()
    forward = next(learner)
    # On one device the compiler has no choice.
    whole = replicated(programs._layout.mesh)
    shardings = [whole] * len(jax.tree.leaves(forward.traced.out_info))
    phases = [forward, learner.send(shardings), *small]
    return {phase.name: bytes_per_chip(phase.held) for phase in phases}


def test_a_kl_term_keeps_an_adapter_of_zeros_through_the_update():
    """It stands for the base; where the initial adapter is the reference, that is there anyway."""
    with_kl = {"objective": {"kl_weight": 0.1}, "learner": {"reference": "base"}}
    base, plain = _programs(with_kl), _programs()
    zeros = bytes_per_chip(base.adapter.lora)
    held, more = _held(plain), _held(base)
    learning = {"learner forward", "learner backward", "apply"}
    assert {n for n in held if more[n] == held[n] + zeros} == learning
    assert {n for n in held if more[n] == held[n]} == {"decode", "encode"}
    initial = _programs(with_kl | {"learner": {"reference": "init"}})
    needed = [bytes_per_chip(programs.learning()) for programs in (plain, base, initial)]
    assert needed == [needed[0], needed[0] + zeros, needed[0]]
