"""The Ray Serve application for real: two replicas, one of them killed while it judges."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from services import free_ports, wait_for

from sl_jax.scoring import EmbeddedJudge, Group, JudgeWorker, TwoStageJudge, cases
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.pool import JudgePool, PoolConfig

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "launch" / "judge_pool"
DEPLOYMENT = Path(os.environ.get("DEPLOYMENT_VENV", ROOT / ".venv-deployment"))
TOKEN = "a-token-of-the-test"
GROUPS = 40
pytestmark = pytest.mark.system


def descendants(of: int) -> dict[int, str]:
    """The processes below one, with their titles."""
    parents, titles = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = (place / "stat").read_text().rpartition(")")[2].split()
            titles[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace")
            parents[int(place.name)] = int(stat[1])
    below = {of}
    while added := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= added
    return {pid: titles[pid] for pid in below - {of}}


class Cluster:
    """A Ray node of this machine, and the application of `ray_embedded.yaml` on it."""

    def __init__(self, place: Path):
        self.place, (self.port,) = place, free_ports(1)
        self.environment = os.environ | {
            "HOME": str(place),
            "JUDGE_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PLACE),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.logs = {name: place / f"{name}.log" for name in ("ray", "serve")}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts both, and waits until all replicas are there."""
        configuration = yaml.safe_load((PLACE / "ray_embedded.yaml").read_text())
        configuration["http_options"] = {"host": "127.0.0.1", "port": self.port}
        (self.place / "judge.yaml").write_text(yaml.safe_dump(configuration))
        ports = "--port={} --ray-client-server-port={}".format(*free_ports(2))
        node = f"--head --block --num-cpus=4 {ports}"
        small = f"--include-dashboard=false --object-store-memory={100 * 2**20}"
        self._run("ray", "start", *node.split(), *small.split(), f"--temp-dir={self.place}")
        wait_for("Ray", lambda: bool(self.address()), 120)
        self._run("serve", "run", f"--address={self.address()}", str(self.place / "judge.yaml"))
        wait_for("Serve", lambda: self.health() == 200, 180)
        (deployment,) = configuration["applications"][0]["deployments"]
        wait_for("replicas", lambda: len(self.replicas()) == deployment["num_replicas"], 60)

    def _run(self, program: str, *arguments: str) -> None:
        path = DEPLOYMENT / "bin" / program
        assert path.exists(), (
            f"{path} is missing: please run `prepare_deployment FOLDER` of launch/_env.sh, and "
            "name the folder in DEPLOYMENT_VENV"
        )
        for process in self.processes:
            assert process.poll() is None, self.said("ray")
        with self.logs[program].open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [path, *arguments],
                    cwd=self.place,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def stop(self) -> None:
        """Ends all that was started, and all that those have started."""
        below = {pid for process in self.processes for pid in descendants(process.pid)}
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def said(self, program: str) -> str:
        log = self.logs[program]
        return log.read_text(errors="replace") if log.exists() else ""

    def address(self) -> str:
        """Where Ray says that it is started; "" before."""
        found = re.search(r"--address='(.+?)'", self.said("ray"))
        return found.group(1) if found else ""

    def replicas(self) -> list[int]:
        """Processes of the judge's replicas."""
        below = descendants(self.processes[0].pid)
        return sorted(
            p for p, title in below.items() if title.startswith("ray::ServeReplica:judge")
        )

    def health(self) -> int:
        """Status of /health; 0 while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    place = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds Unix sockets
    running = Cluster(place)
    try:
        running.start()
        yield running
    except (AssertionError, TimeoutError) as error:
        error.add_note(running.said("ray")[-2000:] + running.said("serve")[-4000:])
        raise
    finally:
        running.stop()
        shutil.rmtree(place, ignore_errors=True)


def groups() -> list[Group]:
    """Groups of three candidates, each group of other pixels."""
    built = cases.built_cases(48)[0]
    made = []
    for index in range(GROUPS):
        candidates = [built.clean.copy(), built.flawed.copy(), built.clean[:, ::-1].copy()]
        for layers in candidates:
            layers[0, index % 48, :, :3] = 5 * index
        made.append(Group(f"g{index}", built.source, tuple(candidates)))
    return made


def test_no_score_is_lost_with_a_replica(cluster):
    shown = groups()
    url = f"http://127.0.0.1:{cluster.port}/v1"
    endpoint = EndpointConfig(url, "embedded-precise", "JUDGE_TOKEN", concurrency=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_TOKEN", TOKEN)
        pool = JudgePool(PoolConfig((endpoint,), RequestConfig(timeout=60)))
    before = cluster.replicas()
    killed = None
    scored = {}
    with JudgeWorker(TwoStageJudge(pool), concurrency=8) as worker:
        for scores in worker.judge_all(shown):
            scored[scores.group_id] = scores
            if killed is None and len(scored) >= GROUPS // 4:
                killed = before[0]
                os.kill(killed, signal.SIGSTOP)  # so that it holds requests when it dies
                time.sleep(1)
                os.kill(killed, signal.SIGKILL)
    assert pool.metrics()[f"{endpoint.label}/errors"] > 0  # of the requests that it held
    assert killed and set(scored) == {group.group_id for group in shown}
    with JudgeWorker(TwoStageJudge(EmbeddedJudge())) as worker:
        for known in worker.judge_all(shown):
            found = scored[known.group_id]
            assert found.valid.all() and found.two_stage
            for name in ("criteria", "stage1", "stage2", "reward"):
                np.testing.assert_array_equal(getattr(found, name), getattr(known, name))
    wait_for("another replica", lambda: len(cluster.replicas()) == len(before), 120)
    assert killed not in cluster.replicas()


def test_the_token_is_asked_for(cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{cluster.port}/v1/models", timeout=30)
