"""The README's commands: each is run here, or by the test that is named, or says what it needs.

A command says so in its comment, or its block in the first line; see `MARK`.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import uvicorn
from PIL import Image

from sl_jax.data import write_designs
from sl_jax.scoring import EmbeddedJudge
from sl_jax.scoring.server import JudgeServer
from sl_jax.training.flags import packaged, packaged_file, read_config
from sl_jax.training.status_screen import EXIT_CODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Hardware, a network, or hours.
MARK = re.compile(r"\b(needs (the hardware|the network|a second host)|takes \w+ hours)\b")
LIMIT = 1800  # seconds for one command, on a busy machine

# What is in commands that another test runs, and its file.
ELSEWHERE = {
    **dict.fromkeys(
        ("bash launch/gpu.sh", "bash launch/tpu_vm.sh", "gcloud storage cp", "launch/slurm.sbatch"),
        "launch/test_launching_readme.py",
    ),
    **dict.fromkeys(("openssl rand", "sbatch --parsable"), "launch/test_launching_readme.py"),
    "bash launch/judge_pool/vllm.sh": "launch/test_launching_readme.py",
    "bash launch/quickstart.sh": "launch/test_quickstart_for_real.py",
    "bash launch/test.sh": "launch/test_scripts.py",
    "pip install -e '.[tpu]'": "launch/test_extras_for_real.py",
    "python -m sl_jax.plan": "test_plan_cli.py",
    "python -m sl_jax.judge --port": "launch/test_judge_pool_readme.py",
    "--config.judge.endpoints=http://127.0.0.1": "launch/test_judge_pool_readme.py",
    "python -m sl_jax.judge --host": "scoring/test_server.py",
    "python -m sl_jax.judge --audit": "scoring/test_audit.py",
}
TOKEN = "a-token-of-the-test"
# What makes each door's command small; later flags win.
MODEL = "CHECKPOINT"
SMALL = {
    "train": {
        **{"model": MODEL, "epochs": 1, "data.buckets": "((32,32),)", "data.eval_fraction": 0.2},
        **{"rollout.groups": 2, "rollout.batch_groups": 2, "rollout.group_size": 2},
        **{"rollout.steps": 4, "rollout.window_size": 2, "rollout.window_range": "(0,3)"},
        **{"learner.updates": 1, "learner.micro_batch": 4, "lora.rank": 4, "mesh.data": 1},
        **{"evaluation.pictures": 2, "evaluation.batch": 2, "evaluation.steps": 2},
        **{"judge.min_valid": 0.0, "distributed.cpu_devices": 1},
    },
    "sft": {
        **{
            "model": MODEL,
            "steps": 2,
            "batch": 2,
            "data.buckets": "((32,32),)",
        },
        **{
            "optimizer.warmup_steps": 0,
            "data.eval_fraction": 0.2,
            "eval_every": 2,
            "log_every": 1,
            "checkpoint_every": 2,
        },
    },
    "decompose": {"model": MODEL, "layers": 2, "steps": 2, "size": 32},
    "convert": {"model": MODEL},
    "evaluate": {"model": MODEL, "steps": 2, "limit": 2, "size": 32, "dtype": "float32"},
}
AS_THEY_STAND = ("convert to-peft", "--status")  # these take none of the flags


class Command(NamedTuple):
    """A command of a block of the README, and what its comment says."""

    text: str
    comment: str

    @property
    def marked(self) -> bool:
        return bool(MARK.search(self.comment))

    @property
    def elsewhere(self) -> str | None:
        """The test that runs it."""
        return next((test for words, test in ELSEWHERE.items() if words in self.text), None)


def commands() -> list[Command]:
    """In order; lines that are continued, or whose quotes are, belong together."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        of_block, lines = "", iter(block.strip().splitlines())
        for line in lines:
            if line.startswith("#"):
                of_block = line
                continue
            while line.endswith("\\") or line.count("'") % 2:
                whole = line.endswith("\\")
                line = (line[:-1] + next(lines).strip()) if whole else f"{line}\n{next(lines)}"
            text, _, comment = re.sub(r"\s{2,}#", "  #", line).partition("  #")
            found.append(Command(text.strip(), f"{of_block} {comment}"))
    return found


def _door(text: str) -> str:
    match = re.match(r"python -m sl_jax\.(\w+)", text)
    return match[1] if match else ""


def made_small(command: str) -> str:
    """The command with the tiny configuration, and flags that make it small."""
    door = _door(command)
    flags = dict(SMALL.get(door, {}))
    if any(words in command for words in AS_THEY_STAND):
        flags = {}
    dots = "config." if door in ("train", "sft") else ""
    words = [f"--{dots}{name}='{value}'" for name, value in flags.items()]
    text = command.replace(" [OTHER]", "")
    if door == "sft":
        text = text.replace("workdir=RUN", "workdir=TUNED")  # RUN is the trained one's
    text = re.sub(r"(configs/(?:grpo|sft)\.py)(?![:\w])", r"\1:tiny", text)
    return " ".join([text, *words])


def test_every_command_is_run_or_says_what_it_needs():
    found = commands()
    assert len(found) > 20
    for command in found:
        runs_here = _door(command.text) in SMALL or command.text.startswith(("python -c", "export"))
        assert command.marked or command.elsewhere or runs_here, command


def is_run_by(words: str, file: str) -> bool:
    """Whether a test names the script, door or flag, or takes a block with the words from here."""
    told = (ROOT / "tests" / file).read_text()
    last = words.split()[-1].removeprefix("launch/").partition("=")[0]
    taken = re.findall(r'\bblock\("([^"]+)"\)', told)
    blocks = [text for text in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if words in text]
    return last in told or any(name in text for name in taken for text in blocks)


@pytest.mark.parametrize(("words", "file"), ELSEWHERE.items())
def test_the_test_that_runs_it_is_there(words, file):
    assert any(words in command.text for command in commands()), words
    assert is_run_by(words, file)


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("bash launch/quickstart.sh", "launch/test_launching_readme.py"),
        ("pip install -e '.[tpu]'", "launch/test_packaging.py"),
        ("python -m sl_jax.judge --audit", "launch/test_launching_readme.py"),
        ("openssl rand", "launch/test_judge_pool_readme.py"),
        ("python -m sl_jax.plan", "launch/test_scripts.py"),
    ],
)
def test_a_test_that_does_not_run_it_is_found_out(words, file):
    assert not is_run_by(words, file)


def test_no_command_trains_the_real_model_by_a_judge_of_pixels():
    told = [command.text for command in commands()]
    told = [text for text in told if re.search(r"--config=configs/grpo\.py(?!:tiny|:hosted)", text)]
    trained = [text for text in told if "sl_jax.plan" not in text and "--explain" not in text]
    assert len(trained) > 4
    assert [text for text in trained if "--config.judge.model=" not in text] == []


@pytest.mark.parametrize("comment", ["# needs patience", "# no TPU is needed", "# takes a while"])
def test_only_hardware_a_network_or_hours_excuse(comment):
    assert not Command("bash other.sh", comment).marked


def test_inline_commands_name_what_is_there():
    """`python tests/benchmarks/…` and the like, with flags that the script knows."""
    inline = re.findall(r"`python (tests/\S+\.py)([^`]*)`", README)
    assert len(inline) > 5
    for script, flags in inline:
        text = (ROOT / script).read_text()
        for flag in re.findall(r"--([\w-]+)", flags):
            assert f'"--{flag}"' in text, (script, flag)
    for name in re.findall(r"`bash (launch/\S+\.sh)", README):
        assert (ROOT / name).is_file(), name
    for command in re.findall(r"`pytest ([^`]+)`", README):
        files, _, chosen = command.partition(" -k ")
        texts = [(ROOT / name).read_text() for name in re.findall(r"tests/\S+", files)]
        assert re.search(rf"def test_\w*{chosen}", "".join(texts)), command


@pytest.fixture(scope="module")
def place(random_checkpoint, tmp_path_factory):
    """A folder in which the README's names are what they stand for."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / MODEL).symlink_to(random_checkpoint)
    write_designs(folder / "PICTURES", "B", range(12), 32, 3)
    write_designs(folder / "DESIGNS", "B", range(12), 32, 3, with_layers=True)
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(folder / "photo.jpg")
    (folder / "my_rewards.py").write_text(python_blocks("# my_rewards.py")[0])
    return folder


def section(title: str) -> str:
    """The text of the section with this title, and of those within it."""
    headings = re.finditer(r"```.*?```|^(#+) ([^\n]*)$", README, re.DOTALL | re.MULTILINE)
    found = [match for match in headings if match[1]]
    (here,) = [match for match in found if match[2] == title]
    ends = [m.start() for m in found if m.start() > here.start() and len(m[1]) <= len(here[1])]
    return README[here.end() : min(ends, default=len(README))]


def python_blocks(begin: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if block.startswith(begin)]


@pytest.fixture(scope="module")
def judge():
    """The address of a judge that wants the token."""
    server = JudgeServer(EmbeddedJudge(), TOKEN)
    running = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="critical"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    running.should_exit = True
    thread.join(10)
    server.close()


def judged_there(command: str, judge: str) -> str:
    """The command with this judge in the place of the one that it names."""
    named = {"http://JUDGE:8000/v1": judge, "Qwen/Qwen2.5-VL-7B-Instruct": "embedded-precise"}
    for there, here in named.items():
        command = command.replace(there, here)
    return command


def _run(place, command):
    environment = os.environ | {
        "JUDGE_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{place}",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(place, judge):
    """Commands of one folder, in the order in which a reader meets them, each with small sizes."""
    for command in commands():
        if command.marked or command.elsewhere:
            continue
        shutil.rmtree(place / "OUT", ignore_errors=True)
        _run(place, judged_there(made_small(command.text), judge))
        if (place / "RUN" / "adapter").is_dir() and not (place / "ADAPTER").exists():
            (place / "ADAPTER").symlink_to(place / "RUN" / "adapter")
    assert (place / "RUN" / "report.html").is_file()
    assert (place / "RUN" / "judge.sqlite3").is_file()  # answers of the server
    assert len(list((place / "LAYERS").glob("*/layers.psd"))) == 12
    assert (place / "EVALUATION" / "report.html").is_file()
    assert list((place / "runs" / "designs").iterdir())


@pytest.mark.slow
def test_pytorch_loads_what_the_readme_exports(place, judge):
    """The block of Python, on the folder that the commands before it leave."""
    if not (place / "RUN" / "adapter").is_dir():  # where this test runs alone
        train = next(c.text for c in commands() if "--config.workdir=RUN" in c.text)
        _run(place, judged_there(made_small(train), judge))
    shutil.rmtree(place / "OUT", ignore_errors=True)
    _run(place, "python -m sl_jax.convert to-peft RUN OUT --format diffusers")
    (block,) = python_blocks("import runpy")
    small = {
        "Qwen/Qwen-Image-Layered": MODEL,
        "from_pretrained(base, ": "from_pretrained(base, processor=None, ",  # it captions alone
        "torch.bfloat16": "torch.float32",
        '"cuda"': '"cpu"',
        "640": "32",
        "layers=4, steps=50": "layers=2, steps=2",
    }
    for there, here in small.items():
        assert there in block, there
        block = block.replace(there, here)
    check = (
        "assert pipe.get_active_adapters()\n"
        "assert [layer.mode for layer in layers] == ['RGBA'] * 2, layers\n"
        "assert {layer.size for layer in layers} == {picture.size}\n"
    )
    (place / "export.py").write_text(block + check)
    _run(place, "python export.py")


def _said() -> list[str]:
    """Texts of all messages in the sources; a value that is filled in ends one."""
    found = [path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.sh")]
    for path in (ROOT / "sl_jax").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        found += [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    return [text for text in found if isinstance(text, str)]


def test_messages_of_the_troubleshooting_are_those_of_the_program():
    messages = re.findall(r"^\| `([^`]+)` \|", section("Troubleshooting"), re.MULTILINE)
    assert len(messages) > 20
    said = _said()
    for message in messages:
        assert len(message) > 12, message
        name, _, rest = message.rpartition("Error: ")
        parts = [f"{name}Error"] if name else []
        parts += [part.strip() for part in rest.split("…")]
        for part in filter(None, parts):
            # A message may hold a value between the words: "at step%s" or {problem}.
            assert any(part in text for text in said), (message, part)


def test_variants_and_exit_codes_of_the_readme_are_those_of_the_program():
    named = set(re.findall(r"`:(\w+)`", section("Configuration")))
    with pytest.raises(ValueError, match="please use") as error:
        packaged("grpo", "none")
    assert named == set(str(error.value).partition("please use ")[2].split(", "))
    told = re.findall(r"^\| (\d) \|", section("Watching a run"), re.MULTILINE)
    codes = {int(code) for code in told}
    assert codes == {1, *EXIT_CODES.values()}


def _fields(config: Mapping, path: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{path}{name}"
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")


def test_fields_of_the_readme_are_those_of_the_configurations():
    configs = [read_config(packaged_file(name)).to_dict() for name in ("grpo", "sft")]
    known = {field for config in configs for field in _fields(config)}
    groups = {field.partition(".")[0] for field in known}
    files = ("judge.py", "judge.sqlite3", "train.py")
    named = set(re.findall(r"`(?:--)?(?:config\.)?([a-z_]+\.[a-z_.]+[a-z_])\b", README))
    named |= set(re.findall(r"--config\.([a-z_.]+[a-z_])=", README)) - {"field"}
    named = {n for n in named if n.partition(".")[0] in groups and n not in files}
    assert len(named) > 40
    assert named <= known, named - known


def test_the_contents_lead_to_every_section():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    headings = re.findall(r"^##+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links <= anchors, links - anchors
    sections = re.findall(r"^## (.*)$", text, re.M)
    assert {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in sections} <= links
    for name in re.findall(r"\]\((?!#|https?:)([^)]+)\)", text):
        assert (ROOT / name).exists(), name
