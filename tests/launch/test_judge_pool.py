"""The files of launch/judge_pool say what the programs that they start really do."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
import yaml
from documents import ROOT, Manifest, deployment, run

from sl_jax.scoring import Group, RenderConfig
from sl_jax.scoring.request import candidate_request, grid_request, shuffle
from sl_jax.scoring.rubric import load_prompts

PLACE = ROOT / "launch" / "judge_pool"
MANIFESTS = ("embedded.yaml", "vllm.yaml")
TOKEN = "a-token-of-the-test"
VLM = "Qwen/Qwen2.5-VL-7B-Instruct"
FRONTEND = {"host", "port", "data_parallel_size", "disable_access_log_for_endpoints"}


def manifests(name: str) -> dict[str, Manifest]:
    """The documents of a file by kind."""
    return documents.manifests(PLACE / name)


def pod_of(found: dict[str, Manifest]) -> Manifest:
    return found["Deployment"]["spec"]["template"]["spec"]


def container_of(found: dict[str, Manifest]) -> Manifest:
    (container,) = pod_of(found)["containers"]
    return container


def flags_of(arguments: list[str]) -> dict[str, Any]:
    """Flags by name as in Python, given as `--name=value` or `--name value`; JSON is read."""
    words = [
        part for word in arguments for part in (word.split("=", 1) if word[:2] == "--" else [word])
    ]
    pairs = zip(words[::2], words[1::2], strict=True)
    return {name.removeprefix("--").replace("-", "_"): _value(text) for name, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile."""
    return documents.instructions(PLACE / name)


def endpoints_of_the_readme() -> dict[str, str]:
    """The model of each address that a learner is told."""
    text = (PLACE / "README.md").read_text()
    return dict(re.findall(r'"url": "(.+?)",\s+"model": "(.+?)"', text))


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_parts_of_a_manifest_find_each_other(name):
    found = manifests(name)
    deployment, pod, container = found["Deployment"], pod_of(found), container_of(found)
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    if "NetworkPolicy" in found:
        selectors.append(found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    assert all(selector and selector.items() <= labels for selector in selectors)
    (port,), (service,) = container["ports"], found["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"] and service["port"] == port["containerPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    startup = container["startupProbe"]
    deadline = deployment["spec"].get("progressDeadlineSeconds", 600)  # Kubernetes' default
    assert startup["periodSeconds"] * startup["failureThreshold"] < deadline
    assert pod["enableServiceLinks"] is False  # VLLM_PORT and the like are settings of vLLM
    assert {mount["name"] for mount in container.get("volumeMounts", ())} == {
        volume["name"] for volume in pod.get("volumes", ())
    }
    assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]
    assert pod["terminationGracePeriodSeconds"] > int(
        container["lifecycle"]["preStop"]["exec"]["command"][1]
    )


def test_both_take_their_token_from_the_secret_that_the_readme_makes():
    made = 'kubectl create secret generic judge-token --from-literal=token="$JUDGE_TOKEN"'
    assert made in (PLACE / "README.md").read_text()
    for name, variable in (("embedded.yaml", "JUDGE_TOKEN"), ("vllm.yaml", "VLLM_API_KEY")):
        assert made in (PLACE / name).read_text()
        variables = {entry["name"]: entry for entry in container_of(manifests(name))["env"]}
        secret = variables[variable]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": "judge-token", "key": "token"}


def test_the_image_and_the_manifest_are_of_one_piece():
    container = container_of(manifests("embedded.yaml"))
    said = dict(instructions("Dockerfile"))  # the last of each kind: of the last stage
    assert json.loads(said["ENTRYPOINT"]) == ["python", "-m", "sl_jax.judge"]
    assert "command" not in container
    image, manifest = flags_of(json.loads(said["CMD"])), flags_of(container["args"])
    assert image.items() <= manifest.items()
    port = container["ports"][0]["containerPort"]
    assert manifest["port"] == int(said["EXPOSE"]) == port
    assert f"http://127.0.0.1:{port}/health" in said["HEALTHCHECK"]
    user = str(pod_of(manifests("embedded.yaml"))["securityContext"]["runAsUser"])
    assert said["USER"] == user
    assert any(
        f"--uid {user}" in text for name, text in instructions("Dockerfile") if name == "RUN"
    )
    version = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text()).group(1)
    assert container["image"] == f"sl-jax-judge:{version}"
    for name in ("Dockerfile", "README.md"):
        tags = re.findall(r"sl-jax-judge(?:-ray)?:([\w.]+)", (PLACE / name).read_text())
        assert set(tags) == {version}


def test_what_the_image_copies_is_there_and_not_ignored():
    kept = set((PLACE / "Dockerfile.dockerignore").read_text().split())
    copies = [
        text.split()[:-1]
        for name, text in instructions("Dockerfile")
        if name == "COPY" and "--from=" not in text
    ]
    sources = [source for copied in copies for source in copied]
    assert {"setup.py", "sl_jax"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert {f"!{source}", f"!{Path(source).parent}"} & kept, source
    installs = [text for name, text in instructions("Dockerfile") if name == "RUN"]
    assert sum("[judge]" in text for text in installs) == 2


def test_the_door_serves_what_the_manifest_says():
    container = container_of(manifests("embedded.yaml"))
    served = (PLACE / "embedded.yaml").read_text()
    (model,) = re.findall(r"model\n?#? ?(embedded-\w+)", served)
    command = [sys.executable, "-m", "sl_jax.judge", *container["args"]]
    process = subprocess.Popen(
        [*command, "--host=127.0.0.1", "--port=0"],  # the last of a flag counts
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, container["env"][0]["name"]: TOKEN},
    )
    try:
        found = re.search(r"Judge (\S+) at (http://127\.0\.0\.1:\d+)/v1", process.stdout.readline())
        assert found.group(1) == model
        path = container["readinessProbe"]["httpGet"]["path"]
        with urllib.request.urlopen(found.group(2) + path, timeout=20) as reply:
            assert reply.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(found.group(2) + "/v1/models", timeout=20)
    finally:
        process.terminate()
        process.wait(60)
    assert endpoints_of_the_readme()["http://judge-embedded:8000/v1"] == model


class Vllm:
    """A stand-in that writes down how it was called."""

    def __init__(self, place: Path):
        self.place = place
        self.program = place / "bin" / "vllm"
        self.program.parent.mkdir()
        self.program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            'json.dump([sys.argv[1:], os.environ.get("VLLM_API_KEY")], open("call.json", "w"))\n'
        )
        self.program.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(PLACE / "vllm.sh"), *arguments],
            cwd=self.place,
            env={"PATH": f"{self.program.parent}:/usr/bin:/bin"} | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self, *arguments: str, **variables: str) -> tuple[list[str], str | None]:
        """The arguments and the key that vLLM was started with."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        words, key = json.loads((self.place / "call.json").read_text())
        return words, key


@pytest.fixture
def vllm(tmp_path) -> Vllm:
    return Vllm(tmp_path)


def test_script_manifest_and_ray_start_the_same_vllm(vllm):
    container = container_of(manifests("vllm.yaml"))
    words, key = vllm.called(HOST="0.0.0.0", JUDGE_TOKEN=TOKEN)
    assert words == [*container["command"][1:], *container["args"]]
    assert key == TOKEN and TOKEN not in " ".join(words)
    assert words[:2] == ["serve", VLM]
    flags = flags_of(words[2:])
    assert flags["port"] == container["ports"][0]["containerPort"]
    (application,) = yaml.safe_load((PLACE / "ray_vllm.yaml").read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    assert config["model_loading_config"] == {"model_id": VLM}
    assert config["engine_kwargs"] == {k: v for k, v in flags.items() if k not in FRONTEND}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == flags["tensor_parallel_size"] * flags["data_parallel_size"]
    assert endpoints_of_the_readme()["http://judge-vllm:8000/v1"] == VLM


def test_the_script_takes_a_model_variables_and_further_arguments(vllm):
    words, key = vllm.called(
        "other/model", "--seed", "7", LAYERS="8", GPUS="2", REPLICAS="3", PORT="9", CONTEXT="100"
    )
    flags = flags_of(words[2:])
    assert words[:2] == ["serve", "other/model"] and flags["seed"] == 7 and key is None
    assert (flags["host"], flags["port"], flags["max_model_len"]) == ("127.0.0.1", 9, 100)
    assert (flags["tensor_parallel_size"], flags["data_parallel_size"]) == (2, 3)
    assert flags["limit_mm_per_prompt"] == {"image": 26, "video": 0}
    assert vllm.called("--seed", "7")[0][:2] == ["serve", VLM]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HOST": "0.0.0.0"}, "export JUDGE_TOKEN"),
        ({"HOST": "0.0.0.0", "JUDGE_TOKEN": "short"}, "too short"),
        ({"VLLM": "/nowhere/vllm"}, "pip install vllm"),
    ],
)
def test_the_script_refuses(vllm, variables, words):
    done = vllm.run(**variables)
    assert done.returncode == 1 and words in done.stderr
    assert not (vllm.place / "call.json").exists()


def test_usage_needs_no_vllm(tmp_path):
    done = subprocess.run(
        ["bash", str(PLACE / "vllm.sh"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "MAX_PIXELS" in done.stdout


def test_requests_fit_the_limits_of_vllm():
    """Four layers of 640 pixels, and 24 candidates in a grid: neither refused nor shrunk."""
    (application,) = yaml.safe_load((PLACE / "ray_vllm.yaml").read_text())["applications"]
    limits = application["args"]["llm_configs"][0]["engine_kwargs"]
    source, prompts = np.zeros((640, 640, 3), np.uint8), load_prompts()
    group = Group("g", source, (np.zeros((4, 640, 640, 4), np.uint8),) * 24)
    sheet, separate = (
        candidate_request(source, group.candidates[0], prompts, RenderConfig(layout=layout))
        for layout in ("sheet", "separate")
    )
    arrangement = shuffle(range(24), 0, "g", 0)
    grid = grid_request(group, arrangement, np.ones(24), prompts, RenderConfig())
    counts = []
    for request in (sheet, separate, grid):
        shown = [part for part in request.parts if not isinstance(part, str)]
        text = sum(len(part) for part in request.parts if isinstance(part, str))
        counts.append(len(shown))
        sizes = [picture.shape[:2] for picture in shown]
        largest = max(height * width for height, width in sizes)
        assert largest <= limits["mm_processor_kwargs"]["max_pixels"]
        # Sides are rounded to whole tokens; a letter is at most a token; 1024 for the answer.
        tokens = sum((height // 28 + 1) * (width // 28 + 1) for height, width in sizes)
        assert tokens + text + 1024 <= limits["max_model_len"]
    assert counts == [1, limits["limit_mm_per_prompt"]["image"], 1]


def test_ray_serves_as_the_door_does():
    configuration = yaml.safe_load((PLACE / "ray_embedded.yaml").read_text())
    (application,) = configuration["applications"]
    container = container_of(manifests("embedded.yaml"))
    flags = flags_of(container["args"])
    assert configuration["http_options"] == {"host": flags["host"], "port": flags["port"]}
    assert application["args"]["token_env"] == flags["token_env"]
    module, function = application["import_path"].split(":")
    assert f"def {function}(" in (PLACE / f"{module}.py").read_text()
    assert application["deployments"][0]["num_replicas"] >= 2


def test_one_version_of_ray():
    wanted = set(re.findall(r"ray\[serve\]==([\d.]+)", (ROOT / "launch" / "_env.sh").read_text()))
    assert len(wanted) == 1
    for name in ("README.md", "ray_vllm.yaml"):
        assert set(re.findall(r"ray\[\w+\]==([\d.]+)", (PLACE / name).read_text())) == wanted
    assert dict(_arguments())["RAY"] in wanted
    images = {container_of(manifests("vllm.yaml"))["image"].rpartition(":v")[2]}
    assert images == set(re.findall(r"vllm==([\d.]+)", (PLACE / "vllm.sh").read_text()))


def _arguments() -> list[list[str]]:
    return [text.split("=") for name, text in instructions("Dockerfile") if name == "ARG"]


def test_commands_of_the_readme_name_files_that_exist():
    text = (PLACE / "README.md").read_text()
    named = set(re.findall(r"launch/judge_pool/[\w.]+", text))
    named |= {
        f"launch/judge_pool/{name}" for name in re.findall(r"`([\w]+\.(?:sh|yaml|py))`", text)
    }
    assert all((ROOT / name).exists() for name in named)
    kept = {path.name for path in PLACE.iterdir() if path.is_file()}
    unnamed = kept - {Path(name).name for name in named}
    assert unnamed == {"README.md", "Dockerfile.dockerignore"}


# What needs an environment of its own: .ci/run makes it.


@pytest.mark.system
def test_shellcheck():
    done = run("shellcheck", "-x", "launch/judge_pool/vllm.sh")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
def test_hadolint(tmp_path):
    done = run(deployment("hadolint"), str(PLACE / "Dockerfile"))
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && pip install x\n")
    assert run(deployment("hadolint"), str(tmp_path / "Dockerfile")).returncode != 0


@pytest.mark.system
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas_of_kubernetes(name, tmp_path):
    validate = (deployment("kubernetes-validate"), "--strict", "-k", "1.28", "-k", "1.37")
    done = run(*validate, str(PLACE / name))
    assert done.returncode == 0, done.stdout + done.stderr
    broken = (PLACE / name).read_text().replace("containerPort: 8000", "containerPort: eight")
    (tmp_path / name).write_text(broken)
    assert run(*validate, str(tmp_path / name)).returncode != 0


_CHECK_SERVE = """
import sys, yaml
from ray.serve.schema import ServeDeploySchema
for path in sys.argv[1:]:
    ServeDeploySchema.model_validate(yaml.safe_load(open(path)))
import ray_app
from pydantic import ValidationError
(application,) = yaml.safe_load(open(sys.argv[1]))["applications"]
ray_app.build(ray_app.Arguments(**application["args"]))
for wrong in ({"mod": "vlm"}, {"mode": "bold"}, {"threads": 0}):
    try:
        ray_app.Arguments(**wrong)
    except ValidationError:
        continue
    raise SystemExit(f"{wrong} was taken")
import importlib.util
print(*[name for name in ("jax", "flax", "torch") if importlib.util.find_spec(name)], "valid")
"""


@pytest.mark.system
def test_ray_configurations_fit_the_schema_of_serve_and_need_no_jax():
    paths = [str(PLACE / name) for name in ("ray_embedded.yaml", "ray_vllm.yaml")]
    done = run(deployment("python"), "-c", _CHECK_SERVE, *paths, PYTHONPATH=str(PLACE))
    assert done.stdout.split() == ["valid"], done.stdout + done.stderr
