"""Micro-batches by the memory of devices: the largest that fits, the same for everybody."""

import dataclasses
import logging
import runpy
from pathlib import Path

import jax
import pytest

from sl_jax.checkpoints.source import resolve_model
from sl_jax.grpo.config import from_mapping
from sl_jax.grpo.micro_batch import derived, with_micro_batch
from sl_jax.grpo.programs import Programs
from sl_jax.grpo.run import _memory
from sl_jax.parallel.mesh import Layout, make_mesh

_FILE = Path(__file__).parents[2] / "configs" / "grpo.py"
_DEVICES = 4


class Setting:
    """The tiny configuration on four devices, whose micro-batch is open."""

    def __init__(self, **compute):
        settings = runpy.run_path(str(_FILE))["get_config"]("tiny").to_dict()
        settings["data"] |= {"path": "pictures", "max_text_tokens": 16}
        settings["learner"]["micro_batch"] = None
        settings["compute"] |= compute
        self.config = from_mapping(settings, _DEVICES)
        self.layout = Layout(make_mesh(self.config.mesh, jax.devices()[:_DEVICES]))
        self.folder = resolve_model(self.config.model)
        self.programs = Programs(self.config, self.folder, self.layout)

    def derived(self, memory):
        return derived(self.programs, self.config, self.layout, memory)


@pytest.fixture(scope="module")
def setting():
    return Setting()


def test_the_largest_that_fits(setting):
    """A little less memory than a size needs, and the next one is taken."""
    memory, found = 1e15, []
    while not found or found[-1].fits:
        found.append(setting.derived(memory))
        memory = found[-1].needed / 0.92 - 1
    *fitting, last = found
    assert [entry.samples for entry in fitting] == [32, 16, 8, 4] and last.samples == 4
    needed = [entry.needed for entry in fitting]
    per_sample = [(needed[i] - needed[i + 1]) / fitting[i + 1].samples for i in range(3)]
    assert per_sample == pytest.approx([per_sample[0]] * 3)
    assert per_sample[0] * 32 < needed[0]  # what is always there comes to it


def test_where_nothing_fits_the_fewest_and_a_warning(setting, caplog):
    with caplog.at_level(logging.INFO):
        found = with_micro_batch(setting.config, setting.folder, setting.layout, 1e6)
    assert found.learner.micro_batch == _DEVICES
    (record,) = [r for r in caplog.records if "Micro-batch" in r.message]
    assert record.levelno == logging.WARNING and "sl_jax.plan" in record.message


def test_what_is_given_stays(setting):
    given = dataclasses.replace(
        setting.config, learner=dataclasses.replace(setting.config.learner, micro_batch=8)
    )
    assert with_micro_batch(given, setting.folder, setting.layout, 1e6) is given


def test_where_memory_is_unknown_small_samples_go_together(setting, monkeypatch):
    assert _memory(_Alone()) is None  # of CPUs
    assert setting.derived(None).samples == 32
    monkeypatch.setattr("sl_jax.grpo.micro_batch._MOST_TOKENS", 3 * setting.programs.tokens)
    assert setting.derived(None).samples == 8


class _Alone:
    def all_gather(self, what, value):
        return [value]


class _Others:
    """Of several processes, whose devices differ."""

    def __init__(self, *others):
        self._others = others

    def all_gather(self, what, value):
        return [value, *self._others]


def test_processes_agree_on_the_smallest_device(monkeypatch):
    monkeypatch.setattr("sl_jax.grpo.run.memory_limit", lambda devices: 16e9)
    assert _memory(_Others(12e9, 32e9)) == 12e9
    assert _memory(_Others(None)) is None


def test_what_is_recomputed_is_not_kept(setting):
    """The tiny configuration keeps everything."""
    block = Setting(remat="block")
    assert 3 * block.programs.kept_bytes(4) < setting.programs.kept_bytes(4)
