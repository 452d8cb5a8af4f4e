"""A run whose work directory is in a bucket, by the client of Google Cloud Storage.

Killed and started again, it leaves there what an undisturbed one leaves on a disk.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from runner import MINIMAL, ROOT, SERVED, Runner

pytestmark = pytest.mark.system

SETTINGS = MINIMAL | SERVED | {"epochs": 4, "checkpoint.every": 1, "evaluation.every": 2}
# Given the work directories of both runs.
COMPARED = """
import sys
from etils import epath
from event_files import read_events
from runner import differences, left_by
from sl_jax.training.metrics import CLOCKED
from sl_jax.training.status import read_status

disk, bucket = map(epath.Path, sys.argv[1:])
assert differences(left_by(bucket), left_by(disk)) == []

def names(folder):
    return {path.name for path in folder.iterdir()}

assert names(bucket) == names(disk) - {"judge.sqlite3"}, names(bucket)
for folder in ("prompts", "adapter", "judge"):
    assert names(bucket / folder) == names(disk / folder), names(bucket / folder)

status = read_status(bucket)
assert (status.state, status.epoch, status.last_checkpoint) == ("finished", 4, 4), status
assert "</html>" in (bucket / "report.html").read_text()

seen, expected = read_events(bucket), read_events(disk)
assert seen.keys() == expected.keys()
for tag, values in expected.items():
    if not tag.startswith(CLOCKED):  # what the killed start showed already, the next shows again
        assert all(str(value) in map(str, seen[tag]) for value in values), tag
print("all is well")
"""


class InABucket(Runner):
    """Runs that find the bucket."""

    def __init__(self, bucket, *args, **options):
        super().__init__(*args, **options)
        self._bucket = bucket

    def environment(self, count):
        paths = (self._bucket["PYTHONPATH"], ROOT, ROOT / "tests", ROOT / "tests" / "grpo")
        found = super().environment(count) | self._bucket
        return found | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def test_a_run_in_a_bucket_is_killed_and_leaves_what_one_on_a_disk_leaves(
    bucket, servers, judge_token, random_checkpoint, tmp_path
):
    options = {"devices": 1, "token": judge_token}
    runner = InABucket(bucket, random_checkpoint, tmp_path, SETTINGS, **options)
    runner(tmp_path / "disk", (servers,))
    assert not (ROOT / "gs:").exists()
    answers = str(tmp_path / "answers.sqlite3")
    remote = {"workdir": "gs://bucket/run", "judge.cache_path": answers}
    kill = {"phase": "learning", "number": 5, "delay": 0.0}
    folder = tmp_path / "bucket"
    runner(folder, (servers,), remote, kills=[kill], code=-signal.SIGKILL)
    (said,), _ = runner(folder, (servers,), remote)
    assert re.search(r"Going on after epoch [12]\.", said), said
    compared = subprocess.run(
        [sys.executable, "-c", COMPARED, str(tmp_path / "disk" / "run"), "gs://bucket/run"],
        env=runner.environment(1),
        capture_output=True,
        text=True,
    )
    assert "all is well" in compared.stdout, compared.stderr[-4000:]
    assert not (ROOT / "gs:").exists()  # nothing went to the disk instead
