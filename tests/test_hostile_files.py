"""The zoo of hostile files through all that reads pictures: training, two commands, the server."""

import base64
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import hostile_files as zoo
import numpy as np
import pytest
from etils import epath
from PIL import Image

from sl_jax.data import FolderError, TrainStream, scan_folder, standard_buckets
from sl_jax.data.paired import open_paired
from sl_jax.data.pictures import shown
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.stacks import StackError, read_stack
from sl_jax.eval.systems import System
from sl_jax.inference.decomposer import Sampling
from sl_jax.inference.folder import Job, decompose_pictures, find_pictures
from sl_jax.inference.sampling import Decoded
from sl_jax.scoring import EmbeddedJudge, RenderConfig, cases
from sl_jax.scoring.decoding import Limits
from sl_jax.scoring.encoding import RequestConfig, content_of
from sl_jax.scoring.http_server import http_server
from sl_jax.scoring.request import candidate_request
from sl_jax.scoring.rubric import load_prompts
from sl_jax.scoring.server import JudgeServer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd EXIF blocks

ELONGATED = {name: zoo.ABSURD[name] for name in ("strip.png", "wide.png")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return zoo.populate(tmp_path_factory.mktemp("hostile") / "zoo")


def check_named(found, wanted):
    """Every file that is not used is named with its reason, and no other."""
    left = dict(found)
    for name, reason in wanted.items():
        assert left.pop(name, "not named").startswith(reason), name
    assert not left


def test_training_data(folder, caplog):
    index = scan_folder(folder, standard_buckets(64))
    assert {record.name for record in index} == zoo.USED
    check_named({s.name: s.reason for s in index.skipped}, zoo.BROKEN | zoo.ABSURD)
    assert {note.name: note.reason for note in index.notes} == {
        "wrong ending.txt": "not a regular file",
        "animated.txt": "not a regular file",
        "metadata.jsonl": "line 1: not JSON",
    }
    summary = index.summary()
    assert all(shown(name) in summary for name in zoo.BROKEN | zoo.ABSURD)
    assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]*", summary)
    stream = TrainStream(index, groups=4, layers=(3,), threads=2)
    try:
        drawn = {e.path for _ in range(2 * len(index) // 4) for e in next(stream).examples}
    finally:
        stream.close()
    assert drawn == {record.path for record in index} and not stream.failures


class Copies:
    """A decomposer whose layers are copies of the picture."""

    def decoded(self, frames, keys, sampling, batch):
        return Decoded(np.stack([frames] * sampling.layers, axis=1), np.ones(len(frames), bool))


def test_decompose(folder, tmp_path):
    job = Job(epath.Path(tmp_path), Sampling(layers=2, steps=1, size=32), batch=4)
    entries = find_pictures(str(folder))
    outcome = decompose_pictures(entries, job, Copies)
    check_named(
        {os.path.basename(p.path): p.reason for p in outcome.problems},
        zoo.BROKEN | ELONGATED,  # at 32 pixels
    )
    assert all(str(problem).isprintable() for problem in outcome.problems)
    made = {json.loads((f / "layers.json").read_text("utf-8"))["picture"] for f in outcome.written}
    assert made == zoo.USED | {"one pixel.png"}
    assert {path.name for path in tmp_path.iterdir()} == {f.name for f in outcome.written}


def test_patterns_follow_links_that_loop_once(folder):
    found = [entry.path for entry in find_pictures(f"{folder}/**/*.png")]
    assert len(found) == len({path.name for path in found}) > 20


def copies():
    def make(tasks):
        return [
            np.stack([np.dstack([t.sample.source, np.full(t.picture.size, 255, np.uint8)])] * 2)
            for t in tasks
        ]

    return System("copies", "layers", {"kind": "test"}, make)


def test_evaluate(folder, tmp_path, caplog):
    config = EvaluationConfig(str(folder), str(tmp_path / "out"), baselines=False)
    with caplog.at_level(logging.WARNING):
        outcome = evaluate(config, [copies()])
    check_named(
        {entry.picture: entry.reason for entry in outcome.left_out},
        zoo.BROKEN | {"strip.png": "30000x2"},
    )
    used = zoo.USED | {"one pixel.png", "wide.png"}
    assert len(list((tmp_path / "out/results/copies").iterdir())) == len(used)
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert "caf\\xe9" in page and "\x1b" not in page
    told = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert len(told["records"]) == len(used)


@pytest.mark.parametrize("name", sorted(set(zoo.BROKEN) | {"strip.png"}))
def test_layers_that_are_no_layers(folder, tmp_path, name):
    """Of another program that is evaluated, and of designs to train on, at any place."""
    for place in ("0000.png", "0001.png"):
        stack = tmp_path / place / "design"
        stack.mkdir(parents=True)
        for number in range(2):
            (stack / f"{number:04d}.png").write_bytes(
                zoo.encoded(Image.fromarray(zoo.pixels(number)).convert("RGBA"), "PNG")
            )
        assert len(read_stack(stack)) == 2
        (stack / place).unlink()
        (stack / place).symlink_to(folder / name)
        with pytest.raises(StackError, match=place):
            read_stack(stack)
        with pytest.raises(FolderError, match=place):
            open_paired(stack.parent)


@pytest.mark.parametrize("name", sorted(zoo.BROKEN))
def test_documents_that_are_none(folder, tmp_path, name):
    (tmp_path / "a.psd").symlink_to(folder / name)
    with pytest.raises(FolderError, match=r"a\.psd"):
        open_paired(tmp_path)


def test_no_permission_anywhere():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o777)
        (root / "good.png").write_bytes(zoo.good())
        (root / "secret.png").write_bytes(zoo.good(1))
        (root / "secret.png").chmod(0)
        (root / "closed").mkdir()
        (root / "closed" / "x.png").write_bytes(zoo.good(2))
        (root / "closed").chmod(0)
        job = Job(epath.Path(root / "layers"), Sampling(layers=1, steps=1, size=32))
        config = EvaluationConfig(f"{root}/*.png", str(root / "out"), baselines=False)
        with zoo.as_nobody():
            outcome = decompose_pictures(find_pictures(f"{root}/**/*.png"), job, Copies)
            left_out = evaluate(config, [copies()]).left_out
        (root / "closed").chmod(0o755)
    assert len(outcome.written) == 1
    assert [str(p) for p in outcome.problems] == [f"{root}/secret.png: Permission denied"]
    assert [tuple(entry) for entry in left_out] == [("data", "secret.png", "Permission denied")]


@contextmanager
def served(**limits):
    server = JudgeServer(EmbeddedJudge(), limits=Limits(**limits))
    running = http_server(server, port=0)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    server.close()


def asked(picture=None):
    """A request to judge, whose picture may be replaced by the bytes of a file."""
    case = cases.built_cases(32)[0]
    request = candidate_request(case.source, case.clean, load_prompts(), RenderConfig())
    content = content_of(request, RequestConfig())
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        content[-1]["image_url"]["url"] = f"data:image/png;base64,{encoded}"
    body = {"model": "embedded-precise", "messages": [{"role": "user", "content": content}]}
    return json.dumps(body).encode()


def post(root, body):
    """Status and message."""
    request = urllib.request.Request(f"{root}/v1/chat/completions", body)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def test_server():
    """No file of the zoo is the sheet that its legend describes; it says what each is instead."""
    with served(pixels=4_000_000) as root:
        said = {name: post(root, asked(content)) for name, content in zoo.contents().items()}
        assert post(root, asked())[0] == 200
    assert {status for status, _ in said.values()} == {400}
    told = {name: message for name, (_, message) in said.items()}
    assert "data:image/" in told["zero bytes.png"]
    for name in ("junk.jpg", "bomb by size.png", "animated.gif", "phone.heic", "postscript.eps"):
        assert told[name] == "a picture is neither PNG nor JPEG"
    assert "more than 4000000 pixels" in told["bomb below Pillow's limit.png"]
    for name in ("truncated.png", "truncated.jpg", "bomb of scans.jpg"):
        assert told[name] == "a picture is damaged"
    assert "does not fit its legend" in told["mode L.png"]


# ru_maxrss would not do: a new process inherits the peak of the one that started it.
_PEAK = """
import atexit, re, sys
def tell():
    status = open('/proc/self/status').read()
    print('peak', int(re.search(r'HWM:\\s*(\\d+)', status)[1]) // 1024, file=sys.stderr)
atexit.register(tell)
"""
_DOOR = """
import runpy
runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)
"""
_SCAN = """
from sl_jax.data import scan_folder, standard_buckets
print(scan_folder(sys.argv[1], standard_buckets(64), threads=16).summary(), file=sys.stderr)
"""
_SERVE = """
import pathlib, test_hostile_files as test
with test.served() as root:
    for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        if path.is_file() and not path.is_symlink():
            status, message = test.post(root, test.asked(path.read_bytes()))
            assert status == 400, status
            print(test.shown(path.name), message, file=sys.stderr)
    assert test.post(root, test.asked())[0] == 200
"""
_TINY = ("--model=tiny", "--steps=1", "--size=32", "--batch_size=8", "--dtype=float32")


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["training data", "decompose", "evaluate", "server"])
def test_memory_and_time_are_bounded(tmp_path, entry):
    """The real commands, with files of a few kilobytes that unpack to 100 or 190 MB each."""
    folder, out = str(zoo.populate(tmp_path / "zoo")), str(tmp_path / "out")
    side = 5700 if entry == "server" else 7900  # just what is let in
    large = zoo.encoded(Image.new("RGB", (side, side)), "PNG")
    # As many as would be decoded at a time, were it not for the one reader of large pictures.
    for number in range(8 if entry == "training data" else 2):
        (tmp_path / "zoo" / f"large {number}.png").write_bytes(large + bytes([number]))
    program, arguments, code, megabytes = {
        "training data": (_SCAN, [folder], 0, 1200),
        "decompose": (
            _DOOR,
            ["sl_jax.decompose", f"--input={folder}", f"--output={out}", "--layers=1", *_TINY],
            1,
            2500,
        ),
        "evaluate": (
            _DOOR,
            [
                "sl_jax.evaluate",
                f"--data={folder}",
                f"--output={out}",
                "--num_layers=2",
                "--nobaselines",
                *_TINY,
            ],
            1,
            2500,
        ),
        "server": (_SERVE, [folder], 0, 1600),
    }[entry]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + program, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "\x1b[31m" not in done.stderr
    for name in zoo.BROKEN if entry != "server" else zoo.contents():
        assert shown(name) in done.stderr, name
    assert int(re.search(r"peak (\d+)", done.stderr)[1]) < megabytes
