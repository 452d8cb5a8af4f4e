"""Tables of the modulation, made from weights on the hosts, against programs that hold them."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline, shard_adapter
from sl_jax.inference import modulation
from sl_jax.inference.decomposer import Decomposer
from sl_jax.inference.modulation import ModulationTables, abstract_table
from sl_jax.models.lora import LoRAConfig, init_adapter
from sl_jax.models.modulation import TIME_PARAMS
from sl_jax.parallel.host_array import HostArray
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

SIGMAS = np.array([1.0, 0.75, 0.4, 0.0], np.float32)


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def _load(folder, layout, adapters, dtype="float32"):
    return load_pipeline(folder, ComputeConfig(dtype, remat="none"), layout, adapters)


@pytest.fixture(scope="module")
def whole(random_checkpoint, layout):
    return _load(random_checkpoint, layout, None)


@pytest.fixture(scope="module")
def lean(random_checkpoint, layout):
    return _load(random_checkpoint, layout, [])


def _adapter(params, *targets):
    fresh = init_adapter(jax.random.key(1), params, LoRAConfig(2, 4.0, targets))
    draw = np.random.default_rng(2)
    moved = jax.tree.map(lambda x: x + draw.normal(0, 0.1, x.shape).astype(x.dtype), fresh.lora)
    return shard_adapter(fresh.replace(lora=moved), params)


def test_what_only_time_passes_stays_on_the_hosts(whole, lean):
    assert not set(TIME_PARAMS) & lean.params.keys()
    assert lean.params.keys() | lean.time_params.keys() == whole.params.keys()
    assert whole.time_params is None
    for path, leaf in traverse_util.flatten_dict(lean.time_params).items():
        wanted = traverse_util.flatten_dict(whole.params)[path]
        assert isinstance(leaf, HostArray)
        assert all(type(shard) is np.ndarray for shard in leaf.shards.values())
        if path[0] == "modulation":  # each device has its share to visit with, and no more
            assert leaf.nbytes == wanted.nbytes and len(leaf.shards) == 8
        assert np.array_equal(leaf.whole(), wanted)


@pytest.mark.parametrize(("dtype", "units"), [("float32", 8), ("bfloat16", 2)])
def test_tables_equal_those_of_a_program_with_all_weights(random_checkpoint, layout, dtype, units):
    """But for rounding: there, devices add up what each made of its part of the inputs."""
    whole, lean = (_load(random_checkpoint, layout, adapters, dtype) for adapters in (None, []))
    tables = ModulationTables(lean)
    table = tables(SIGMAS)
    wanted = jax.jit(lambda p, t: whole.model.apply({"params": p}, t, method="modulate"))(
        whole.params, SIGMAS[:-1]
    )

    def close(found, right):
        assert found.dtype == right.dtype and found.sharding.is_fully_replicated
        found, right = (np.asarray(x, np.float32) for x in (found, right))
        rounding = units * float(jnp.finfo(dtype).eps) * np.abs(right).max()
        np.testing.assert_allclose(found, right, rtol=0, atol=rounding)

    jax.tree.map(close, table.rows, wanted)
    assert np.array_equal(table.sigmas, SIGMAS)
    like = abstract_table(lean.model, 3, layout)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), like) == jax.tree.map(
        lambda a: (a.shape, a.dtype), table
    )
    assert all(a.sharding == b.sharding for a, b in zip(like.rows, table.rows, strict=True))


def test_a_grid_is_computed_once(lean, monkeypatch):
    """While no more than a few others are asked for since."""
    monkeypatch.setattr(modulation, "_KEPT", 2)
    tables = ModulationTables(lean)
    visits = []
    rows = HostArray.rows
    monkeypatch.setattr(HostArray, "rows", lambda *args: visits.append(args[1:]) or rows(*args))
    first = tables(SIGMAS)
    blocks = [visit for visit in visits if visit == (1, 2)]
    assert len(blocks) == 4  # kernels and biases of the second of two blocks
    visits.clear()
    again = tables(SIGMAS.copy())
    assert not visits
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = tables(np.array([1.0, 0.5, 0.0], np.float32))
    assert visits and other.rows.image.shape[1] == 2
    tables(SIGMAS)
    tables(np.array([1.0, 0.6, 0.0], np.float32))  # in place of the other
    visits.clear()
    tables(SIGMAS)
    assert not visits
    tables(np.array([1.0, 0.5, 0.0], np.float32))
    assert visits


def _decomposed(pipeline, adapter):
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (4, 16, 32, 3), np.uint8)
    text = draw.normal(size=(4, 5, 64)).astype(np.float32)
    keys = jax.random.split(jax.random.key(7), 4)
    settings = {"layers": 1, "steps": 2, "method": "heun"}
    decompose = Decomposer(pipeline)
    return np.asarray(decompose(pictures, text, None, keys, **settings, adapter=adapter).layers)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_layers_are_those_of_a_program_with_all_weights(whole, lean, adapted):
    adapter = _adapter(whole.params, "to_q", "img_mlp.net.2") if adapted else None
    found, wanted = (_decomposed(pipeline, adapter).astype(int) for pipeline in (lean, whole))
    assert np.abs(found - wanted).max() <= 1 and wanted.std() > 5


def test_an_adapter_on_the_modulation_keeps_its_weights(random_checkpoint, layout, whole, caplog):
    adapter = _adapter(whole.params, "to_q", "img_mod.1", "txt_mod.1")
    with caplog.at_level(logging.INFO, "sl_jax"):
        kept = _load(random_checkpoint, layout, [_adapter(whole.params, "to_q"), adapter])
    (said,) = (r.getMessage() for r in caplog.records if "modulation" in r.getMessage())
    assert "modulation/img_mod_1, modulation/txt_mod_1" in said and "stay on the accel" in said
    assert kept.time_params is None and kept.params.keys() == whole.params.keys()
    assert ModulationTables(kept)(SIGMAS).rows is None


@pytest.mark.slow
def test_an_adapter_on_the_modulation_changes_layers(whole):
    adapter = _adapter(whole.params, "img_mod.1", "txt_mod.1")
    base, adapted = (_decomposed(whole, a).astype(int) for a in (None, adapter))
    assert np.abs(base - adapted).max() > 5


def test_a_table_refuses_an_adapter_that_it_does_not_know(whole, lean):
    adapter = _adapter(whole.params, "to_q", "img_mod.1")
    with pytest.raises(ValueError, match=r"changes modulation/img_mod_1.*name the adapter when"):
        _decomposed(lean, adapter)
