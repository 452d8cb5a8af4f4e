"""Tables of the modulation: rows by index, and what makes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.lora import LoRAConfig, init_adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.modulation import Modulation, ModulationTable, split_time, time_modules

SIGMAS = np.array([1.0, 0.9, 0.3, 0.0], np.float32)
PRODUCTION = MMDiTConfig(60, 128, 24, 3584)


@pytest.fixture
def table():
    draw = np.random.default_rng(0)
    shapes = (2, 3, 6, 4), (2, 3, 6, 4), (3, 2, 4)
    return ModulationTable(
        SIGMAS, Modulation(*(draw.normal(size=s).astype(np.float32) for s in shapes))
    )


def test_a_row_by_index_is_a_modulation_of_batch_one(table):
    row = jax.jit(Modulation.at)(table.rows, 1)
    assert np.array_equal(row.image, table.rows.image[:, 1:2])
    assert np.array_equal(row.text, table.rows.text[:, 1:2])
    assert np.array_equal(row.output, table.rows.output[1:2])


@pytest.mark.parametrize("index", [-1, 3, 7])
def test_an_index_beyond_the_table_gives_nan(table, index):
    found = jax.jit(ModulationTable.only)(table, index)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(found.rows))
    alone = jax.jit(ModulationTable.only)(table._replace(rows=None), index)
    assert np.isnan(alone.sigmas).any()


def test_the_part_for_one_step_is_a_table_of_it(table):
    for index in range(3):
        part = jax.jit(ModulationTable.only)(table, jnp.int32(index))
        assert np.array_equal(part.sigmas, SIGMAS[index : index + 2])
        jax.tree.map(np.testing.assert_array_equal, part.rows, table.rows.at(index))


def test_a_third_of_the_production_model_serves_time_alone():
    shapes = nn.unbox(abstract_params(MMDiT(PRODUCTION, param_dtype=jnp.bfloat16)))
    kept, time = (sum(x.size * 2 for x in jax.tree.leaves(part)) for part in split_time(shapes))
    assert kept + time == 2 * 20_430_407_232
    assert time / (kept + time) == pytest.approx(1 / 3, abs=0.003)
    # The blocks' modulation: two linear layers, width to six widths, in each of sixty.
    assert time > 2 * 60 * 2 * 3072 * 6 * 3072


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("to_q", "img_mlp.net.2", "txt_in"), []),
        (("to_q", "img_mod.1"), ["modulation/img_mod_1"]),
        (("txt_mod.1", "norm_out.linear"), ["modulation/txt_mod_1", "norm_out/linear"]),
        (
            ("linear_1",),
            ["time_text_embed/timestep_embedder/linear_1"],
        ),
    ],
)
def test_adapters_of_what_only_time_passes_are_known(targets, modules):
    shapes = nn.unbox(abstract_params(MMDiT(MMDiTConfig(2, 16, 2, 12, axes_dims_rope=(4, 6, 6)))))
    adapter = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), shapes, LoRAConfig(2, 2.0, targets))
    )
    assert time_modules(adapter.lora) == modules
