"""A base from nothing: what a configuration must be, and the stages at the smallest sizes."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from sl_jax.checkpoints.pipeline import ComputeConfig, load_pipeline
from sl_jax.data.procedural import make_design
from sl_jax.inference.tiny_text import make_tiny_text_encoder
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.training import pools
from sl_jax.training.configuration import ConfigError
from sl_jax.training.from_nothing import from_mapping, train
from sl_jax.training.metrics import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "sft_tiny.py"


def _values(**changes):
    config = runpy.run_path(str(CONFIG))["get_config"]()
    with config.unlocked():
        for name, value in changes.items():
            parent, last = f"config.{name.replace('__', '.')}".rsplit(".", 1)
            part = config
            for step in parent.split(".")[1:]:
                part = part[step]
            part[last] = value
    return config.to_dict()


def test_the_file_makes_a_configuration():
    config = from_mapping(_values())
    assert config.stages == ("vae", "flow") and config.vae.optimizer.name == "muon"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("vae", "flwo")}, "each one of 'vae', 'flow'"),
        ({"stages": ()}, "config.stages is ()"),
        ({"data__size": 40}, "config.data.size is 40; please use a multiple of 16"),
        ({"data__layers": ()}, "config.data.layers is (); please use one or more"),
        ({"data__layers": (2, 9)}, "config.data.layers is (2, 9)"),
        ({"data__family": "Z"}, "config.data.family is 'Z'; please use one of ('A', 'B')"),
        ({"vae__batch": 7}, "config.vae.batch is 7; please use an even number"),
        ({"vae__steps": 0}, "config.vae.steps is 0; please use at least 1"),
        ({"vae__steps": 50}, "config.vae.optimizer.warmup_steps is 100"),
        ({"flow__optimizer__decay_steps": -1}, "config.flow.optimizer.decay_steps is -1; please"),
        ({"vae__stepps": 5}, "config.vae.stepps is unknown"),
        ({"flow__optimizer__name": "sgd"}, "config.flow.optimizer.name is 'sgd'"),
        ({"flow__ema": 1.0}, "config.flow.ema is 1.0"),
        ({"flow__held_out_designs": 0}, "config.flow.held_out_designs is 0"),
        ({"flow__mu": 0.0}, "config.flow.mu is 0.0"),
        ({"export_dtype": "int8"}, "'float16', 'float32'"),
        ({"export": str(Path(__file__).parent)}, "exists and is no checkpoint"),
        ({"vae__architecture__dim_mult": (1, 2)}, "config.vae.architecture: vae config: dim_mult"),
        ({"vae__architecture__z_dim": 8}, "config.flow.architecture: in_channels is 64"),
        ({"flow__architecture__axes_dims_rope": (8, 8, 8)}, "config.flow.architecture: axes_dims"),
        ({"workdir": "/nowhere", "stages": ("flow",)}, "please run the stage vae first"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_computed(changes, message):
    with pytest.raises(ConfigError) as error:
        from_mapping(_values(**changes))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 2


def _make_text(folder):
    make_tiny_text_encoder(folder)
    return np.zeros((3, 64), np.float32)


@pytest.mark.slow
def test_both_stages_leave_a_checkpoint(tmp_path, monkeypatch):
    drawn = []

    def draw(family, seeds, size, layers):
        drawn.append(seeds)
        return np.stack([make_design(family, seed, size, layers).layers for seed in seeds])

    monkeypatch.setattr(pools, "draw_designs", draw)
    small = {"steps": 2, "batch": 2, "designs": 4, "optimizer__warmup_steps": 0}
    values = _values(
        workdir=str(tmp_path / "run"),
        export=str(tmp_path / "base"),
        data__size=16,
        data__layers=(2,),
        vae__architecture__base_dim=4,
        flow__architecture__num_layers=1,
        flow__held_out_designs=3,
        **{f"{stage}__{name}": value for stage in ("vae", "flow") for name, value in small.items()},
    )
    config = from_mapping(values)
    assert train(config, _make_text) == tmp_path / "base"
    layout = Layout(make_mesh(MeshConfig()))
    pipeline = load_pipeline(tmp_path / "base", ComputeConfig("float32"), layout)
    assert pipeline.scheduler.shift == config.flow.mu
    for stage, metric in (("vae", "vae/held_out_l1"), ("flow", "flow/held_out_mse")):
        (record,) = [r for r in read_metrics(tmp_path / "run" / stage) if metric in r]
        assert record["step"] == 2 and np.isfinite(record[metric])
    count = len(drawn)
    train(config, _make_text)
    assert count == len(drawn) == 4  # kept latents and the finished autoencoder are used
    with pytest.raises(ConfigError, match=r"config\.flow\.mu: 2\.5 there, 3\.0 here"):
        train(from_mapping(values | {"flow": values["flow"] | {"mu": 3.0}}), _make_text)
