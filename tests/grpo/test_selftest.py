"""The hardware self-test: it passes here, and what is broken does not."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.grpo import selftest
from sl_jax.grpo.learner import Learner
from sl_jax.grpo.selftest import SelfTestError
from sl_jax.models.attention import Attention
from sl_jax.models.flops import gradient_flops, velocity_flops
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, make_mesh
from sl_jax.training.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]


def test_attention_of_this_platform():
    numbers = selftest.check_attention("xla")
    assert set(numbers) == {"result", "gradient_query", "gradient_key", "gradient_value"}
    assert all(0 < value < 2e-2 for value in numbers.values())


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_attention_of_all_devices_together(name):
    """Splash by its definition, on each device's own part; what TPUs run."""
    layout = Layout(make_mesh(selftest.attention_mesh(8)))
    assert dict(layout.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2}
    selftest.check_attention(name, Attention(name, layout, interpret=True))

    def wrong_lengths(query, key, value, lengths):
        return Attention(name, layout, interpret=True)(query, key, value, lengths[::-1])

    with pytest.raises(SelfTestError, match=r"is above 0\.02"):
        selftest.check_attention(name, wrong_lengths)


def _unscaled(query, key, value, lengths):
    return Attention()(1.1 * query, key, value, lengths)


def _unmasked(query, key, value, lengths):
    return Attention()(query, key, value, None)


@jax.custom_vjp
def _wrong_backward(query, key, value, lengths):
    return Attention()(query, key, value, lengths)


_wrong_backward.defvjp(
    lambda q, k, v, n: (_wrong_backward(q, k, v, n), (q, k, v)),
    lambda kept, g: (*kept, None),
)


@pytest.mark.parametrize("broken", [_unscaled, _unmasked, _wrong_backward])
def test_broken_attention_is_found(broken):
    with pytest.raises(SelfTestError, match=r"is above 0\.02"):
        selftest.check_attention("xla", broken)


def _update(ratio=0.0, log_ratio=0.0, loss=1.0):
    objective = SimpleNamespace(ratio_excess=np.full(4, ratio), policy_loss=np.full(4, loss))
    mismatch = SimpleNamespace(log_ratio=np.full(4, log_ratio))
    steps = [SimpleNamespace(objective=objective, mismatch=mismatch)]
    ramp = np.arange(1.0, 4.0)
    return selftest._Update(ramp, ramp, SimpleNamespace(steps=steps))


def _updates(monkeypatch, *updates):
    """Rollouts and updates that end so, one after the other."""
    left = iter(updates)
    monkeypatch.setattr(selftest, "_updated", lambda *args, **kwargs: next(left))


@pytest.mark.parametrize("wrong", [{"ratio": 1e-7}, {"log_ratio": 0.1}, {"log_ratio": np.nan}])
def test_two_policies_where_there_is_one_are_found(monkeypatch, wrong):
    for change, fails in (({}, False), (wrong, True)):
        _updates(monkeypatch, _update(**change))
        assert selftest.checked(lambda: selftest.check_on_policy("float32")).ok != fails


def test_devices_that_do_not_add_up_are_found(monkeypatch):
    one = _update()
    for change, fails in (({}, False), ({"loss": 1.001}, True)):
        _updates(monkeypatch, _update(**change), one)
        assert selftest.checked(selftest.check_sharded).ok != fails


@pytest.mark.parametrize(("place", "name"), [(0, "samples"), (1, "gradient")])
def test_samples_and_gradients_of_the_same_size_that_differ_are_found(monkeypatch, place, name):
    one = _update()
    other = list(one)
    other[place] = other[place][::-1]
    _updates(monkeypatch, selftest._Update(*other), one)
    assert selftest.checked(selftest.check_sharded).error.startswith(name)


@pytest.mark.parametrize("reward", [0.5, np.nan])
def test_a_reward_that_is_no_number_is_found(monkeypatch, reward):
    def run(config):
        folder = Path(config.workdir)
        writer = MetricsWriter(folder)
        learned = {"learner/gradient_norm/all": 1.0, "learner/micro_batch": 4}
        writer.scalars(1, {"judge/reward_mean": reward, "seconds/all": 1.0} | learned)
        writer.close()
        (folder / "report.html").touch()
        (folder / "adapter").mkdir()

    monkeypatch.setattr(selftest, "run", run)
    monkeypatch.setattr(selftest, "write_designs", lambda *args: None)
    found = selftest.checked(
        lambda: selftest.check_epoch(lambda folder: SimpleNamespace(workdir=folder / "run"))
    )
    assert found.ok == (reward == 0.5)
    assert found.ok or "reward" in found.error


def test_a_check_that_fails_stops_no_other(monkeypatch, tmp_path):
    def compiler(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the compiler\ngave up")

    for name in ("check_attention", "check_on_policy", "check_epoch"):
        monkeypatch.setattr(selftest, name, lambda *_: {"number": 1.5})
    monkeypatch.setattr(selftest, "check_sharded", compiler)
    monkeypatch.setattr(selftest, "check_speed", lambda: {"product": 2.0})
    said = []
    assert not selftest.selftest(None, tmp_path / "found.json", said.append)
    (failed,) = [line for line in said if "FAILED" in line]
    assert failed.startswith("sharded") and "the compiler gave up" in failed
    assert said[-1].startswith("speed") and "ok" in said[-1]
    told = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [name for name, found in told.items() if not found["ok"]] == ["sharded"]


def test_rates_of_the_same_function_are_near(monkeypatch):
    waits = iter([0.0, 0.3, 0.1, 0.2, 0.1, 0.1])
    clock = SimpleNamespace(now=0.0)

    def function():
        clock.now += next(waits)
        return jnp.ones(())

    monkeypatch.setattr(selftest, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert selftest._median_seconds(function) == pytest.approx(0.1)


@pytest.mark.slow
def test_a_learner_that_computes_one_velocity_in_two_ways_is_found(monkeypatch):
    """The check as it is, on a learner whose velocities drift from call to call."""
    velocity, calls = Learner.velocity, itertools.count(1)

    def drifting(self, *args):
        found, pull = velocity(self, *args)
        return found * (1 + 1e-4 * next(calls)), pull

    monkeypatch.setattr(Learner, "velocity", drifting)
    found = selftest.checked(lambda: selftest.check_on_policy("float32"))
    assert not found.ok and "ratio" in found.error


def test_a_result_that_is_no_number_is_no_rate():
    with pytest.raises(SelfTestError, match="not finite"):
        selftest._median_seconds(lambda: jnp.full(3, jnp.nan))


def test_rates_count_a_backward_pass_of_its_own(monkeypatch):
    monkeypatch.setattr(selftest, "_median_seconds", lambda *args: 2.0)
    sizes = (MMDiTConfig(1, 128, 1, 16), LatentGrid(1, 4, 4), 4)
    found = selftest._block_rates(*sizes, jnp.float32, jax.devices()[0])
    once, back = velocity_flops(*sizes), gradient_flops(*sizes)
    assert found["forward"] == pytest.approx(once / 2e12)
    assert found["training"] == pytest.approx((once + back) / 2e12)


def test_faster_than_the_peak_is_found(monkeypatch):
    monkeypatch.setattr(selftest, "peak_flops", lambda devices: 1e6)
    monkeypatch.setattr(selftest, "_product_rate", lambda *args: 1.0)
    monkeypatch.setattr(selftest, "_block_rates", lambda *args: {"forward": 1e-9})
    found = selftest.checked(selftest.check_speed)
    assert not found.ok and "product_share is above" in found.error


@pytest.mark.slow
def test_the_command_on_two_devices(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sl_jax.train", "--selftest"],
        cwd=tmp_path,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All is well: selftest.json" in done.stdout
    checks = json.loads((tmp_path / "selftest.json").read_text())["checks"]
    wanted = {"attention xla", "on policy, float32", "on policy, bfloat16", "sharded", "epoch"}
    assert set(checks) == wanted | {"attention xla, sharded", "speed"}
    assert checks["epoch"]["numbers"]["micro_batch"] > 0
    assert all(found["ok"] for found in checks.values())
    assert checks["sharded"]["numbers"]["devices"] == 2
    assert checks["on policy, float32"]["numbers"]["mismatch_per_clip"] > 0
    assert checks["speed"]["numbers"]["forward"] > 0


def test_without_a_configuration_there_is_nothing_to_train():
    done = subprocess.run(
        [sys.executable, "-m", "sl_jax.train"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "--config=FILE" in done.stdout + done.stderr
