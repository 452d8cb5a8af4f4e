"""Runs of one configuration as one or several real processes, killed where a test wants it."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy as safetensors
from etils import epath

from sl_jax.checkpoints.orbax import find_step, read_entry
from sl_jax.data import write_designs
from sl_jax.scoring.records import CLOCKED_FIELDS
from sl_jax.training.metrics import read_metrics, repeatable

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("one_process.py")
LIMIT = 900  # seconds, on a busy machine
# What costs little and goes through everything: an epoch takes about 50 ms on an idle core.
MINIMAL = {
    "epochs": 12,
    "data.buckets": ((32, 32),),
    "data.layers": (2,),
    "data.eval_fraction": 0.3,
    "data.caption": "prompt",
    "rollout.groups": 4,
    "rollout.batch_groups": 2,
    "rollout.group_size": 2,
    "rollout.steps": 2,
    "rollout.window_range": (0, 2),
    "rollout.window_size": 1,
    "learner.micro_batch": 4,
    "lora.rank": 2,
    # With random weights every candidate would meet the vetoes, and nothing be learned.
    "rewards": (("judge", 1.0),),
    "judge.recorded_pictures": 0,
    "judge.render.picture_size": 32,
    "judge.render.tile_size": 16,
    "evaluation.every": 5,
    "evaluation.pictures": 2,
    "evaluation.batch": 2,
    "evaluation.steps": 1,
    "evaluation.method": "euler",
    "evaluation.shown": 1,
    "checkpoint.every": 3,
    "distributed.cpu_devices": 1,
    "mesh.data": 1,
    "mesh.fsdp": -1,
}

# Judged by servers as in `served.py`, which see the runner's token.
SERVED = {
    "judge.model": "embedded-precise",
    "judge.key_env": "TEST_JUDGE_TOKEN",
    "judge.max_requests": 10_000,
}
IN_FLIGHT = 8  # requests to a server, at most
PREFLIGHT = 2  # requests to each that every start begins with, and never remembers

# How often a phase may begin before a kill, and seconds from there in which it comes.
MOMENTS = {
    "starting": (1, 8.0),
    "evaluating": (2, 0.05),
    "rollout": (8, 0.03),
    "decoding": (8, 0.02),
    "encoding": (8, 0.01),
    "judging": (8, 0.02),
    "learning": (8, 0.03),
    "recording": (4, 0.01),
    "checkpointing": (2, 0.4),
    "exporting": (1, 0.05),
}


def draw_kill(rng, phase):
    """A random moment in a phase, see `one_process.py`."""
    times, seconds = MOMENTS[phase]
    number, delay = int(rng.integers(times)), float(rng.uniform(0, seconds))
    return {"phase": phase, "number": number, "delay": round(delay, 4)}


class Runner:
    """Starts runs of one base model on one folder of pictures.

    Args:
        model: folder of the base.
        folder: gets the pictures and, where JAX is told no other place, compiled programs, which
            all runs share.
        settings: fields of all configurations.
        devices: of all processes of a run together.
        pictures: how many.
        token: that served judges want to see.
    """

    def __init__(self, model, folder, settings, *, devices, pictures=12, token=""):
        self.model, self.settings, self.devices, self.token = model, settings, devices, token
        self.pictures = folder / "pictures"
        self.programs = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "programs"))
        size, layers = settings["data.buckets"][0][0], max(settings.get("data.layers", (3,)))
        write_designs(self.pictures, "B", range(pictures), size, layers)

    def configuration(self, workdir, servers, fields):
        """As `sl_jax.train` reads it."""
        config = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"]("tiny").to_dict()
        settings = {
            "model": str(self.model),
            "data.path": str(self.pictures),
            "workdir": str(workdir),
            "judge.endpoints": [served.url for served in servers],
            **self.settings,
            **fields,
        }
        for path, value in settings.items():
            *parents, name = path.split(".")
            here = config
            for parent in parents:
                here = here[parent]
            assert name in here, path
            here[name] = value
        return config

    def start(
        self,
        folder,
        servers=((),),
        fields=None,
        own=({}, {}),
        kills=(None, None),
        faults=None,
        inside=(),
    ):
        """One process per list of servers; what they print goes to `printed_0.txt` and so on.

        Args:
            folder: which gets the work directory "run".
            fields: of the configuration of all processes.
            own: fields of each.
            kills: see `one_process.py`, one for each.
            faults: see `one_process.py`, for all.
            inside: of which command, and its arguments, each is the child.
        """
        folder.mkdir(exist_ok=True)
        count = len(servers)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
        started = []
        for index in range(count):
            distributed = {"join": "off"}
            if count > 1:
                distributed = {"coordinator": address, "processes": count, "process": index}
            changed = {**(fields or {}), **own[index]}
            given = {
                "folder": str(folder),
                "devices": self.devices // count,
                "distributed": distributed,
                "config": self.configuration(folder / "run", servers[index], changed),
                "kill": kills[index],
                **(faults or {}),
            }
            arguments = folder / f"arguments_{index}.json"
            arguments.write_text(json.dumps(given))
            printed = folder / f"printed_{index}.txt"
            started.append(self._process(arguments, printed, self.environment(count), inside))
        return started

    def _process(self, arguments, printed, environment, inside):
        command = [*inside, sys.executable, str(PROGRAM), str(arguments)]
        with printed.open("w") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def __call__(self, folder, servers=((),), *args, code=0, meanwhile=None, **options):
        """What each process printed, and the adapters that they leave.

        Args:
            folder, servers: see `start`, as what is not named here.
            code: with which all end, or one for each.
            meanwhile: is called with the processes once they are started.
        """
        started = self.start(folder, servers, *args, **options)
        try:
            if meanwhile:
                meanwhile(started)
            codes = [process.wait(LIMIT) for process in started]
        finally:
            for process in started:
                process.kill()
        said = [(folder / f"printed_{i}.txt").read_text() for i in range(len(started))]
        expected = [code] * len(started) if isinstance(code, int) else list(code)
        assert codes == expected, "\n\n".join(text[-5000:] for text in said)
        return said, [np.load(path) for path in sorted(folder.glob("adapter_*.npz"))]

    def environment(self, count):
        """Of one of so many processes."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "TEST_JUDGE_TOKEN": self.token,
            "JAX_COMPILATION_CACHE_DIR": str(self.programs / str(count)),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # On a busy machine devices wait for each other longer than XLA's 40 s.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices // count} "
            f"--xla_cpu_collective_call_terminate_timeout_seconds={LIMIT}",
        }


def left_by(workdir):
    """All that a run leaves but for what the clock and the servers decide, as name → content.

    Arrays of the newest checkpoint (adapter, average, moments, counters) and the exported adapter
    to the last bit, the position in the data, metrics, and judgements; of the report that it is
    there, to its end. The work directory may be a remote one, and is an absolute path.
    """
    workdir = epath.Path(workdir)
    step = find_step(workdir)
    names = ocp.PyTreeCheckpointHandler().metadata(step / "tree").tree
    tree = {name: read_entry(step, [name]) for name in names}
    found = {
        f"checkpoint {step.name} {jax.tree_util.keystr(path)}": np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found["position"] = (step / "record" / "metadata").read_text()
    report = workdir / "report.html"
    found["report is whole"] = report.exists() and report.read_text().rstrip().endswith("</html>")
    for path in sorted((workdir / "adapter").iterdir()):
        # The header's settings stand in no fixed order, the tensors do.
        tensors = path.suffix == ".safetensors"
        found[f"adapter/{path.name}"] = load_file(path) if tensors else path.read_text()
    for record in read_metrics(workdir):
        for name, value in repeatable(record).items():
            found[f"metrics {record['step']:.0f} {name}"] = value
    for path in sorted((workdir / "judge").glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            row = {k: v for k, v in json.loads(line).items() if k not in CLOCKED_FIELDS}
            found[f"judge/{path.name} {number}"] = json.dumps(row, sort_keys=True)
    return found


def load_file(path):
    """Name → shape and bytes of the tensors of a safetensors file."""
    return {n: (x.shape, x.tobytes()) for n, x in safetensors.load(path.read_bytes()).items()}


def differences(found, expected):
    """Names of what one of two runs left otherwise than the other."""
    return sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
