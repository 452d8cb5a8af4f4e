"""Checksums of arrays: every bit counts, and where it is; how it is laid out does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sl_jax.checkpoints.checksums import checksums
from sl_jax.parallel.mesh import MeshConfig, make_mesh

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def _array(dtype, shape=(3, 8), seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(jnp.asarray(rng.integers(0, 2, shape)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_changes_the_checksum_of_its_array_alone(dtype):
    tree = {"a": {"b": _array(dtype), "c": _array(dtype)}, "d": _array("float32", ())}
    before = checksums(tree)
    assert list(before) == ["a/b", "a/c", "d"] and before["a/b"] == before["a/c"]
    size = tree["a"]["b"].itemsize
    for place in (0, 11, 23):
        for bit in range(8 * size if dtype != "bool" else 1):
            changed = bytearray(tree["a"]["b"].tobytes())
            changed[place * size + bit // 8] ^= 1 << bit % 8
            array = np.frombuffer(bytes(changed), tree["a"]["b"].dtype).reshape(3, 8)
            after = checksums({**tree, "a": {**tree["a"], "b": array}})
            assert after["a/b"] != before["a/b"]
            assert {**after, "a/b": ""} == {**before, "a/b": ""}


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(12)))
def test_places_count(order):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    moved = values.ravel()[list(order)].reshape(3, 4)
    same = np.array_equal(moved, values)
    assert (checksums({"x": moved}) == checksums({"x": values})) == same


@pytest.mark.parametrize("spec", [("fsdp",), (None, "tensor"), ("fsdp", "tensor"), ()])
def test_any_mesh_gives_the_same(spec):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    array = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums([spread]) == checksums([array])


def test_nan_and_signed_zero_are_bits_as_well():
    zero, minus = checksums([np.float32(0.0)]), checksums([np.float32(-0.0)])
    assert zero != minus
    nan = np.array([np.nan, np.inf], np.float32)
    assert checksums([nan]) == checksums([nan.copy()])
