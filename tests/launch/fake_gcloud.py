"""A stand-in for gcloud: TPU VMs are files, and their hosts folders, each the home of a user.

`python fake_gcloud.py compute tpus …` writes down how it was called, and does on this machine what
gcloud does on Google's. The folder of the variable FAKE_CLOUD holds `calls.jsonl`; `vm.json` and
`request.json`, what is there; and `trouble.json`, how often ssh, scp and create fail.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CLOUD = Path(os.environ["FAKE_CLOUD"])
VM, REQUEST, TROUBLE = (CLOUD / f"{name}.json" for name in ("vm", "request", "trouble"))
HOSTS = {"v5litepod-8": 1, "v5litepod-16": 2}  # the latter has four
LOST = 255  # of ssh without a connection


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(load(path) | fields))


def fail(message: str, status: int = 1) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


def fail_if_there_is_trouble(verb: str) -> None:
    left = load(TROUBLE).get(verb, 0)
    if left:
        save(TROUBLE, **{verb: left - 1})
        fail("no more capacity" if verb == "create" else "no connection", LOST)


def homes(worker: str) -> list[Path]:
    if load(VM).get("state") != "READY":
        fail("the TPU VM is not READY", LOST)
    found = sorted(CLOUD.glob("host*"))
    return found if worker == "all" else [found[int(worker)]]


def make(kind: str) -> None:
    save(VM, state="READY", acceleratorType=kind)
    for host in range(HOSTS[kind]):
        (CLOUD / f"host{host}").mkdir()


def delete() -> None:
    VM.unlink(missing_ok=True)
    for home in CLOUD.glob("host*"):
        shutil.rmtree(home)


def describe(path: Path, field: str) -> None:
    known = load(path)
    if not known:
        fail("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    print(known[field])
    if path == REQUEST and known["state"] == "WAITING_FOR_RESOURCES":  # for one look
        make(known["type"])
        save(REQUEST, state="ACTIVE")


def ssh(worker: str, command: str) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH")}
    started = [
        subprocess.Popen(["bash", "-c", command], cwd=home, env=kept | {"HOME": str(home)})
        for home in homes(worker)
    ]
    sys.exit(max(process.wait() % 256 for process in started))


def main(words: list[str]) -> None:
    with (CLOUD / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    names = [word for word in words if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    assert "quiet" in flags, "it would ask the user"
    kind, verb = flags.get("accelerator-type"), names[3]
    fail_if_there_is_trouble(verb)
    match names:
        case ["compute", "tpus", group, "describe", _]:
            field = flags["format"].removeprefix("value(").removesuffix(")").rpartition(".")[2]
            describe(VM if group == "tpu-vm" else REQUEST, field)
        case ["compute", "tpus", "tpu-vm", "create", _]:
            make(kind)
        case ["compute", "tpus", "queued-resources", "create", name]:
            save(REQUEST, name=name, type=kind, state="WAITING_FOR_RESOURCES")
        case ["compute", "tpus", "tpu-vm", "delete", _]:
            delete()
        case ["compute", "tpus", "queued-resources", "delete", _] if "force" in flags:
            REQUEST.unlink()
            delete()
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            for home in homes(flags["worker"]):
                shutil.copy(source, home / target.partition(":")[2])  # with its mode
        case ["compute", "tpus", "tpu-vm", "ssh", _]:
            ssh(flags["worker"], flags["command"])
        case _:
            fail(f"{words} is not understood")


if __name__ == "__main__":
    main(sys.argv[1:])
