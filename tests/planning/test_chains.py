"""Chains of programs that are compiled one after the other: what they hear, and what is kept."""

import weakref

import jax
import jax.numpy as jnp

from sl_jax.planning import roofline
from sl_jax.planning.compiled import OutOfMemory, compile_program
from sl_jax.planning.phases import Phase
from sl_jax.planning.topologies import topology

CHIP = topology("v5e:1x1")


def _phase(name, size):
    traced = jax.jit(jnp.sin).trace(jax.ShapeDtypeStruct((size,), jnp.float32))
    return Phase(name, traced, 1.0, (), (), (), 0.0)


def test_a_chain_hears_where_results_are_and_one_program_is_there_at_a_time(monkeypatch):
    told, programs = [], []

    def chain():
        told.append((yield _phase("first", 3)))
        told.append((yield _phase("second", 4)))

    def compiled(traced, quick):
        assert all(program() is None for program in programs)
        found = compile_program(traced)
        programs.append(weakref.ref(found))
        return found

    monkeypatch.setattr(roofline, "compile_program", compiled)
    plans = roofline.plan_phases([chain()], CHIP)
    assert [plan.name for plan in plans] == ["first", "second"] and len(programs) == 2
    assert [plan.memory.arguments for plan in plans] == [12, 16]
    assert all(isinstance(sharding, jax.sharding.Sharding) for sharding in told)


def test_what_is_refused_ends_its_chain(monkeypatch):
    told, refused = [], OutOfMemory(2.0, 1.0, "too much")

    def chain():
        told.append((yield _phase("too large", 3)))

    monkeypatch.setattr(roofline, "compile_program", lambda traced, quick: refused)
    (plan,) = roofline.plan_phases([chain()], CHIP)
    assert told == [None] and plan.refused == refused and plan.needed == 2.0
