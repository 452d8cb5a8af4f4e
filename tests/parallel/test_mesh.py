"""Meshes, the rule table, and the same numbers on any layout."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from sl_jax.checkpoints.pipeline import abstract_params, shard_adapter
from sl_jax.models.attention import Attention
from sl_jax.models.lora import Adapter, LoRAConfig, init_adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig, unconstrained
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import (
    DEFAULT_RULES,
    TOGETHER,
    Layout,
    MeshConfig,
    RulesConfig,
    batch_sharding,
    batch_shards,
    make_mesh,
    replicated,
)

CONFIG = MMDiTConfig(2, 16, 2, 12, axes_dims_rope=(4, 6, 6))


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)))


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
        (MeshConfig(fsdp=4, tensor=2), 8, (1, 4, 2, 1)),
        (MeshConfig(fsdp=1, sequence=-1), 6, (1, 1, 1, 6)),
    ],
)
def test_axis_sizes(config, devices, shape):
    assert config.shape(devices) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "multiply to 3, which does not fit 8 devices"),
        (MeshConfig(fsdp=4), "multiply to 4, which does not fit 8"),
        (MeshConfig(fsdp=16), "multiply to 16, which does not fit 8"),
        (MeshConfig(tensor=0), "must be positive"),
        (MeshConfig(tensor=-2), "must be positive"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of them −1"),
    ],
)
def test_axis_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        config.shape(8)


def test_meshes_use_each_device_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert batch_shards(mesh) == 4
    part = make_mesh(MeshConfig(tensor=2), jax.devices()[4:])
    assert set(part.devices.flat) == set(jax.devices()[4:]) and part.shape["fsdp"] == 2


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = jax.device_put(np.zeros((3, 8, 5)), batch_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(3, 2, 5)}
    assert jax.device_put(np.zeros(3), replicated(mesh)).sharding.is_fully_replicated


def test_rules_lay_out_by_name(layout):
    assert layout.sharding((6, 8, 4), ("layers", "embed", "heads")).spec == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert layout.sharding((4, 8, 3), ("batch", "tokens", None)).spec == PartitionSpec(
        ("data", "fsdp"), "sequence", None
    )


def test_an_axis_that_cannot_be_divided_is_left_whole(layout):
    spec = layout.sharding((3, 7, 4), ("batch", "embed", "mlp")).spec
    assert spec == PartitionSpec(None, None, "tensor")


def test_rules_can_be_replaced(layout):
    rules = tuple((name, None if name == "embed" else axis) for name, axis in DEFAULT_RULES)
    other = Layout(layout.mesh, rules)
    assert other.sharding((4, 4), ("embed", "mlp")).spec == PartitionSpec(None, "tensor")


TURNED = RulesConfig(embed=("tensor",), heads=(), mlp=("fsdp",), modulation=("fsdp", "sequence"))


def test_configured_rules_are_a_table():
    assert (
        dict(RulesConfig().table)
        == dict(DEFAULT_RULES)
        == {
            **{"batch": ("data", "fsdp"), "tokens": "sequence", "attention_tokens": None},
            **{"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "modulation": "tensor"},
            "layers": None,
        }
    )
    table = dict(TURNED.table)
    assert table["embed"] == "tensor" and table["heads"] is None
    assert table["modulation"] == ("fsdp", "sequence")


def test_a_mesh_axis_splits_an_array_once():
    for rules, named in (
        ({"embed": ("tensor",)}, "embed and heads"),
        ({"layers": ("data", "data")}, "layers would split one array by 'data' twice"),
        ({"tokens": ("sequence", "fsdp")}, "batch and tokens"),
        ({"modulation": ("fsdp", "tensor")}, "embed and modulation"),
    ):
        with pytest.raises(ValueError, match=named):
            RulesConfig(**rules)


def test_which_axes_arrays_have_together(layout, model):
    """Those of parameters, and of activations: what rules may not split by one mesh axis."""
    loss, *variables = model
    parameters = traverse_util.flatten_dict(abstract_params(MMDiT(CONFIG)))
    found = {nn.get_partition_spec(leaf) for leaf in parameters.values()}

    class Noting(Layout):
        def sharding(self, shape, axes):
            found.add(axes)
            return super().sharding(shape, axes)

    jax.eval_shape(partial(loss, Noting(layout.mesh)), *variables)
    names = {frozenset(axes) - {None, "attention_tokens"} for axes in found}
    assert {"batch", "tokens", "heads"} in names and {"layers", "embed", "mlp"} in names
    assert all(any(part <= {*whole} for whole in TOGETHER) for part in names)


def test_every_matrix_of_the_model_is_split(layout):
    """Only vectors may stand whole on every device, and matrices of a dozen rows."""
    for path, leaf in traverse_util.flatten_dict(
        layout.abstract(abstract_params(MMDiT(CONFIG)))
    ).items():
        assert leaf.sharding.mesh == layout.mesh
        spec = leaf.sharding.spec
        if path[-1] != "kernel":
            assert "fsdp" not in spec or path[-1] == "bias", path
        elif path[0] in ("blocks", "modulation"):
            assert spec[0] is None and set(spec[1:]) == {"fsdp", "tensor"}, path
        else:
            assert "fsdp" in spec, path


def random_model(draw, layout):
    """Parameters and an adapter, laid out over the mesh."""
    abstract = layout.abstract(abstract_params(MMDiT(CONFIG)))
    params = jax.tree.map(
        lambda leaf: jax.device_put(
            draw.normal(0, 0.1, leaf.shape).astype(np.float32), leaf.sharding
        ),
        abstract,
    )
    targets = ("to_q", "to_out.0", "net.2", "img_mod.1", "img_in", "proj_out")
    adapter = init_adapter(jax.random.key(0), params, LoRAConfig(4, 8.0, targets))
    lora = jax.tree.map(lambda x: x + draw.normal(0, 0.1, x.shape).astype(x.dtype), adapter.lora)
    return params, shard_adapter(Adapter(lora, adapter.lora_scale), params)


def test_adapters_lie_like_their_kernels(layout):
    _, adapter = random_model(np.random.default_rng(0), layout)
    query, out = (adapter.lora["blocks"]["attn"][name] for name in ("to_q", "to_out_0"))
    split, turned = ("fsdp", "tensor"), ("tensor", "fsdp")  # the kernel's own axis comes first
    assert query["a"].sharding.spec == PartitionSpec(None, split, None)
    assert query["b"].sharding.spec == PartitionSpec(None, None, turned)
    assert out["a"].sharding.spec == PartitionSpec(None, turned, None)
    assert out["b"].sharding.spec == PartitionSpec(None, None, split)
    assert adapter.lora["proj_out"]["a"].sharding.spec == PartitionSpec("fsdp", None)
    scale = adapter.lora_scale["blocks"]["attn"]["to_q"]["scale"]
    assert scale.sharding.is_fully_replicated and scale.shape == (2,)


@pytest.fixture(scope="module")
def model(layout):
    """(mesh, lora, params) → mean square velocity and velocity; and what to call it with."""
    draw = np.random.default_rng(1)
    params, adapter = random_model(draw, layout)
    grid = LatentGrid(1, 2, 2)
    sizes = ((8, 64), (4, 64), (5, 12))
    inputs = [draw.normal(size=(2, *size)).astype(np.float32) for size in sizes]
    lengths, times = np.array([5, 3]), np.array([0.8, 0.1], np.float32)

    def run(module):
        return module(*inputs, lengths, module.modulate(times), grid)

    def loss(mesh, lora, params):
        variables = Adapter(lora, adapter.lora_scale).variables()
        attention, constrain = Attention(shards=mesh), mesh or unconstrained
        velocity = nn.apply(run, MMDiT(CONFIG, attention, constrain=constrain))
        velocity = velocity({"params": params, **variables})
        return jnp.square(velocity).mean(), velocity

    return loss, adapter.lora, params


def compiled(function):
    """Compiling takes longer than computing here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_velocity_does_not_depend_on_the_mesh(layout, model):
    loss, *variables = model
    _, found = compiled(partial(loss, layout))(*variables)
    _, wanted = compiled(partial(loss, None))(*jax.tree.map(np.asarray, variables))
    assert_close(found, wanted)
    # Nor on the rules.
    other = Layout(layout.mesh, TURNED.table)
    shapes = other.abstract(abstract_params(MMDiT(CONFIG)))
    lora, params = variables
    moved = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, shapes)
    query = moved["blocks"]["attn"]["to_q"]["kernel"].sharding.spec
    assert query == PartitionSpec(None, "tensor", None)
    _, found = compiled(partial(loss, other))(lora, moved)
    assert_close(found, wanted)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_mesh(layout, model):
    loss, *variables = model

    def gradients(mesh, variables):
        gradient = jax.grad(partial(loss, mesh), has_aux=True)
        return traverse_util.flatten_dict(compiled(gradient)(*variables)[0])

    found = gradients(layout, variables)
    wanted = gradients(None, jax.tree.map(np.asarray, variables))
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        assert_close(leaf, wanted[path])
