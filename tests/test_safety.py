"""No one gets in: no pickles, no code of others, no names that lead elsewhere, no live text."""

import ast
import html.parser
import io
import json
import logging
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file
from test_hostile_files import Copies, copies

from sl_jax import convert
from sl_jax.checkpoints.adapters import load_adapter, read_adapter
from sl_jax.checkpoints.card import CardSettings, Training, write_card
from sl_jax.checkpoints.disk import inside_name
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.lora_modules import LoraModule
from sl_jax.checkpoints.merge import merge
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.checkpoints.peft import write_peft
from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.checkpoints.safetensors_file import write_tensors
from sl_jax.checkpoints.source import TINY, resolve_model
from sl_jax.checkpoints.tensor_files import TensorFiles
from sl_jax.data import FolderError, scan_folder, standard_buckets
from sl_jax.data.crello import HUB_ID, Crello
from sl_jax.data.paired import PairedData, PairedDesign, open_paired
from sl_jax.data.tfds_pictures import scan_tfds
from sl_jax.eval import samples
from sl_jax.eval.report import (
    Column,
    Curve,
    Decomposition,
    Fact,
    Picture,
    Report,
    Series,
    Table,
    render_html,
    write_report,
)
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.inference import prompts
from sl_jax.inference.decomposer import Sampling
from sl_jax.inference.folder import Job, decompose_pictures, find_pictures
from sl_jax.scoring.cache import AnswerCache, CacheError
from sl_jax.scoring.records import Record, to_markdown
from sl_jax.scoring.rubric import parse_candidate
from sl_jax.scoring.types import (
    CRITERIA,
    BrokenAnswerError,
    Failure,
    GroupScores,
    JudgeError,
)
from sl_jax.training import pools
from sl_jax.training.console import set_up_logging

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("sl_jax/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("launch/**/*.py")]
UNPICKLING = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
RUNNING = {"subprocess", "pty", "code", "codeop", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load"}
PROGRAMS = re.compile(
    r"(os|posix)\.(system|popen|exec|spawn|posix_spawn)|(.*\.)?(create_)?subprocess_(exec|shell)"
)


def openings(text: str) -> list[str]:
    """What in a module could run what others wrote."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in imported if PROGRAMS.match(name)]
        else:
            names = []
        found += [n for n in names if n.partition(".")[0] in UNPICKLING | RUNNING]
        if not isinstance(node, ast.Call):
            continue
        called, told = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in CALLS or PROGRAMS.match(called):
            found.append(called)
        if called in ("np.load", "numpy.load") and told.get("allow_pickle") != "False":
            found.append(f"{called} without allow_pickle=False")
        if told.get("trust_remote_code", "False") != "False" or told.get("shell") == "True":
            found.append(ast.unparse(node))
        if called.endswith("Model.from_pretrained") and "Peft" not in called:
            found += [called] if told.get("use_safetensors") != "True" else []
        if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
            found.append(called)
    return found


def test_the_package_runs_nothing_that_others_wrote():
    """But what users name themselves: a reward to import, a configuration file."""
    assert len(SOURCES) > 150
    found = {str(p.relative_to(ROOT)): openings(p.read_text("utf-8")) for p in SOURCES}
    assert {name: what for name, what in found.items() if what} == {
        "sl_jax/__init__.py": ["importlib.import_module"],  # of its own names
        "sl_jax/scoring/rewards.py": ["importlib.import_module"],
        "sl_jax/training/flags.py": ["runpy"],  # the user's configuration file
    }


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load\nimport dill.source",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "QwenImageTransformer2DModel.from_pretrained(x)",
        "def f(said):\n    return eval(said)",
        "import subprocess",
        "os.system(said)",
        "os.posix_spawn(said, [said], {})",
        "os.execvp(said, [said])",
        "asyncio.create_subprocess_shell(said)",
        "async def f(said):\n    await asyncio.create_subprocess_exec(said)",
        "loop.subprocess_exec(protocol, said)",
        "from os import system",
        "from os import path, execvp as path_of",
        "from asyncio import create_subprocess_shell",
        "importlib.import_module(said)",
    ],
)
def test_an_opening_is_seen(line):
    assert openings(line)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A folder that is not there after a test, unless something was unpickled."""
    marker = tmp_path / "gone off"
    pickle.loads(pickle.dumps(Bomb(marker)))
    marker.rmdir()  # it works
    yield marker
    assert not marker.exists()


def pickles(marker):
    """The bomb as a file of pickle, numpy and PyTorch."""
    plain = pickle.dumps(Bomb(marker))
    array, zipped = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Bomb(marker)], object), allow_pickle=True)
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3")
    return {"pickle": plain, "npy": array.getvalue(), "pt": zipped.getvalue()}


@pytest.mark.parametrize("kind", ["pickle", "npy", "pt"])
def test_pickles_are_nowhere_unpickled(marker, tmp_path, kind):
    bomb = pickles(marker)[kind]

    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            path = tmp_path / name / file.replace("__", ".")
            path.write_bytes(bomb if content is None else content)
        return tmp_path / name

    shapes = parameter_shapes(resolve_model(TINY))
    for index, name in enumerate(
        ("adapter_model__bin", "a__pt", "a__ckpt", "a__pkl", "a__safetensors")
    ):
        adapter = folder(f"adapter{index}", **{name: None})
        for load in (read_adapter, lambda name: load_adapter(name, shapes)):
            for where in (adapter, next(adapter.iterdir())):
                with pytest.raises(CheckpointError):
                    load(where)
    peft = folder("peft", adapter_config__json=b"{}", adapter_model__bin=None)
    with pytest.raises(CheckpointError, match="pickled"):
        load_adapter(peft, shapes)
    for name in ("diffusion_pytorch_model__bin", "model__safetensors"):
        with pytest.raises(CheckpointError), TensorFiles(folder(name, **{name: None})) as files:
            files.names()
    checkpoints = RunCheckpoints(tmp_path / "run")
    checkpoints.save(1, {"a": np.zeros(3)})
    checkpoints.close()
    for path in [p for p in (tmp_path / "run").rglob("*") if p.is_file()]:
        path.write_bytes(bomb)
    with pytest.raises(CheckpointError):
        RunCheckpoints(tmp_path / "run").restore({"a": np.zeros(3)})
    with pytest.raises(FolderError):
        scan_folder(folder("pictures", a__png=None, b__tif=None, c=None), standard_buckets(64))
    with pytest.raises(FolderError):
        open_paired(folder("documents", a__psd=None))
    with pytest.raises(CacheError):
        AnswerCache(folder("cache", judge__sqlite3=None) / "judge.sqlite3")


def test_latents_and_prompts_that_were_kept_are_not_unpickled(marker, tmp_path, monkeypatch):
    bombs = pickles(marker)

    def encode(frames):
        raise AssertionError("it was kept")

    encode.fingerprint = "0"
    data = type("Data", (), {"family": "A", "size": 64})
    (tmp_path / "A_64_3_0_4_plain_0.npy").write_bytes(bombs["npy"])
    with pytest.raises(ValueError, match="pickle"):
        pools.cached_latents(tmp_path, encode, data, 3, 0, 4, False)
    cache = prompts._Cache(resolve_model(TINY), tmp_path, 8, np.dtype(np.float32))
    cache._path("a").write_bytes(bombs["pickle"])
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.read("a") is None


_NESTED = '{"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict", '
FOREIGN_FEATURES = (
    '{"pythonClassName": "surprise.Feature", "featuresDict": {"features": {}}}',
    '{"python\\u0043lassName": "surprise.Feature", "featuresDict": {"features": {}}}',
    '{"python_class_name": "surprise.Feature", "featuresDict": {"features": {}}}',
    '{"t\\u0079pe": "surprise.Feature", "content": "{}"}',
    _NESTED + '"featuresDict": {"features": {"a": {"pythonC\\u006cassName": "surprise.Feature"}}}}',
    '{"pythonClassName": "tensorflow_datasets.testing.Feature"}',
    '{"type":' * 100_000,
)


def test_datasets_bring_no_code(tmp_path):
    """TFDS fetches the code of datasets in a namespace, and imports the module of a feature."""
    for name in ("tfds:someone:dataset", "tfds:huggingface:dataset#train"):
        with pytest.raises(FolderError, match="code of others"):
            scan_tfds(name, standard_buckets(64))
    module = tmp_path / "surprise.py"
    module.write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    folder = Path(
        Crello(source=HUB_ID, data_dir=str(tmp_path), file_format="array_record").data_dir
    )
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "crello", "version": "5.1.0"}))
    sys.path.insert(0, str(tmp_path))
    try:
        for told in FOREIGN_FEATURES:
            (folder / "features.json").write_text(told)
            with pytest.raises(FolderError, match=r"code of .*\.Feature|holds no dataset"):
                scan_tfds(f"crello:{tmp_path}#train", standard_buckets(64))
            assert not (tmp_path / "imported").exists(), told
    finally:
        sys.path.remove(str(tmp_path))


NAMES = {
    "..": 1,
    "../../outside": 3,
    "/proc/absolute": 3,  # where nothing can be written, should it ever come to it
    "a/../../../b": 5,
    "": 1,
    "nul\0byte": 1,
    "x" * 5000: 1,
    "ü" * 200: 1,
    "a/" * 20 + "b": 21,
}
FINE = ("CON.png", "..\\..\\windows", "C:drive", "~", "-rf", "a\nb", os.fsdecode(b"caf\xe9"), "a/b")


def test_names_that_lead_elsewhere_get_others():
    made = {name: inside_name(name) for name in [*NAMES, *FINE]}
    assert all(made[name] == name for name in FINE)
    assert len(set(made.values())) == len(made)
    for name, depth in NAMES.items():
        parts = made[name].split("/")
        assert len(parts) == depth and not {"", ".", ".."} & set(parts)
        assert all(len(os.fsencode(part)) <= 200 and "\0" not in part for part in parts)


def below(folder):
    return {path for path in folder.rglob("*")}


def test_nothing_is_written_outside_of_an_evaluation(tmp_path, monkeypatch):
    """Designs may be called anything: Crello's ids come from its files."""
    layers = np.zeros((2, 32, 32, 4), np.uint8)
    layers[0] = 255
    names = [*NAMES, *FINE]
    designs = tuple(
        PairedDesign(name, f"{i:064x}", 32, 32, 2, "", lambda: layers)
        for i, name in enumerate(names)
    )
    monkeypatch.setattr(samples, "open_paired", lambda *_, **__: PairedData("there", designs))
    monkeypatch.setattr(samples, "is_paired", lambda _: True)
    output = tmp_path / "deep" / "inside" / "out"
    before = below(tmp_path)
    (system,) = [copies()]
    wild = type(system)("../../evil" + "y" * 400, "model", {}, system.make)
    evaluate(EvaluationConfig("there", str(output), baselines=False), [system, wild])
    assert len(list(output.rglob("*.json"))) == 2 * len(names) + 2
    outside = {path for path in below(tmp_path) - before if output not in (path, *path.parents)}
    assert outside == {output.parent, output.parent.parent}


def test_nothing_is_written_outside_of_decompose(tmp_path):
    import hostile_files as zoo

    (tmp_path / "in").mkdir()
    for name in ("...png", "..png", "..\\up.png", "x" * 251 + ".png", "a.png", "a.jpg"):
        (tmp_path / "in" / name).write_bytes(zoo.good())
    before = below(tmp_path)
    for name in sorted(os.listdir(tmp_path / "in")):
        job = Job(epath.Path(tmp_path / "out" / "layers"), Sampling(layers=1, steps=1, size=32))
        outcome = decompose_pictures(find_pictures(str(tmp_path / "in" / name)), job, Copies)
        assert len(outcome.written) == 1 or name == "a.png", outcome.problems
    made = {path.relative_to(tmp_path) for path in below(tmp_path) - before}
    assert all(path.parts[0] == "out" for path in made)
    assert all(len(path.parts) == 4 for path in made if path.suffix == ".json")


def test_names_that_collide_with_numbered_ones(tmp_path):
    for folder, name in (("x", "a.png"), ("y", "a.png"), ("z", "0_a.png.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    names = [entry.name for entry in find_pictures(f"{tmp_path}/*/*.png")]
    assert len(set(names)) == 3


ONES = np.ones((1, 4), np.float32), np.ones((4, 1), np.float32)  # of an adapter
ELSEWHERE = ("../../x.safetensors", "{outside}/x.safetensors", "x\0.safetensors")


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("there", [True, False], ids=["there", "absent"])
def test_an_index_names_no_files_elsewhere(tmp_path, name, there):
    """Neither are they read, though they are whole, nor is anything written beside them."""
    base = tmp_path / "deep" / "base"
    weights = shutil.copytree(resolve_model(TINY), base) / "transformer"
    (whole,) = weights.glob("*.safetensors")
    shutil.move(whole, tmp_path / "deep" / "x.safetensors") if there else whole.unlink()
    with TensorFiles(resolve_model(TINY) / "transformer") as files:
        told = dict.fromkeys(files.names(), name.format(outside=base.parent))
    index = weights / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": told}))
    before = below(tmp_path)
    with pytest.raises(CheckpointError, match="names files that are"):
        TensorFiles(weights)
    with pytest.raises(CheckpointError, match="names files that are"):
        merge(base, {"proj_out": LoraModule(*ONES, 1.0)}, tmp_path / "deep" / "merged")
    assert below(tmp_path) == before


@pytest.mark.parametrize("name", ["../../evil", "/{outside}/evil", "nul\0byte", "..\\evil"])
def test_names_of_adapted_modules_are_nothing_but_names(tmp_path, monkeypatch, name):
    monkeypatch.setattr(convert, "set_up_logging", lambda: None)
    made = {name.format(outside=tmp_path): LoraModule(*ONES, 1.0)}
    source, output = tmp_path / "in" / "adapter", tmp_path / "deep" / "inside" / "out"
    write_peft(source, made, "../../base")
    before = below(tmp_path)
    for form in ("peft", "diffusers"):
        convert.main(["to-peft", str(source), str(output / form), "--format", form])
        assert read_adapter(output / form).modules.keys() == made.keys()
    for command in ("from-peft", "merge"):
        with pytest.raises(SystemExit, match="CheckpointError"):
            convert.main([command, str(source), str(output / command), "--model", "tiny"])
    outside = {path for path in below(tmp_path) - before if output not in (path, *path.parents)}
    assert outside == {output.parent, output.parent.parent}
    assert {path.name for path in output.iterdir()} == {"peft", "diffusers"}


HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)",
    "javascript:alert(1)",
    "</script><!--",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "right \u202eot tfel\u2066",
    "half \ud800 of it",
    "&lt;b&gt; \0 \r\n",
)
LAYERS = np.full((2, 8, 8, 4), 255, np.uint8)


def report_of(text):
    """A report that says a text wherever it says any."""
    made = Decomposition(text, LAYERS, {text: text})
    curve = Curve(text, (Series(text, [0, 1], [1, 2]),), text, text, text)
    cells = Table(text, (Column(text), Column("b")), ((text, text),), text, grouped=True)
    picture = Picture(text, LAYERS[0, ..., :3], (made, made), text, 1.0)
    records = ({"picture": text, "n": 1},)
    parts = ((Fact(text, text, text),), (cells,), (curve,), (picture,), text, text, {text: text})
    return Report(text, text, *parts, records)


class Shape(html.parser.HTMLParser):
    """What a browser makes of a page but for its text: tags with the names of their attributes."""

    def __init__(self, page):
        super().__init__()
        self.shape, self.links = Counter(), Counter()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.shape[tag, tuple(name for name, _ in attributes)] += 1
        for name, value in attributes:
            if name in ("src", "href", "style", "class", "id"):
                self.links[name, value] += 1

    def handle_comment(self, data):
        self.shape["comment"] += 1


@pytest.mark.parametrize("text", HOSTILE)
def test_text_changes_nothing_of_a_page_but_its_text(text, tmp_path):
    page, plain = render_html(report_of(text)), render_html(report_of("plain words"))
    hostile, benign = Shape(page), Shape(plain)
    assert hostile.shape == benign.shape and hostile.links == benign.links
    assert "onerror" not in str(hostile.shape) and not set(page) & set(
        "\0\x1b\x9b\u202e\u2066\ud800"
    )
    write_report(report_of(text), tmp_path)
    for path in tmp_path.iterdir():
        content = path.read_bytes().decode("utf-8")
        assert not set(content) & set("\0\x1b\x07\x9b\u202e\u2066"), path.name
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert told["title"] == text and told["pictures"][0]["caption"] == text


def test_nothing_of_others_reaches_a_terminal_raw(capsys):
    log = logging.getLogger("sl_jax")
    set_up_logging()
    for text in HOSTILE:
        log.warning("said: %s\nand more", text)
    seen = capsys.readouterr().err
    assert seen.count("and more") == len(HOSTILE) and "\\x1b[31mred" in seen
    assert not [c for c in seen if not c.isprintable() and c != "\n"]
    for error in (JudgeError, CheckpointError, BrokenAnswerError):
        assert str(error("".join(HOSTILE)).args[0]).replace("\n", "").isprintable()


def test_what_a_judge_answers_is_not_repeated_raw():
    """Keys that it makes up come back in errors."""
    for answer in ('{"\\u001b[31m\\u202e": 1}', '{"\\u009b": 1, "\\u009b": 2}', "\x1b[31m"):
        with pytest.raises(BrokenAnswerError) as error:
            parse_candidate(answer)
        assert str(error.value).isprintable()
    verdict = {name: {"reason": "half \ud800", "score": 1} for name in CRITERIA}
    with pytest.raises(BrokenAnswerError):
        parse_candidate(json.dumps(verdict))


LIVE_MARKDOWN = (
    "![seen](https://evil/a.png)",
    "[log in](javascript:alert(1))",
    "[a]: http://evil 'b'",
    "one\n\n# two\n\n| a | b |\n| --- | --- |",
    "`code` *strong* _weak_ \\",
)


@pytest.mark.parametrize("text", [*HOSTILE, *LIVE_MARKDOWN])
def test_judgements_are_shown_as_plain_text(text):
    """TensorBoard and W&B make Markdown of captions, names, reasons and failures."""

    def shown_lines(said):
        scores = GroupScores(
            group_id="0",
            criteria=np.ones((2, len(CRITERIA))),
            **{name: np.ones(2) for name in ("stage1", "stage2", "reward")},
            valid=np.array([True, False]),
            two_stage=True,
            reasons=((said,) * len(CRITERIA), ()),
            failures=(None, Failure(True, said)),
            grid_failure=None,
            capped=np.zeros(2, bool),
            **{name: np.zeros((0, 2), int) for name in ("grid_scores", "permutations")},
        )
        return to_markdown(Record(1, said, said, scores)).splitlines()

    lines, benign = shown_lines(text), shown_lines("plain words")
    assert len(lines) == len(benign)
    live = [
        re.sub(r"\\[\\`*_{}\[\]()#!|]", "", line)
        for line, plain in zip(lines, benign, strict=True)
        if "plain words" in plain
    ]
    assert len(live) == 3
    for line in live:
        assert not set(line) & set("<>\\`*_[]|!\x1b\x9b\u202e\0") and "://" not in line, line


def test_a_model_card_quotes_what_an_adapter_says(tmp_path):
    """The base's name stands in YAML and in code that readers copy."""
    evil = 'x"); import os; os.system("\n---\nlicense: "mit'
    settings, training = CardSettings(4, 50, 640, "a prompt"), Training(True, 4.0, evil)
    write_card(tmp_path, "peft", evil, settings, training)
    card = (tmp_path / "README.md").read_text("utf-8")
    front = card.split("---\n")[1].splitlines()
    assert [line.partition(":")[0] for line in front if line[0] != " "] == [
        *("base_model", "library_name", "pipeline_tag", "tags"),
    ]
    for code in (card.split("```python\n")[1].split("```")[0], (tmp_path / "infer.py").read_text()):
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
        assert "os.system" not in calls


def test_tensor_names_are_escaped(tmp_path):
    write_tensors(epath.Path(tmp_path / "a.safetensors"), {"\x1b[31mred": np.zeros(3, np.float32)})
    assert "\x1b[31mred" in load_file(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_adapter(tmp_path)
    assert "\\x1b[31mred" in str(error.value) and "\x1b" not in str(error.value)
