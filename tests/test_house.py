"""The walls of the house: who may import whom, and what some rooms never import."""

import ast
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# From the roof to the ground. `front` is sl_jax/__init__.py, `doors` are the modules beside it.
FLOORS = (
    *("front", "doors", "configs", "grpo", "planning", "eval", "inference", "training", "data"),
    *("scoring", "checkpoints", "flow", "models", "parallel", "imaging", "assets"),
)
FRAMEWORKS = frozenset({"jax", "jaxlib", "flax", "optax", "orbax", "torch"})
PEERS = frozenset({"torch", "diffusers", "peft"})
# Where a function may compare a result with the libraries that will load it.
PEER_CHECKS = frozenset({"sl_jax.convert", "sl_jax.checkpoints.verify"})
# Files, network, clocks, logging: not for rooms of pure functions.
OUTSIDE_WORLD = frozenset(
    {
        *("PIL", "absl", "asyncio", "etils", "glob", "http", "huggingface_hub", "importlib"),
        *("io", "json", "logging", "multiprocessing", "os", "pathlib", "random", "requests"),
        *("shutil", "socket", "subprocess", "sys", "tempfile", "threading", "time", "urllib"),
    }
)
DOOR_LINES = 150

Sources = Mapping[str, str]


def sources() -> dict[str, str]:
    """The text of every module, by its name as installed."""
    found = {}
    for path in [*(ROOT / "sl_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("sl_jax", *parts) if parts[0] == "configs" else parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def house() -> dict[str, str]:
    return sources()


def room(name: str, modules: Sources) -> str:
    """The room of a module: its floor's name, `doors`, or `front`."""
    parts = name.split(".")
    if len(parts) == 1:
        return "front"
    alone = len(parts) == 2 and not any(other.startswith(f"{name}.") for other in modules)
    return "doors" if alone and parts[1] not in FLOORS else parts[1]


def imports(name: str, modules: Sources, *, lazy: bool = True) -> Iterator[str]:
    """What a module imports, as full names; without `lazy` only what its own import runs."""
    package = name if any(other.startswith(f"{name}.") for other in modules) else _parent(name)
    nodes = [ast.parse(modules[name])]
    for node in nodes:
        nodes += [
            child
            for child in ast.iter_child_nodes(node)
            if lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ]
        if isinstance(node, ast.Import):
            # Of `import sl_jax` the names that are used count: its place on disk is no import.
            yield from (alias.name for alias in node.names if alias.name != "sl_jax")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                upper = package.rsplit(".", node.level - 1)[0]
                base = f"{upper}.{base}".rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules else base
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sl_jax":
            if not node.attr.startswith("__"):
                yield f"sl_jax.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def own(target: str) -> bool:
    return target.partition(".")[0] == "sl_jax"


def rising_imports(modules: Sources) -> list[str]:
    """Imports that do not go down: to a higher floor, or from a door to another."""
    found = []
    for name in sorted(modules):
        here = room(name, modules)
        for target in filter(own, imports(name, modules)):
            there = room(target, modules)
            level = FLOORS.index(there) - FLOORS.index(here)
            if level < 0 or (level == 0 and here == "doors"):
                found.append(f"{name} ({here}) imports {target} ({there})")
    return found


def circle(modules: Sources) -> list[str]:
    """A circle of modules that import each other; empty if there is none."""
    graph = {name: set(filter(own, imports(name, modules))) for name in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def reached(names: list[str], modules: Sources) -> dict[str, str]:
    """All that an import of these modules can import, each with one module that asks for it."""
    asked = dict.fromkeys(names, "")
    todo = list(names)
    for name in todo:
        if name in modules:
            for target in [*imports(name, modules), *filter(None, [_parent(name)])]:
                if target not in asked:
                    asked[target] = name
                    todo.append(target)
    return asked


def top(target: str) -> str:
    return target.partition(".")[0]


def test_every_room_has_a_floor(house):
    assert {room(name, house) for name in house} <= set(FLOORS)


def test_imports_go_down(house):
    assert rising_imports(house) == []


def test_no_circles(house):
    assert circle(house) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sl_jax.flow.sampler", "from sl_jax.grpo.loop import train"),
        ("sl_jax.flow.sampler", "from sl_jax import grpo"),
        ("sl_jax.flow.sampler", "from ..grpo import loop"),
        ("sl_jax.flow.sampler", "import sl_jax\nsl_jax.train.main()"),
        ("sl_jax.grpo.loop", "def f():\n    import sl_jax.train"),
        ("sl_jax.grpo.loop", "from sl_jax import Decomposer"),
        ("sl_jax.grpo.loop", "from sl_jax.configs import grpo"),
        ("sl_jax.grpo.loop", "import importlib\nimportlib.import_module('sl_jax.train')"),
        ("sl_jax.sft", "from sl_jax import train"),
    ],
)
def test_a_rising_import_is_seen(module, line):
    names = "sl_jax sl_jax.train sl_jax.sft sl_jax.grpo sl_jax.grpo.loop sl_jax.flow"
    modules = dict.fromkeys([*names.split(), "sl_jax.flow.sampler", "sl_jax.configs"], "")
    assert rising_imports(modules) == []
    assert len(rising_imports(modules | {module: line})) == 1


def test_a_circle_is_seen():
    modules = {
        "sl_jax.flow": "from sl_jax.flow.a import x",
        "sl_jax.flow.a": "from sl_jax.flow import b",
        "sl_jax.flow.b": "from . import c",
        "sl_jax.flow.c": "",
    }
    assert circle(modules) == []
    assert set(circle(modules | {"sl_jax.flow.c": "from .a import x"})) == {
        *("sl_jax.flow.a", "sl_jax.flow.b", "sl_jax.flow.c")
    }


def test_doors_are_thin(house):
    lengths = {
        name: len(text.splitlines())
        for name, text in house.items()
        if room(name, house) in ("doors", "front")
    }
    assert {name: lines for name, lines in lengths.items() if lines > DOOR_LINES} == {}


def _without_frameworks(modules: Sources) -> list[str]:
    """The modules that run on hosts with no accelerator framework."""
    return [
        name
        for name in modules
        if room(name, modules) in ("scoring", "imaging") or name == "sl_jax.judge"
    ]


def test_judging_reaches_no_framework(house):
    asked = reached(_without_frameworks(house), house)
    assert {target: by for target, by in asked.items() if top(target) in FRAMEWORKS} == {}


_IMPORT_ALL = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(FRAMEWORKS)}:
            raise ImportError(name + " is refused")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported")
"""


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_judging_imports_where_frameworks_are_missing(house):
    done = _python("-c", _IMPORT_ALL, *_without_frameworks(house))
    assert done.stdout.strip() == "imported", done.stderr
    assert "jax is refused" in _python("-c", _IMPORT_ALL, "sl_jax.flow.sampler").stderr


def test_importing_the_package_is_cheap():
    script = "import sys, sl_jax; print(*{name.partition('.')[0] for name in sys.modules})"
    done = _python("-c", script)
    heavy = FRAMEWORKS | PEERS | {"numpy", "PIL", "scipy", "grain", "transformers", "matplotlib"}
    assert "sl_jax" in done.stdout.split(), done.stderr
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("door", ["plan", "train"])
def test_a_door_does_without_tensorboard_until_metrics_are_written(door):
    """Its library loads PyTorch, where that is installed, and takes longer than any other."""
    done = _python("-c", f"import sys, sl_jax.{door}, sl_jax.grpo.run; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert "sl_jax.training.metrics" in loaded, done.stderr
    assert not {"tensorboardX", "torch"} & loaded


def test_pytorch_is_for_tests_only(house):
    for name in house:
        assert PEERS.isdisjoint(map(top, imports(name, house, lazy=False))), name
        if name not in PEER_CHECKS:
            assert PEERS.isdisjoint(map(top, imports(name, house))), name


def impurities(name: str, modules: Sources) -> list[str]:
    """What ties a module of pure functions to the world outside."""
    found = [target for target in imports(name, modules) if top(target) in OUTSIDE_WORLD]
    for node in ast.walk(ast.parse(modules[name])):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            impure = called in ("open", "print", "input") or called.startswith("np.random.")
        else:
            impure = isinstance(node, ast.Global | ast.Nonlocal)
        if impure:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "from absl import logging",
        "def f():\n    import os",
        "x = 0\ndef f():\n    global x",
        "print(1)",
        "np.random.rand()",
    ],
)
def test_an_impurity_is_seen(line):
    assert impurities("sl_jax.flow.a", {"sl_jax.flow.a": line}) != []


def test_functions_of_arrays_know_nothing_else(house):
    """The formulas of the flow and of GRPO: no configuration, no judge, no model, no world."""
    formulas = {"sl_jax.grpo.objective", "sl_jax.grpo.advantages"}
    formulas |= {name for name in house if room(name, house) == "flow"}
    below = {"sl_jax.flow", *(n for n in formulas if room(n, house) == "flow")}
    for name in formulas:
        assert set(filter(own, imports(name, house))) <= below, name
    for name in formulas | {name for name in house if room(name, house) == "models"}:
        assert impurities(name, house) == [], name


@pytest.fixture(scope="module")
def packaging() -> Mapping[str, object]:
    """What setup.py declares."""
    declared: dict[str, object] = {}
    recorder = types.ModuleType("setuptools")
    recorder.setup = declared.update
    recorder.find_packages = lambda **_: []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", recorder)
        runpy.run_path(str(ROOT / "setup.py"))
    return declared


def _names(requirements: list[str]) -> set[str]:
    return {_normal(Requirement(requirement).name) for requirement in requirements}


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def _undeclared(targets: Mapping[str, str], declared: set[str]) -> dict[str, str]:
    providers = packages_distributions()
    missing = {}
    for target, by in targets.items():
        if top(target) in sys.stdlib_module_names or own(target):
            continue
        names = {_normal(name) for name in providers.get(top(target), [top(target)])}
        if declared.isdisjoint(names):
            missing[target] = by
    return missing


def test_what_is_imported_is_declared(house, packaging):
    core, extras = packaging["install_requires"], packaging["extras_require"]
    training = _names([*core, *extras["cpu"], *extras["wandb"]]) | PEERS
    assert _undeclared(reached(list(house), house), training) == {}
    judging = reached(_without_frameworks(house), house)
    assert _undeclared(judging, _names([*core, *extras["judge"]])) == {}


def test_a_judge_host_gets_no_framework(packaging):
    todo = sorted(_names(packaging["install_requires"] + packaging["extras_require"]["judge"]))
    for name in todo:
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # for another platform
        todo += _names(
            [str(r) for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
        ) - set(todo)
    assert len(todo) > 20
    assert FRAMEWORKS.isdisjoint({name.partition("-")[0] for name in todo})
