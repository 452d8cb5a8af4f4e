"""What is read from strangers, and what it may answer to any bytes: its documented errors.

Each subject has a strategy of cases and a reader. Cases begin from something whole, of which one
part or a few are changed, since random bytes reach no further than the first check.
"""

import copy
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from sl_jax.checkpoints.adapters import load_adapter, read_adapter
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.checkpoints.safetensors_file import NUMBERS, read_tensors
from sl_jax.checkpoints.source import TINY, resolve_model
from sl_jax.checkpoints.tensor_files import TensorFiles
from sl_jax.scoring import CRITERIA, BrokenAnswerError, EmbeddedJudge, PermanentJudgeError, cases
from sl_jax.scoring import request as rendering
from sl_jax.scoring.captions import caption_schema
from sl_jax.scoring.decoding import BadRequestError, Limits
from sl_jax.scoring.encoding import RequestConfig, content_of
from sl_jax.scoring.openai_client import EndpointConfig, OpenAIJudge
from sl_jax.scoring.rubric import load_prompts
from sl_jax.scoring.server import completion
from sl_jax.scoring.types import Group, JudgeRequest
from sl_jax.scoring.verify import verify

LONGEST = 10.0  # seconds of a core that a case of a few kilobytes may take


class Subject(NamedTuple):
    """Something that reads what strangers wrote.

    Attributes:
      cases: strategy of what it is given.
      read: reads a case; may use a folder of its own.
      errors: that its documentation names.
    """

    cases: st.SearchStrategy
    read: Callable[[Any, Path], None]
    errors: tuple[type[Exception], ...]


def outcome(subject: Subject, case: Any, folder: Path) -> tuple[str, float]:
    """How a case ends, "read" or the name of a documented error, and the seconds of a core."""
    begun = time.process_time()
    try:
        subject.read(case, folder)
        end = "read"
    except subject.errors as error:
        assert str(error).isprintable() or "\n" in str(error)
        end = type(error).__name__
    seconds = time.process_time() - begun
    assert seconds < LONGEST, f"{seconds:.0f} s"
    return end, seconds


_texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "\0", "\x1b[31m", "\u202e", "\ud800", "../../x", "lora_A", "__proto__", *CRITERIA]
    ),
)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, 1e-320, -0.0]),
    st.floats(),
    _texts,
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, base: Any, values: st.SearchStrategy = _values) -> Any:
    """A JSON value with a few of its parts changed, left out, renamed or added."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = None, None
        inner = value
        while isinstance(inner, dict | list) and inner and (parent is None or draw(st.booleans())):
            parent = inner
            keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
            key = draw(st.sampled_from(list(keys)))
            inner = parent[key]
        if parent is None:
            return draw(values)
        change = draw(st.sampled_from(["set", "set", "drop", "rename", "add"]))
        if change == "set":
            parent[key] = draw(values)
        elif change == "drop":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, draw(values))
        elif change == "rename":
            parent[draw(_texts)] = parent.pop(key)
        else:
            parent[draw(_texts)] = draw(values)
    return value


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of which some are other ones, missing, doubled or added."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # The beginning is where parsers go wrong.
        reach = len(data) if draw(st.booleans()) else min(len(data), 64)
        place = draw(st.integers(0, max(reach - 1, 0)))
        change = draw(st.sampled_from(["flip", "flip", "cut", "drop", "double", "add"]))
        if change == "flip" and data:
            data[place] = draw(st.sampled_from([0, 1, 0x22, 0x2C, 0x7B, 0x7F, 0x80, 0xFF]))
        elif change == "cut":
            del data[place:]
        elif change == "drop":
            del data[place : place + draw(st.integers(1, 9))]
        elif change == "double":
            data[place:place] = data[place : place + draw(st.integers(1, 40))]
        else:
            data[place:place] = draw(st.binary(max_size=12))
    return bytes(data)


def dumped(value: Any) -> bytes:
    """JSON as strangers write it: NaN, infinities and lone surrogates included."""
    return json.dumps(value).encode()


def packed(header: Any, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = dumped(header)
    return len(text).to_bytes(8, "little") + text + data


def safetensors(base: bytes) -> st.SearchStrategy[bytes]:
    """Safetensors files with another header or damaged bytes."""
    length = int.from_bytes(base[:8], "little")
    header, data = json.loads(base[8 : 8 + length]), base[8 + length :]
    kinds = st.sampled_from([*NUMBERS, "F4", "C64"])
    values = st.one_of(_values, kinds, st.lists(st.integers(-2, 9), max_size=4))
    return st.one_of(mutated(header, values).map(lambda h: packed(h, data)), damaged(base))


_NAMES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "proj_out")
SETTINGS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {"proj_out": 2},
    "alpha_pattern": {r".*\.attn\.to_q": 3.0},
    "target_modules": ["to_q"],
    "base_model_name_or_path": "OWNER/NAME",
}


@cache
def tiny_shapes() -> Any:
    """Parameters of the tiny base, as shapes."""
    return parameter_shapes(resolve_model(TINY))


def lora_file(prefix: str, metadata: dict[str, str]) -> bytes:
    """A small adapter of the tiny base."""
    width, channels = 128, 64
    tensors = {}
    for name in _NAMES:
        out = channels if name == "proj_out" else width
        tensors[f"{prefix}{name}.lora_A.weight"] = np.ones((2, width), np.float32)
        tensors[f"{prefix}{name}.lora_B.weight"] = np.ones((out, 2), np.float32)
    return save(tensors, metadata)


def _read_file(content: bytes, folder: Path) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(content)
    errors = []
    for read in (read_tensors, lambda path: _read_parts(path.parent)):
        try:
            read(path)
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _read_parts(folder: Path) -> None:
    with TensorFiles(folder) as files:
        for name in sorted(files.names()):
            found = files.read(name)
            assert found.shape == files.shape(name)


def _read_adapter(path: Path) -> None:
    read_adapter(path)
    adapter = load_adapter(path, tiny_shapes())
    for leaf in (*_leaves(adapter.lora), *_leaves(adapter.lora_scale)):
        assert np.isfinite(leaf).all()


def _leaves(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for inner in tree.values() for leaf in _leaves(inner)]
    return [tree]


def _read_peft(case: tuple[bytes, bytes], folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(case[0])
    (folder / "adapter_model.safetensors").write_bytes(case[1])
    _read_adapter(folder)


def _read_diffusers(content: bytes, folder: Path) -> None:
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(content)
    _read_adapter(path)


def _peft_cases() -> st.SearchStrategy[tuple[bytes, bytes]]:
    weights = lora_file("base_model.model.", {})
    numbers = st.sampled_from([0, 1, 2, -2, 4, 1e-300, 1e300, 10**400, True, "2"])
    named = ["to_q", "proj_out", ".*", r".*\.attn\..*", r"transformer_blocks\.(0|1)\..*"]
    strange = [
        "(",
        "((((",
        "a)|(b",
        r"\1",
        "(?i)x",
        "(.*)*x",
        "(.|.)+x",
        "a{9999999999}",
        "(" * 9999,
    ]
    patterns = st.dictionaries(st.sampled_from([*named, *strange]) | _texts, numbers, max_size=3)
    tables = st.fixed_dictionaries({"rank_pattern": patterns, "alpha_pattern": patterns})
    config = st.one_of(
        mutated(SETTINGS, st.one_of(_values, numbers)).map(dumped),
        tables.map(lambda changed: dumped(SETTINGS | changed)),
        damaged(dumped(SETTINGS)),
        st.just(b"[" * 100_000),
    )
    return st.one_of(
        st.tuples(config, st.just(weights)),
        st.tuples(st.just(dumped(SETTINGS)), safetensors(weights)),
    )


def _diffusers_cases() -> st.SearchStrategy[bytes]:
    told = {f"transformer.{name}": value for name, value in SETTINGS.items()}
    whole = lora_file("transformer.", {"lora_adapter_metadata": json.dumps(told)})

    def with_metadata(value: Any) -> bytes:
        text = value if isinstance(value, str) else dumped(value).decode()
        return lora_file("transformer.", {"lora_adapter_metadata": text})

    return st.one_of(
        safetensors(whole),
        mutated(told).map(with_metadata),
        damaged(dumped(told)).map(lambda data: with_metadata(data.decode("latin-1"))),
    )


_VERDICT = {name: {"reason": "seen", "score": 5.0} for name in CRITERIA}
_CRITERION = {"reason": st.text(max_size=9), "score": st.floats(0, 10) | st.integers(0, 10)}
_GRID = dict.fromkeys(("A", "B", "AA"), st.floats(0, 100))
# What a model should say, by stage.
_PROPER = (
    st.fixed_dictionaries(
        {"caption": st.text("a \n\u00e9\U0001f3a9", min_size=1).filter(str.strip)}
    ),
    st.fixed_dictionaries(dict.fromkeys(CRITERIA, st.fixed_dictionaries(_CRITERION))),
    st.fixed_dictionaries({"scores": st.fixed_dictionaries(_GRID)}),
)


@cache
def _request(stage: int) -> JudgeRequest:
    if stage == 0:
        return JudgeRequest(0, (), caption_schema())
    case = cases.built_cases(32)[0]
    if stage == 1:
        return rendering.candidate_request(
            case.source, case.clean, load_prompts(), rendering.RenderConfig()
        )
    group = Group("g", case.source, (case.clean,) * 3)
    shuffled, config = rendering.Shuffle(np.arange(3), ("A", "B", "AA")), rendering.RenderConfig()
    return rendering.grid_request(group, shuffled, None, load_prompts(), config)


@st.composite
def _answers(draw: st.DrawFn) -> tuple[int, str]:
    """A stage, and what a model may say: JSON, fenced or not, in words, cut off, or broken."""
    stage = draw(st.integers(0, 2))
    proper = draw(_PROPER[stage])
    value = draw(st.just(proper) | mutated(proper))
    if draw(st.booleans()):
        around = [
            ("", ""),
            ("```json\n", "\n```"),
            ("<think>{</think>", "\n"),
            ("```\n", "\n  ```"),
        ]
        before, after = draw(st.sampled_from(around))
        return stage, before + json.dumps(value) + after
    text = draw(damaged(dumped(value)).map(_decoded) | _texts)
    before = draw(st.sampled_from(["", "```json\n", "```", "<think>", "Sure: ", "[" * 5000]))
    after = draw(st.sampled_from(["", "\n```", "}", "\n" * 5000 + "x", "`" * 5000]))
    return stage, before + text + after


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _read_answer(case: tuple[int, str], folder: Path) -> None:
    verify(_request(case[0]), case[1])


@cache
def _client() -> OpenAIJudge:
    return OpenAIJudge(EndpointConfig("http://127.0.0.1:9/v1", "m"))


_REPLY = {
    "choices": [
        {
            "message": {"role": "assistant", "content": json.dumps(_VERDICT), "refusal": None},
            "finish_reason": "stop",
        }
    ],
    "usage": {"total_tokens": 10},
}


def _read_reply(content: bytes, folder: Path) -> None:
    text, tokens = _client()._read(_decoded(content))
    assert isinstance(tokens, int) and tokens >= 0
    verify(_request(1), text)


def _chat_cases() -> st.SearchStrategy[bytes]:
    bodies = [chat(1, "sheet"), chat(1, "separate"), chat(2, "sheet")]

    def changed(body: dict[str, Any]) -> st.SearchStrategy[bytes]:
        parts = body["messages"][0]["content"]
        legends = [i for i, part in enumerate(parts) if "Cells" in part.get("text", "")]
        others = [
            mutated(body).map(dumped),
            st.integers(0, len(parts) - 1).flatmap(lambda i: _with_picture(body, i)),
        ]
        return st.one_of(*others, *(_with_legend(body, i) for i in legends))

    return st.one_of(*map(changed, bodies))


def chat(stage: int, layout: str) -> dict[str, Any]:
    """A body that the server judges."""
    case = cases.built_cases(32)[0]
    config = rendering.RenderConfig(layout)
    request = (
        rendering.candidate_request(case.source, case.clean, load_prompts(), config)
        if stage == 1
        else _request(2)
    )
    content = content_of(request, RequestConfig())
    return {"model": "embedded", "messages": [{"role": "user", "content": content}]}


@st.composite
def _with_picture(draw: st.DrawFn, body: dict[str, Any], place: int) -> bytes:
    """The picture after a place damaged inside its base64, or of another size."""
    import base64

    body = copy.deepcopy(body)
    shown = [p["image_url"] for p in body["messages"][0]["content"][place:] if "image_url" in p]
    if not shown:
        return dumped(body)
    data = base64.b64decode(shown[0]["url"].partition(",")[2])
    shown[0]["url"] = "data:image/png;base64," + base64.b64encode(draw(damaged(data))).decode()
    return dumped(body)


@st.composite
def _with_legend(draw: st.DrawFn, body: dict[str, Any], place: int) -> bytes:
    """A legend with other numbers or names."""
    import re

    body = copy.deepcopy(body)
    part = body["messages"][0]["content"][place]
    numbers = st.sampled_from(["0", "1", "2", "3", "7", "99", "999999", "9" * 5000, "-1", "x"])
    names = st.sampled_from(["A", "__base__", "model_config", "A | A", "", "copy", "_", "alpha"])
    for _ in range(draw(st.integers(1, 3))):
        found = list(re.finditer(r"\d+|(?<=\| )\w+|(?<=row: )\w+", part["text"]))
        if not found:
            break
        match = draw(st.sampled_from(found))
        other = draw(numbers if match[0].isdigit() else names)
        part["text"] = part["text"][: match.start()] + other + part["text"][match.end() :]
    return dumped(body)


def _read_chat(content: bytes, folder: Path) -> None:
    reply = completion(EmbeddedJudge(), "embedded", json.loads(content), Limits(pixels=10**6))
    json.dumps(reply).encode()


@cache
def subjects() -> dict[str, Subject]:
    """By name."""
    file = save({"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.int8)}, {"k": "v"})
    answer_errors = (BrokenAnswerError, PermanentJudgeError)
    return {
        "safetensors": Subject(safetensors(file), _read_file, (CheckpointError,)),
        "PEFT folder": Subject(_peft_cases(), _read_peft, (CheckpointError,)),
        "diffusers file": Subject(_diffusers_cases(), _read_diffusers, (CheckpointError,)),
        "judge's answer": Subject(_answers(), _read_answer, (BrokenAnswerError,)),
        "chat completion": Subject(
            st.one_of(mutated(_REPLY).map(dumped), damaged(dumped(_REPLY))),
            _read_reply,
            answer_errors,
        ),
        "request to the server": Subject(_chat_cases(), _read_chat, (BadRequestError,)),
    }
