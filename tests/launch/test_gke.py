"""The files of launch/gke: fields that no schema checks, and that what they name is there."""

import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from documents import ROOT, Manifest, blocks, configured, deployment, instructions, manifests, run

from sl_jax.parallel.interrupts import TERMINATED, UNEXPECTED

PLACE = ROOT / "launch" / "gke"
JUDGES = ROOT / "launch" / "judge_pool"
CHIPS_OF_A_HOST = 4  # of v5e slices of more than one host
VERSION = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text()).group(1)
# Of the API jobset.x-k8s.io/v1alpha2, version 0.10.
JOBSET = {"network", "failurePolicy", "replicatedJobs", "successPolicy", "startupPolicy", "suspend"}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
# Of ray.io/v1.
RAY_SERVICE = {"serveConfigV2", "rayClusterConfig", "upgradeStrategy", "excludeHeadPodFromServeSvc"}
RAY_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def learner() -> Manifest:
    return manifests(PLACE / "learner.yaml")["JobSet"]


def job() -> Manifest:
    """The specification of the learner's Job."""
    (replicated,) = learner()["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"} and replicated["replicas"] == 1
    return replicated["template"]["spec"]


def pod() -> Manifest:
    return job()["template"]["spec"]


def container() -> Manifest:
    (found,) = pod()["containers"]
    return found


def service() -> Manifest:
    return manifests(PLACE / "judge_ray.yaml")["RayService"]["spec"]


def ray_pods() -> dict[str, Manifest]:
    """Templates of pods, by what they are for."""
    cluster = service()["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "worker": workers["template"]}


def test_fields_of_the_job_set():
    found = learner()
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(found["spec"]) <= JOBSET
    policy = found["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "restartStrategy", "rules"}
    assert policy["maxRestarts"] > 0
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
    for rule in policy["rules"]:
        assert rule["action"] in ACTIONS
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert set(rule["onJobFailureReasons"]) <= {"PodFailurePolicy", "BackoffLimitExceeded"}
    # A pod that fails ends the Job, of which all pods are one program.
    assert job()["backoffLimit"] == 0 and pod()["restartPolicy"] == "Never"
    assert job()["completionMode"] == "Indexed"


def action(rule: int | None) -> str:
    """What the JobSet does when a Job fails by this rule of its podFailurePolicy, or by none."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if rule is not None:  # in the words of the Job's controller
        reason = "PodFailurePolicy"
        pod = "Container learner for pod a/b failed with exit code 1"
        message = f"{pod} matching FailJob rule at index {rule}"
    for candidate in learner()["spec"]["failurePolicy"]["rules"]:
        patterns = candidate.get("onJobFailureMessagePatterns", [""])
        if reason in candidate["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return candidate["action"]
    return "RestartJobSet"


def rule_of(status: int | None) -> int | None:
    """The rule that a pod fails by which ended with this status, or was disrupted (None)."""
    for index, rule in enumerate(job()["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if "onPodConditions" in rule:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            if status is None:
                return index
        else:
            codes = rule["onExitCodes"]
            assert codes.get("containerName", container()["name"]) == container()["name"]
            assert codes["operator"] == "In"
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
            if status in codes["values"]:
                return index
    return None


@pytest.mark.parametrize(
    ("status", "followed_by"),
    [
        (None, "RestartJobSetAndIgnoreMaxRestarts"),
        (TERMINATED, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, "FailJobSet"),
        (UNEXPECTED, "RestartJobSet"),
        (137, "RestartJobSet"),
        (134, "RestartJobSet"),
    ],
)
def test_what_follows_a_failure(status, followed_by):
    assert action(rule_of(status)) == followed_by


def test_the_slice_and_its_hosts():
    (topology,) = re.findall(r"\dx\d", pod()["nodeSelector"]["cloud.google.com/gke-tpu-topology"])
    chips = int(topology[0]) * int(topology[2])
    resources = container()["resources"]
    assert resources["requests"]["google.com/tpu"] == resources["limits"]["google.com/tpu"]
    assert int(resources["limits"]["google.com/tpu"]) == CHIPS_OF_A_HOST
    assert job()["parallelism"] == job()["completions"] == chips // CHIPS_OF_A_HOST
    annotations = learner()["metadata"]["annotations"]
    exclusive = annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    run = configured(container()["args"], chips)
    assert run.mesh.fsdp * run.mesh.tensor == chips
    assert run.distributed.grace < pod()["terminationGracePeriodSeconds"]


def test_the_learner_asks_the_judge_of_its_namespace():
    judge = manifests(JUDGES / "vllm.yaml")
    settings = configured(container()["args"], 16).judge
    (endpoint,) = settings.endpoints
    port = judge["Service"]["spec"]["ports"][0]["port"]
    address = f"http://{judge['Service']['metadata']['name']}:{port}"
    assert endpoint.url == f"{address}/v1"
    (served,) = judge["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert endpoint.model == served["args"][0]
    (waiting,) = pod()["initContainers"]
    told = {entry["name"]: entry.get("value") for entry in waiting["env"]}
    assert told["JUDGE"] == endpoint.url
    (token,) = container()["env"]
    assert token in waiting["env"]
    (key,) = [entry for entry in served["env"] if entry["name"] == "VLLM_API_KEY"]
    assert endpoint.key_env == token["name"] and token["valueFrom"] == key["valueFrom"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert probe in served
    # Nobody names a namespace: that of kubectl holds for all.
    for path in (PLACE / "learner.yaml", PLACE / "judge_ray.yaml", JUDGES / "vllm.yaml"):
        assert all("namespace" not in found["metadata"] for found in manifests(path).values())


class Judge(BaseHTTPRequestHandler):
    """Answers with one status after the other, the last for ever."""

    asked: ClassVar[list[tuple[str, str]]] = []
    statuses: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(self.statuses[min(len(self.asked), len(self.statuses)) - 1])
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def waited(statuses: list[int], seconds: str) -> subprocess.CompletedProcess[str]:
    """What the container that waits says of a judge which answers so, on this machine."""
    Judge.asked.clear()
    Judge.statuses[:] = statuses
    (container,) = pod()["initContainers"]
    *_, program = container["command"]
    assert program.count("sleep(10)") == 1
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1"
        told = {"JUDGE": address, "JUDGE_WAIT": seconds, "JUDGE_TOKEN": "a-token"}
        quick = program.replace("sleep(10)", "sleep(0.01)")
        done = run(sys.executable, "-c", quick, **told, no_proxy="127.0.0.1")
        server.shutdown()
    return done


@pytest.mark.parametrize("up", [200, 401, 405])
def test_the_judge_is_waited_for_until_it_answers(up):
    done = waited([503, 404, 502, up], "600")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for the judge") == 3
    assert Judge.asked == [("/v1/models", "Bearer a-token")] * 4


def test_a_judge_that_never_answers_is_not_waited_for_for_ever():
    done = waited([503], "0.2")
    assert done.returncode == 1 and "/v1 does not serve (HTTP Error 503" in done.stderr
    # The JobSet is not started again for it: the rule holds for all containers.
    assert "containerName" not in job()["podFailurePolicy"]["rules"][rule_of(1)]["onExitCodes"]


def test_places_that_name_the_judge():
    """Are two, and the README says what stands there with Ray."""
    (waiting,) = pod()["initContainers"]
    places = [*container()["args"], *(str(entry.get("value")) for entry in waiting["env"])]
    assert sum("http://judge-vllm:8000/v1" in place for place in places) == 2
    name = manifests(PLACE / "judge_ray.yaml")["RayService"]["metadata"]["name"]
    assert f"`http://{name}-serve-svc:8000/v1`" in (PLACE / "README.md").read_text()


def test_the_learner_is_on_a_bucket_without_keys():
    settings = configured(container()["args"], 16)
    for path in (settings.workdir, settings.model, settings.data.path):
        assert path.startswith("gs://BUCKET/")
    account = manifests(PLACE / "learner.yaml")["ServiceAccount"]["metadata"]["name"]
    assert pod()["serviceAccountName"] == account
    assert f"/subject/ns/sl-jax/sa/{account}" in (PLACE / "README.md").read_text()
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in (PLACE / "learner.yaml").read_text()
    cache = Path(settings.judge.cache_path)
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert str(cache.parent) in mounts
    assert set(mounts.values()) == {volume["name"] for volume in pod()["volumes"]}


def test_the_image_is_that_of_the_dockerfile():
    path = ROOT / "launch" / "Dockerfile"
    said = dict(instructions(path))  # the last of each kind: of the last stage
    assert json.loads(said["ENTRYPOINT"]) == ["python", "-m", "sl_jax.train"]
    assert "command" not in container()
    assert said["USER"] == str(pod()["securityContext"]["runAsUser"])
    installs = [text for name, text in instructions(path) if name == "RUN"]
    assert any(f"--uid {said['USER']}" in text for text in installs)
    (install,) = [text for text in installs if "pip install" in text]
    extras = re.search(r"extras_require={(.*?)\n    }", (ROOT / "setup.py").read_text(), re.DOTALL)
    for platform in ("cpu", "cuda", "tpu"):
        assert f'"{platform}": ' in extras.group(1)
    assert 'case "$PLATFORM" in cpu | cuda | tpu)' in install
    for file in (path, PLACE / "README.md"):
        assert set(re.findall(r"sl-jax:([\d.]+)-\w+", file.read_text())) == {VERSION}


def test_what_the_image_copies_is_there_and_not_ignored():
    kept = set((ROOT / "launch" / "Dockerfile.dockerignore").read_text().split())
    copied = {
        source
        for name, text in instructions(ROOT / "launch" / "Dockerfile")
        if name == "COPY" and "--from=" not in text
        for source in text.split()[:-1]
    }
    assert {"setup.py", "sl_jax", "configs"} <= copied
    assert all((ROOT / source).exists() for source in copied)
    assert {f"!{source}" for source in copied} == {word for word in kept if word[0] == "!"}


def test_a_wrong_platform_builds_no_image():
    (install,) = [
        text
        for name, text in instructions(ROOT / "launch" / "Dockerfile")
        if name == "RUN" and "pip install" in text
    ]
    done = run("sh", "-c", install, PLATFORM="npu")
    assert done.returncode == 1 and "please use cpu, cuda or tpu" in done.stderr


def test_fields_of_the_ray_service():
    found = manifests(PLACE / "judge_ray.yaml")["RayService"]
    assert found["apiVersion"] == "ray.io/v1"
    assert set(found["spec"]) <= RAY_SERVICE
    cluster = found["spec"]["rayClusterConfig"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) == RAY_GROUP
    for group in (cluster["headGroupSpec"], workers):  # strings, as flags of `ray start`
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    configuration = yaml.safe_load(found["spec"]["serveConfigV2"])
    assert configuration == yaml.safe_load((JUDGES / "ray_vllm.yaml").read_text())
    (config,) = configuration["applications"][0]["args"]["llm_configs"]
    (worker,) = ray_pods()["worker"]["spec"]["containers"]
    assert config["engine_kwargs"]["tensor_parallel_size"] == 1
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"]) * workers["replicas"]
    assert gpus == config["deployment_config"]["num_replicas"]
    wanted = re.search(r"ray\[serve\]==([\d.]+)", (ROOT / "launch" / "_env.sh").read_text())[1]
    assert cluster["rayVersion"] == wanted
    for template in ray_pods().values():
        (one,) = template["spec"]["containers"]
        assert one["image"].startswith(f"rayproject/ray-llm:{wanted}-")
        mounted = {mount["name"] for mount in one.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in template["spec"].get("volumes", ())}
    policy = manifests(PLACE / "judge_ray.yaml")["NetworkPolicy"]["spec"]
    for template in ray_pods().values():
        labels = template["metadata"]["labels"].items()
        assert policy["podSelector"]["matchLabels"].items() <= labels


def test_the_readme_makes_the_bucket_and_the_place_of_images_first():
    (block,) = [b for b in blocks(PLACE / "README.md") if "docker push" in b]
    host, project, name = re.search(r"REGISTRY=(\S+)", block)[1].split("/")
    location = host.removesuffix("-docker.pkg.dev")
    made = re.search(r"gcloud artifacts repositories create (\S+) (.*)", block)
    assert made[1] == name and f"--location={location}" in made[2] and f"={project}" in made[2]
    assert f"gcloud auth configure-docker {host}\n" in block
    assert "gcloud storage buckets create gs://$BUCKET" in block
    assert block.index("configure-docker") < block.index("docker push")


def test_the_readme_fills_in_what_is_yours():
    (block,) = [b for b in blocks(PLACE / "README.md") if "learner.yaml | kubectl" in b]
    (line,) = [line for line in block.splitlines() if line.startswith("sed")]
    done = run("sh", "-c", line.partition(" | ")[0], **SETTINGS | {"BUCKET": "my-bucket"})
    assert done.returncode == 0, done.stderr
    assert "BUCKET" not in done.stdout and "IMAGE" not in done.stdout
    filled = done.stdout.replace(f"{SETTINGS['REGISTRY']}/sl-jax:{VERSION}-tpu", "IMAGE")
    filled = filled.replace("my-bucket", "BUCKET")
    assert list(yaml.safe_load_all(filled)) == list(
        yaml.safe_load_all((PLACE / "learner.yaml").read_text())
    )


def xpk_command() -> list[str]:
    (block,) = [b for b in blocks(PLACE / "README.md") if "xpk workload create" in b]
    for name, value in SETTINGS.items():
        block = block.replace(f"${name}", value)
    assert "$" not in block
    return shlex.split(block.replace("\\\n", " "))


SETTINGS = {
    "CLUSTER": "a-cluster",
    "PROJECT": "a-project",
    "ZONE": "us-west4-a",
    "REGISTRY": "us-docker.pkg.dev/a-project/sl-jax",
    "BUCKET": "BUCKET",
    "JUDGE_TOKEN": "a-token",
}


def test_xpk_trains_what_the_manifest_trains():
    (command,) = [word for word in xpk_command() if word.startswith("--command=")]
    words = shlex.split(command.removeprefix("--command="))
    assert words[:3] == ["python", "-m", "sl_jax.train"]
    theirs, ours = configured(words[3:], 16), configured(container()["args"], 16)
    assert theirs.mesh == ours.mesh and theirs.workdir == ours.workdir
    (endpoint,) = theirs.judge.endpoints
    assert endpoint.url == "http://judge-vllm.sl-jax:8000/v1"


def test_commands_of_the_readme_name_files_that_exist():
    text = (PLACE / "README.md").read_text()
    named = set(re.findall(r"launch/[\w./]+\w", text))
    named |= {f"launch/gke/{name}" for name in re.findall(r"`(\w+\.yaml)`", text)}
    assert all((ROOT / name).exists() for name in named), named
    kept = {path.name for path in PLACE.iterdir()} - {"README.md"}
    assert kept <= {Path(name).name for name in named}


# What needs an environment of its own: .ci/run makes it.


def core_kinds() -> dict[str, dict[str, Any]]:
    """Everything in the manifests that Kubernetes itself has a schema for."""
    found = {}
    for name in ("learner.yaml", "judge_ray.yaml"):
        for kind, document in manifests(PLACE / name).items():
            if kind not in ("JobSet", "RayService"):
                found[kind] = document
    named = {"metadata": {"name": "learner"}}
    found["Job"] = {"apiVersion": "batch/v1", "kind": "Job", "spec": job(), **named}
    for name, template in ray_pods().items():
        template["metadata"]["name"] = name
        found[name] = {"apiVersion": "v1", "kind": "Pod", **template}
    return found


@pytest.mark.system
def test_core_kinds_fit_the_schemas_of_kubernetes(tmp_path):
    documents = core_kinds()
    assert set(documents) == {"ServiceAccount", "Job", "NetworkPolicy", "head", "worker"}
    path = tmp_path / "all.yaml"
    validate = (deployment("kubernetes-validate"), "--strict", "-k", "1.31", "-k", "1.37")
    path.write_text(yaml.safe_dump_all(documents.values()))
    done = run(*validate, str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    for was, broken in (("backoffLimit", "backofLimit"), ("onExitCodes", "onExitCode")):
        text = yaml.safe_dump_all(documents.values())
        assert was in text
        path.write_text(text.replace(was, broken))
        assert run(*validate, str(path)).returncode != 0


@pytest.mark.system
def test_hadolint():
    done = run(deployment("hadolint"), "launch/Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.system
def test_xpk_understands_the_command_of_the_readme(tmp_path):
    program, *words = xpk_command()
    made = tmp_path / "made.yaml"
    dry = ("--dry-run", "--skip-validation", "--project-number=1", f"--output-manifest-file={made}")
    done = run(deployment(program), *words, *dry, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = yaml.safe_load(made.read_text())
    (replicated,) = found["spec"]["replicatedJobs"]
    theirs, ours = replicated["template"]["spec"], job()
    assert theirs["parallelism"] == ours["parallelism"]
    selector = theirs["template"]["spec"]["nodeSelector"]
    assert selector.items() <= ours["template"]["spec"]["nodeSelector"].items()
    (rule,) = theirs["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert {1, TERMINATED} & set(rule["onExitCodes"]["values"]) == {TERMINATED}
    bad = run(deployment(program), *words, "--unknown=1", *dry, HOME=str(tmp_path))
    assert bad.returncode != 0
