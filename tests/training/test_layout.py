"""The layout that a run asks for, and what of it no model can follow."""

import jax
import pytest
from jax.sharding import PartitionSpec

from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_pipeline
from sl_jax.grpo import config as grpo
from sl_jax.grpo.run import run
from sl_jax.parallel.mesh import MeshConfig, RulesConfig
from sl_jax.training import finetune
from sl_jax.training.configuration import ConfigError
from sl_jax.training.flags import packaged
from sl_jax.training.layout import run_layout

_TOO_MANY = r"config\.mesh\.tensor is 4, .* 2 heads .*please use one of 1, 2$"


def _settings(name, model, workdir, variant, **batches):
    settings = packaged(name, variant)
    settings.update(model=str(model), workdir=str(workdir))
    settings.data.path = "pictures"
    settings.mesh.update(data=1, fsdp=2, tensor=4)
    settings.update(batches)
    return settings.to_dict()


def test_heads_are_split_as_far_as_they_go(random_checkpoint):
    assert run_layout(MeshConfig(tensor=2), random_checkpoint).parts("heads") == 2
    one = run_layout(MeshConfig(), random_checkpoint, jax.devices()[:1])
    assert one.mesh.size == 1
    with pytest.raises(ConfigError, match=_TOO_MANY):
        run_layout(MeshConfig(tensor=4), random_checkpoint)
    with pytest.raises(ConfigError, match="tensor is 8"):
        run_layout(MeshConfig(fsdp=1, tensor=-1), random_checkpoint)


def test_rules_lay_out_what_a_run_loads(random_checkpoint):
    def query(config):
        layout = run_layout(config, random_checkpoint)
        pipeline = abstract_pipeline(random_checkpoint, ComputeConfig("float32"), layout, [])
        return pipeline.params["blocks"]["attn"]["to_q"]["kernel"].sharding.spec

    sizes = {"fsdp": 4, "tensor": 2}
    assert query(MeshConfig(**sizes)) == PartitionSpec(None, "fsdp", "tensor")
    rules = RulesConfig(embed=("tensor",), heads=(), mlp=("fsdp",), modulation=())
    assert query(MeshConfig(**sizes, rules=rules)) == PartitionSpec(None, "tensor", None)
    over_both = RulesConfig(embed=(), heads=("tensor", "sequence"), tokens=())
    with pytest.raises(ConfigError, match=r"tensor × sequence is 4, .* 2 heads"):
        run_layout(MeshConfig(tensor=2, sequence=2, rules=over_both), random_checkpoint)


def test_runs_refuse_others(random_checkpoint, tmp_path):
    training = grpo.from_mapping(_settings("grpo", random_checkpoint, tmp_path, "tiny"), 8)
    tuning = finetune.from_mapping(
        _settings("sft", random_checkpoint, tmp_path, "tiny", batch=2), 8
    )
    with pytest.raises(ConfigError, match=_TOO_MANY):
        run(training)
    with pytest.raises(ConfigError, match=_TOO_MANY):
        finetune.fine_tune(tuning, random_checkpoint, None)
    assert not (tmp_path / "config.json").exists()  # nothing was begun
