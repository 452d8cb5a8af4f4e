"""A whole run with planted keys and a judge that repeats its key wherever it can."""

import asyncio
import base64
import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from sl_jax.checkpoints.orbax import read_entry
from sl_jax.data import write_designs
from sl_jax.scoring import CRITERIA, EmbeddedJudge
from sl_jax.training.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parent / "scoring"))

from hostile import MODEL, HostileServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CORE = "plantedJudgeKey0123456789"
KEY = f'sk-"\\/+{CORE}'  # JSON and URLs escape some of it
PLANTED = {
    "JUDGE_KEY": KEY,
    "HF_TOKEN": "hf_plantedHubToken0123456789",
    "WANDB_API_KEY": "plantedWandbKey0123456789abcdef",
    "OPENAI_API_KEY": "sk-plantedOpenAiKey0123456789",
    "AWS_SECRET_ACCESS_KEY": "plantedCloudSecret0123456789",
}
CORES = [CORE, *(value for name, value in PLANTED.items() if name != "JUDGE_KEY")]
LIVE = "<script>alert(1)</script>\x1b[31m\u202e"
ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)
PICTURES = 14
SETTINGS = {
    "model": "tiny",
    "data.buckets": "((32, 32),)",
    "data.layers": "(2,)",
    "data.eval_fraction": "0.3",
    "rollout.groups": "2",
    "rollout.batch_groups": "2",
    "rollout.group_size": "4",
    "rollout.steps": "4",
    "rollout.window_range": "(0, 3)",
    "rollout.window_size": "2",
    "learner.updates": "1",
    "learner.micro_batch": "8",
    "lora.rank": "2",
    "rewards": '(("judge", 1.0), ("spilling.reward", 0.01))',
    "evaluation.pictures": "3",
    "evaluation.steps": "2",
    "evaluation.every": "2",
    "evaluation.shown": "2",
    "checkpoint.every": "1",
    "judge.model": MODEL,
    "judge.key_env": "JUDGE_KEY",
    "judge.cool_down.first": "0.1",
    "judge.cool_down.longest": "0.2",
    "judge.request.timeout": "20.0",
    "judge.max_wait": "60.0",
    "judge.patience": "5.0",
    "judge.min_valid": "0.25",
}
_REWARD = """
import os
import numpy as np

def reward(group, scores):
    if os.environ.get("SPILL"):
        raise RuntimeError("a reward that fails")
    return np.zeros(len(group.candidates))
"""


class Spiller(HostileServer):
    """Judges as the embedded judge does, and tells the key in every other answer."""

    def __init__(self):
        self.locked = False
        self._judge, self._threads = EmbeddedJudge(), ThreadPoolExecutor(1)
        super().__init__(self.trouble)
        self.respond = self.judged

    def judged(self, request):
        """What is right, with hostile reasons."""
        said = self._threads.submit(asyncio.run, self._judge.answer(request)).result()
        verdict = json.loads(str(said))
        for name in set(CRITERIA) & set(verdict):
            verdict[name]["reason"] = f"{LIVE} {KEY} seen"
        return json.dumps(verdict).replace("seen", ESCAPED)

    def trouble(self, number):
        """Every kind in turn, for one request of three."""
        kinds = (self.refused, self.redirected, self.failed, self.broken, self.busy, self.filtered)
        if self.locked:
            return self.refused
        return kinds[number // 3 % len(kinds)] if number > 12 and number % 3 == 0 else None

    async def refused(self, writer, content):
        told = {"error": {"message": f"wrong key {KEY} {LIVE}", "code": KEY}}
        return await self.send(writer, 401, json.dumps(told), [f"www-authenticate: {CORE}"])

    async def redirected(self, writer, content):
        place = f"location: http://127.0.0.1:{self.port}/v1/chat/completions?key={quote(KEY)}"
        return await self.send(writer, 302, f"go to {quote(KEY)}", [place])

    async def failed(self, writer, content):
        return await self.send(writer, 500, f'{{"error": "no {json.dumps(KEY)[1:-1]}, {KEY}')

    async def broken(self, writer, content):
        text = json.dumps({KEY: {KEY: 1}, LIVE: KEY}).replace("planted", "\\u0070lanted")
        return await self.send(writer, 200, self.completion(text))

    async def busy(self, writer, content):
        return await self.send(writer, 429, KEY, [f"retry-after: {CORE}", f"x-key: {CORE}"])

    async def filtered(self, writer, content):
        refusal = f"{LIVE} I do not like {KEY}"
        return await self.send(writer, 200, self.completion("", content=None, refusal=refusal))


def train(server, folder, epochs, **environment):
    """One start of the command; everything that it says."""
    flags = {
        **SETTINGS,
        "data.path": str(folder / "pictures"),
        "workdir": str(folder / "run"),
        "epochs": str(epochs),
        "judge.endpoints": server.url,
    }
    return _said(
        ["sl_jax.train", f"--config={ROOT / 'configs/grpo.py'}:tiny"]
        + [f"--config.{name}={value}" for name, value in flags.items()],
        folder,
        **environment,
    )


def _said(arguments, folder, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        timeout=1200,
        cwd=folder,
        env={
            **os.environ,
            **PLANTED,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
            "SL_JAX_CACHE": str(folder / "cache"),
            "XLA_FLAGS": "",  # one device
            **environment,
        },
    )
    name = f"{len(list(folder.glob('said_*')))}"
    (folder / f"said_{name}").write_bytes(done.stdout + b"\n" + done.stderr)
    return done.returncode, (done.stdout + done.stderr).decode()


def forms(core):
    """A secret as files may hold it."""
    plain = core.encode()
    found = {plain, plain.hex().encode(), core.encode("utf-16-le"), quote(core).encode()}
    # Base64 of it inside of something, by where in three bytes it begins.
    return found | {base64.b64encode(b" " * pad + plain)[4:-4] for pad in range(3)}


def contents(path):
    """The bytes of a file, and of what is compressed in it as a whole."""
    data = path.read_bytes()
    yield data
    for unpack in (zlib.decompress, gzip.decompress):
        try:
            yield unpack(data)
        except (OSError, EOFError, zlib.error):
            continue


def test_no_secret_is_in_anything_that_a_run_leaves(tmp_path):
    write_designs(tmp_path / "pictures", "B", range(PICTURES), 32, 2)
    (tmp_path / "pictures" / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": path.name, "text": f"{LIVE} caption {index}"}) + "\n"
            for index, path in enumerate(sorted((tmp_path / "pictures").glob("*.*")))
        )
    )
    (tmp_path / "spilling.py").write_text(_REWARD)
    with Spiller() as server:
        code, said = train(server, tmp_path, 2)
        assert code == 0, said
        shutil.copy(tmp_path / "run" / "report.html", tmp_path)  # more epochs remove it
        server.locked = True
        code, said = train(server, tmp_path, 3)
        assert code != 0 and "401" in said, said
        server.locked = False
        code, said = train(server, tmp_path, 3, SPILL="1")
        assert code != 0 and "a reward that fails" in said and "Traceback" in said
        evaluation = _evaluated(server, tmp_path)
        shown = [head for head in server.heads if KEY in head]
    assert len(shown) == len(server.heads) > 40  # the server did get the key
    run = tmp_path / "run"
    assert [record["step"] for record in read_metrics(run)] == [0, 1, 2]
    records = "".join(path.read_text() for path in (run / "judge").glob("*.jsonl"))
    assert "[key]" in records and "alert(1)" in records and "[key]" in evaluation
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "alert(1)" in page and "alert(1)</script>" not in page
    read_entry(run / "checkpoints" / "2", ("ema",))  # floats: there is nothing else in it
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"judge.sqlite3", "report.html", "metrics.jsonl", "config.json", "said_2"} <= names
    assert any(name.startswith("events.out") for name in names) and len(files) > 40
    assert any(b"I do not like [key]" in path.read_bytes() for path in files)
    assert all(str(path).isprintable() and "alert" not in str(path) for path in files)
    for path in files:
        for data in contents(path):
            for core in CORES:
                assert not [form for form in forms(core) if form in data], (path, core)
        if path.name.startswith("said_") or path.suffix in (".jsonl", ".json", ".csv", ".html"):
            assert not set("\x1b\u202e") & set(path.read_text("utf-8")), path


def _evaluated(server, folder):
    """The other command that asks a judge: the records of what it was told."""
    design = folder / "made" / "design"
    design.mkdir(parents=True)
    layers = np.full((2, 32, 32, 4), 200, np.uint8)
    for number, layer in enumerate(layers):
        Image.fromarray(layer).save(design / f"{number:04d}.png")
    shutil.copytree(folder / "made", folder / "true")
    flags = {
        "data": str(folder / "true"),
        "layers": f"made={folder / 'made'}",
        "judge": server.url,
        "judge_model": MODEL,
        "judge_key_env": "JUDGE_KEY",
        "output": str(folder / "evaluation"),
    }
    code, said = _said(["sl_jax.evaluate", *(f"--{k}={v}" for k, v in flags.items())], folder)
    assert code in (0, 1), said
    return "".join(p.read_text("latin-1") for p in (folder / "evaluation").glob("judge*"))


def test_the_search_finds_a_secret():
    """However it is stored."""
    for pad in range(6):
        held = f"{'x' * pad}{CORE}, and more".encode()
        stored = (held, held.hex().encode(), base64.b64encode(held))
        assert all(any(form in data for form in forms(CORE)) for data in stored)
