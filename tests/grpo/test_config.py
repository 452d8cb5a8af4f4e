"""Configurations that cannot run are refused, each field with its value and what would be right."""

import dataclasses
import itertools
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sl_jax.grpo.config import from_mapping
from sl_jax.parallel.joining import DistributedConfig
from sl_jax.parallel.mesh import RulesConfig
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.training.configuration import ConfigError, distributed_part
from sl_jax.training.flags import packaged

_FILE = Path(__file__).parents[2] / "configs" / "grpo.py"


def _mapping(variant="tiny", **changes):
    """The packaged configuration as a mapping, with `a__b=value` for config.a.b."""
    config = runpy.run_path(str(_FILE))["get_config"](variant).to_dict()
    config["data"]["path"] = "pictures"
    config["rollout"] |= {"groups": 8, "batch_groups": 4, "group_size": 8, "steps": 10}
    config["rollout"] |= {"window_range": (0, 5), "window_size": 2, "dynamics": "flow_sde"}
    config["learner"] |= {"updates": 2, "micro_batch": 32}
    config["evaluation"] |= {"batch": 32}
    for path, value in changes.items():
        *parents, name = path.split("__")
        here = config
        for parent in parents:
            here = here[parent]
        here[name] = value
    return config


@pytest.mark.parametrize(
    ("variant", "devices"),
    [("production", 1), ("tiny", 2), ("gpu1", 1), ("v5e8", 8), ("v5p16", 16), ("hosted", 8)],
)
def test_the_packaged_configurations_are_complete(variant, devices):
    mapping = packaged("grpo", variant).to_dict()
    with pytest.raises(ConfigError) as error:
        from_mapping(mapping, devices)
    # A folder of pictures, and the hosted model's name, are all that they leave to the user.
    left = ["config.data.path is ''"]
    if variant == "hosted":
        left = ["config.judge.endpoints[0].model of https://api.openai.com/v1 is empty"]
    problems = str(error.value).splitlines()[1:]
    assert [left[0] in problem for problem in problems] == [True]
    mapping["data"]["path"], mapping["judge"]["model"] = "pictures", "judge-7b"
    config = from_mapping(mapping, devices)
    assert config.mesh.shape(devices)[1] == (1 if variant in ("tiny", "gpu1") else min(devices, 8))
    if variant == "hosted":
        assert [endpoint.model for endpoint in config.judge.endpoints] == ["judge-7b"]


@pytest.mark.parametrize(("variant", "devices"), [("gpu1", 2), ("v5e8", 4), ("v5p16", 8)])
def test_a_variant_for_other_hardware_is_refused(variant, devices):
    mapping = packaged("grpo", variant).to_dict()
    mapping["data"]["path"] = "pictures"
    with pytest.raises(ConfigError, match=f"which does not fit {devices} devices"):
        from_mapping(mapping, devices)


def test_every_field_can_be_set_in_the_packaged_configuration():
    """Flags change what the file names, and nothing else."""

    def absent(given, built, path="config"):
        for entry in dataclasses.fields(built):
            here, value = f"{path}.{entry.name}", getattr(built, entry.name)
            if entry.name not in given:
                yield here
            elif dataclasses.is_dataclass(value):
                yield from absent(given[entry.name], value, here)

    mapping = _mapping("production")
    assert list(absent(mapping, from_mapping(mapping, 1))) == []


def test_packaged_buckets_reach_two_to_one_both_ways():
    buckets = runpy.run_path(str(_FILE))["get_config"]().data.buckets
    assert (320, 640) in buckets and (640, 320) in buckets and (640, 640) in buckets
    assert all((width, height) in buckets for height, width in buckets)
    assert all(max(b) == 640 and b[0] % 16 == b[1] % 16 == 0 for b in buckets)
    # Up to there a picture is stretched by a sixth at most.
    shapes = sorted(width / height for height, width in buckets)
    assert max(b / a for a, b in itertools.pairwise(shapes)) < 1.34


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_configuration_that_runs(devices):
    config = from_mapping(_mapping(), devices)
    assert config.rollout.window_range == (0, 5)
    assert config.rewards[0] == ("judge", 1.0)


def test_lists_are_tuples():
    config = from_mapping(_mapping(data__buckets=[[64, 64], [64, 32]], data__layers=[2, 3]), 1)
    assert config.data.buckets == ((64, 64), (64, 32))
    assert config.data.layers == (2, 3)


def test_rewards_may_have_options():
    rewards = (("judge", 1.0), ("recomposition_veto", 0.5, {"bound": 0.2}))
    assert from_mapping(_mapping(rewards=rewards), 1).rewards == rewards


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("rollout.group_size", 1, "at least 2"),
        ("rollout.batch_groups", 0, "at least 1"),
        ("rollout.groups", 6, "a multiple of batch_groups × updates = 4 × 2"),
        ("rollout.dynamics", "sde", "one of 'flow_sde'"),
        ("rollout.noise_level", float("nan"), "a finite number"),
        ("rollout.shift", 0.0, "None or a positive number"),
        ("rollout.shift", "auto", "a finite number or None"),
        ("data.buckets", ((64, 60),), "multiples of 16, such as (64, 64)"),
        ("data.buckets", (64, 64), "each (a whole number, a whole number)"),
        ("data.layers", (), "one or more numbers of layers"),
        ("data.layers", (0, 3), "from 1 up"),
        ("data.layers", 3, "a tuple"),
        ("data.path", "", "a folder of pictures"),
        ("data.eval_fraction", 0.0, "config.data.eval_data"),
        ("data.caption", "vlm", "name config.judge.endpoints, or use 'files' or 'prompt'"),
        ("data.caption", True, "one of 'files', 'prompt', 'vlm'"),
        ("rollout.guidance", 0.5, "a number from 1, which is none"),
        ("rollout.max_staleness", 2, "one of 0, 1"),
        ("rollout.max_staleness", True, "one of 0, 1"),
        ("rollout.train_frames", "none", "one of 'all', 'layers'"),
        ("advantage.scale", "judge", "'criterion'"),
        ("data.max_text_tokens", 2000, "from 1 to 1024"),
        ("learner.micro_batch", 24, "a divisor of batch_groups × group_size = 32"),
        ("learner.updates", 0, "at least 1"),
        ("learner.ema", 1.0, "not with, 1"),
        ("learner.stop.kl", 0.0, "None or a positive number"),
        ("learner.stop.clip_fraction", -0.1, "None or a positive number"),
        ("learner.reference", "start", "one of 'base', 'init'"),
        ("lora.rank", 0, "at least 1"),
        ("lora.targets", (), "one or more modules"),
        ("optimizer.learning_rate", 0.0, "a positive number"),
        ("optimizer.learning_rate", "fast", "a finite number"),
        ("advantage.std_floor", -0.1, "0 or more"),
        ("objective.clip_low", -1.0, "a positive value"),
        ("objective.ratio", "exact", "one of 'plain'"),
        ("judge.endpoint", "nobody", "one of 'embedded'"),
        ("judge.weights", (1.0, 2.0), "5 non-negative numbers"),
        ("judge.stage2_weight", 2.0, "0…1"),
        ("judge.min_valid", 1.5, "a share from 0 to 1"),
        ("judge.max_requests", 10, "only servers heed; please name config.judge.endpoints"),
        ("judge.max_tokens", 0, "more than 0"),
        ("judge.hedge_after", -1.0, "more than 0"),
        ("judge.asks", 0, "at least 1"),
        ("judge.prompts", "nowhere", "holds candidate.md and grid.md"),
        ("judge.recorded_pictures", -1, "0 or more"),
        ("judge.render.layout", "pile", "one of 'sheet', 'separate'"),
        ("judge.render.tile_size", 2, "at least 16 pixels"),
        ("judge.request.temperature", -1.0, "0 or more"),
        ("judge.request.structured", "xml", "one of 'auto'"),
        ("judge.request.timeout", 0.0, "seconds above 0"),
        ("judge.cool_down.longest", 0.5, "at least first"),
        ("judge.endpoints", "http://a/v1", "a tuple whose items are each a URL, or a mapping"),
        ("judge.two_stage", "yes", "True or False"),
        ("rewards", (("applause", 1.0),), "one of ['all_blank_veto'"),
        ("rewards", (("recomposition_veto", 1.0),), "at least one that scores"),
        ("rewards", (("judge", 1.0), ("all_blank_veto", 1.0, {"capp": 1})), "capp"),
        ("evaluation.every", 0, "at least 1"),
        ("checkpoint.keep", 0, "at least 1"),
        ("compute.dtype", "float16", "one of 'bfloat16', 'float32'"),
        ("compute.attention", "flash", "one of 'auto', 'xla', 'cudnn', 'splash'"),
        ("compute.remat", "all", "one of 'none', 'block', 'dots'"),
        ("optimizer.name", "sgd", "one of 'adamw', 'muon'"),
        ("rollout.dynamics", "ode", "one of 'flow_sde', 'dance_sde', 'cps'"),
        ("epochs", True, "a whole number"),
        ("epochs", 0, "at least 1"),
        ("seed", -1, "from 0"),
        ("seed", 2**32, "to 4294967295"),
        ("evaluation.seed", 10**15, "to 4294967295"),
        ("judge.max_tokens", 10**23, "whole numbers up to 9007199254740992"),
        ("data.layers", (2**70, 3), "whole numbers up to 9007199254740992"),
        ("optimizer.learning_rate", 1e308, "others up to 3.4e+38"),
        ("rollout.noise_level", 10**400, "whole numbers up to 9007199254740992"),
        ("objective.clip_low", 1e308, "others up to 3.4e+38"),
        ("rollout.groups", 2**31, "at least 1, at most 2147483647"),
        ("rollout.group_size", 2**31, "at most 2147483647"),
        ("lora.rank", 2**31, "at least 1, at most 2147483647"),
        ("optimizer.warmup_steps", 2**31, "0 or more, at most 2147483647"),
        ("optimizer.decay_steps", 2**31, "at most 2147483647"),
        ("judge.request.timeout", 1e38, "at most 2147483647"),
        ("judge.patience", 1e38, "0 or more, at most 2147483647"),
        ("distributed.cpu_devices", 2**31, "1 or more, at most 4096"),
        ("distributed.grace", 1e38, "more than 0 seconds, at most 9223372036"),
        ("workdir", "", "a folder for what"),
        ("rollout", 4, "please give its fields: batch_groups"),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_would_be_right(field, value, right):
    with pytest.raises(ConfigError) as error:
        from_mapping(_mapping(**{field.replace(".", "__"): value}), 1)
    message = str(error.value)
    assert right in message
    shown = f"{value[0][0]}" if field == "rewards" else repr(value).strip("()")
    assert shown.split(",")[0] in message
    assert f"config.{field}" in message


@pytest.mark.parametrize(
    ("changes", "problem", "right"),
    [
        ({"window_range": (8, 12)}, "2 steps does not fit into steps 8 to 11", "within 0 to 10"),
        ({"window_range": (3, 4)}, "2 steps does not fit", "holds at least the window"),
        ({"window_size": 6}, "6 steps does not fit", "holds at least the window"),
        ({"window_size": 0}, "0 steps does not fit", "holds at least the window"),
        ({"noise_level": 0.0}, "noise level 0.0 draws no noise at step 0", "raise the noise level"),
    ],
)
def test_windows_that_cannot_be_trained(changes, problem, right):
    changes = {f"rollout__{name}": value for name, value in changes.items()}
    with pytest.raises(ConfigError) as error:
        from_mapping(_mapping(**changes), 1)
    given = changes.get("rollout__window_range", (0, 5))
    assert f"config.rollout.window_range {given}" in str(error.value)
    assert problem in str(error.value) and right in str(error.value)


def test_a_mesh_that_does_not_fit_the_devices():
    with pytest.raises(ConfigError, match=r"config\.mesh .*data=3.*fit 1 devices; please set one"):
        from_mapping(_mapping(mesh__data=3), 1)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"embed": ("tensr",)}, r"rules.embed is \('tensr',\); .* one of 'data', 'fsdp', 'tensor'"),
        ({"embeds": ("fsdp",)}, r"rules.embeds is unknown .* batch, embed, heads, layers, mlp"),
        ({"embed": ("tensor",)}, r"rules.embed and heads would split one array by 'tensor' twice"),
    ],
)
def test_rules_that_no_array_can_follow(rule, problem):
    mapping = _mapping()
    mapping["mesh"]["rules"] |= rule
    with pytest.raises(ConfigError, match=r"config\.mesh\." + problem):
        from_mapping(mapping, 1)


def test_a_configuration_without_rules_has_the_default_ones():
    mapping = _mapping()
    given = from_mapping(mapping, 1).mesh
    del mapping["mesh"]["rules"]
    assert from_mapping(mapping, 1).mesh == given
    assert given.rules == RulesConfig()


def test_a_window_over_a_noiseless_step():
    """The last step of cps draws no noise."""
    changes = {"rollout__dynamics": "cps", "rollout__noise_level": 0.8}
    assert from_mapping(_mapping(**changes, rollout__window_range=(4, 9)), 1)
    with pytest.raises(ConfigError, match=r"window_range \(4, 10\).*step 9 of 10"):
        from_mapping(_mapping(**changes, rollout__window_range=(4, 10)), 1)


@pytest.mark.parametrize("path", ["rolout", "rollout__groops", "lora__dropout"])
def test_unknown_fields(path):
    with pytest.raises(ConfigError) as error:
        from_mapping(_mapping(**{path: 17}), 1)
    assert f"config.{path.replace('__', '.')} is unknown (its value is 17)" in str(error.value)
    assert "known fields are" in str(error.value)


def test_a_missing_field():
    mapping = _mapping()
    del mapping["epochs"]
    with pytest.raises(ConfigError, match=r"config\.epochs is missing; please give a whole number"):
        from_mapping(mapping, 1)


@pytest.mark.parametrize(
    ("field", "mesh", "devices", "parts"),
    [
        ("rollout__batch_groups", {"data": 1, "fsdp": -1}, 8, 8),
        ("learner__micro_batch", {"data": 2, "fsdp": 4}, 8, 8),
        ("evaluation__batch", {"data": 2, "fsdp": 2, "tensor": 2}, 8, 4),
    ],
)
def test_batches_that_the_mesh_does_not_divide(field, mesh, devices, parts):
    fine = {"rollout__batch_groups": 8, "rollout__groups": 16, "learner__updates": 1}
    mapping = _mapping(**fine | {field: 2})
    mapping["mesh"] |= mesh
    with pytest.raises(ConfigError) as error:
        from_mapping(mapping, devices)
    name = field.replace("__", ".")
    assert f"config.{name} is 2; please use a multiple of data × fsdp = {parts}" in str(error.value)
    assert f"{devices} devices" in str(error.value)


URL = "http://host:8000/v1"


def test_endpoints_are_urls_or_mappings_and_inherit_model_and_key():
    own = {"url": "http://b/v1", "model": "other", "concurrency": 3, "requests_per_minute": 60}
    mapping = _mapping(
        judge__endpoints=[URL, own], judge__model="m", judge__key_env="KEY", judge__max_requests=9
    )
    first, second = from_mapping(mapping, 1).judge.endpoints
    assert first == EndpointConfig(URL, "m", "KEY")
    assert second == EndpointConfig("http://b/v1", "other", "KEY", 3, 60)
    assert from_mapping(mapping, 1).judge.models == ("m", "other")
    graders = from_mapping(_mapping(evaluation__judge=({"url": URL, "model": "g"},)), 1)
    assert graders.evaluation.judge == (EndpointConfig(URL, "g"),)
    assert graders.judge.models == ("embedded",)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        (URL, "[0].model of http://host:8000/v1 is empty: please name it"),
        ({"model": "m"}, "[0].url is missing; please give a text"),
        ({"url": "host:8000", "model": "m"}, "[0].url: the address of a judge should look like"),
        ({"url": "http://h:x/v1", "model": "m"}, "[0].url: the address of a judge should look"),
        ({"url": URL, "model": "m", "concurrency": 0}, "[0].concurrency of http://host:8000/v1 is"),
        ({"url": URL, "model": "m", "tokens_per_minute": 0}, "[0].tokens_per_minute of"),
        ({"url": URL, "model": "m", "speed": 3}, "[0].speed is unknown (its value is 3)"),
        (7, "[0] is 7; please give its fields: concurrency"),
    ],
)
def test_wrong_endpoints_are_named_by_number_and_field(endpoint, said):
    with pytest.raises(ConfigError) as error:
        from_mapping(_mapping(judge__endpoints=(endpoint,)), 1)
    assert f"config.judge.endpoints{said}" in str(error.value)


@pytest.mark.parametrize("field", ["key_env", "api_key", "password"])
def test_a_key_that_was_put_into_the_configuration_is_not_repeated(field):
    endpoint = {"url": URL, "model": "m", field: "sk-s3cret-0123456789"}
    with pytest.raises(ConfigError) as error:
        from_mapping(_mapping(judge__endpoints=(endpoint,)), 1)
    assert field in str(error.value) and "s3cret" not in str(error.value)


def test_endpoints_of_one_name():
    with pytest.raises(
        ConfigError, match=r"config\.judge\.endpoints are called .* a name of its own"
    ):
        from_mapping(_mapping(judge__endpoints=(URL, URL), judge__model="m"), 1)


def test_answers_are_kept_on_a_local_disk():
    fields = {"judge__endpoints": (URL,), "judge__model": "m", "workdir": "gs://bucket/run"}
    with pytest.raises(ConfigError, match=r"config\.judge\.cache_path.*a file on a local disk"):
        from_mapping(_mapping(**fields), 1)
    assert from_mapping(_mapping(**fields, judge__cache_path="/tmp/judge.sqlite3"), 1)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        from_mapping(_mapping(rollout__group_size=1, epochs=0, data__buckets=((8, 8),)), 1)
    for field in ("rollout.group_size", "epochs", "data.buckets"):
        assert f"config.{field}" in str(error.value)


def test_processes_are_configured_apart_from_the_rest():
    mapping = _mapping(distributed__coordinator="host:1", distributed__processes=2)
    mapping["distributed"]["process"] = 1
    mapping["data"]["path"] = ""  # nothing else is looked at
    assert distributed_part(mapping) == DistributedConfig("auto", "host:1", 2, 1, cpu_devices=2)
    assert distributed_part({}) == DistributedConfig()
    mapping["data"]["path"] = "pictures"
    assert from_mapping(mapping, 1).distributed.process == 1
    mapping["distributed"]["process"] = 2
    for build in (distributed_part, lambda wrong: from_mapping(wrong, 1)):
        with pytest.raises(ConfigError, match=r"config\.distributed\.process is 2 of 2"):
            build(mapping)
    with pytest.raises(ConfigError, match="cpu_devices is 0"):
        distributed_part({"distributed": {"cpu_devices": 0}})


@pytest.mark.parametrize("variant", ["production", "tiny"])
def test_every_field_can_be_overridden(variant):
    """A field that is None still knows what it holds: flags are read by it."""

    def typeless(config, path="config"):
        for name in config:
            if isinstance(config[name], ConfigDict):
                yield from typeless(config[name], f"{path}.{name}")
            elif config.get_type(name) is type(None):
                yield f"{path}.{name}"

    config = runpy.run_path(str(_FILE))["get_config"](variant)
    assert list(typeless(config)) == []
    config.rollout.shift = 0.25
    with pytest.raises(TypeError):
        config.rollout.shift = "auto"


def test_captions_from_a_model_are_kept():
    served = {"judge__endpoints": ("http://a/v1",), "judge__model": "m", "data__caption": "vlm"}
    assert from_mapping(_mapping(**served), 1).data.caption == "vlm"
    with pytest.raises(ConfigError, match=r"judge\.cache is False; please set it True"):
        from_mapping(_mapping(**served, judge__cache=False), 1)


def test_criteria_know_no_other_rewards():
    rewards = (("judge", 1.0), ("sl_jax.scoring.rewards.JudgeReward", 1.0))
    with pytest.raises(ConfigError, match=r"leave \['sl_jax.*JudgeReward'\] out"):
        from_mapping(_mapping(advantage__scale="criterion", rewards=rewards), 1)
    from_mapping(_mapping(advantage__scale="criterion"), 1)
