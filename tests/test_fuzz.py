"""What reads strangers' files and answers ends in its own errors; more cases: soak/fuzz.py."""

import base64
import re

import pytest
from fuzzing import SETTINGS, chat, dumped, lora_file, outcome, packed, subjects
from hostile_files import good
from hypothesis import HealthCheck, Phase, given, settings

CASES = 500
WEIGHTS = lora_file("base_model.model.", {})


def _told(shape, end=24, dtype="F32", begin=0):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def _legend(stage, pattern, other):
    """A request whose legend says something else."""
    body = chat(stage, "sheet")
    for part in body["messages"][0]["content"]:
        if "Cells" in part.get("text", ""):
            part["text"] = re.sub(pattern, other, part["text"], count=1)
    return "request to the server", dumped(body)


def _one_picture_of_another_size(place):
    body = chat(1, "separate")
    pictures = [part for part in body["messages"][0]["content"] if "image_url" in part]
    encoded = base64.b64encode(good(height=5, width=7)).decode()
    pictures[place]["image_url"]["url"] = f"data:image/png;base64,{encoded}"
    return "request to the server", dumped(body)


_CELLS = "In each cell, 1 by 2 pictures of 1 wide and 1 high, 1 apart: "
# What such cases found, and what is known to break other readers.
MET = {
    "a header of brackets": ("safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5),
    "a header longer than any": ("safetensors", (2**63).to_bytes(8, "little") + b"{}"),
    "negative axes": ("safetensors", packed(_told([-2, -3]), b"\0" * 24)),
    "axes of floats": ("safetensors", packed(_told([2.0, 3]), b"\0" * 24)),
    "an axis beyond all memory": ("safetensors", packed(_told([0, 2**62], 0), b"")),
    "an axis of 400 digits": ("safetensors", packed(_told([10**400, 0], 0), b"")),
    "a type that is a list": ("safetensors", packed(_told([2, 3], dtype=["F32"]), b"\0" * 24)),
    "offsets that are no numbers": ("safetensors", packed(_told([2, 3], "24"), b"\0" * 24)),
    "metadata that are no texts": ("safetensors", packed({"__metadata__": {"a": 1}}, b"")),
    "settings of brackets": ("PEFT folder", (b"[" * 10**5, WEIGHTS)),
    "a rank of 5,000 digits": ("PEFT folder", (b'{"r": ' + b"9" * 5000 + b"}", WEIGHTS)),
    "an alpha beyond floats": (
        "PEFT folder",
        (dumped(SETTINGS | {"lora_alpha": 10**400}), WEIGHTS),
    ),
    "an alpha beyond float32": ("PEFT folder", (dumped(SETTINGS | {"lora_alpha": 1e300}), WEIGHTS)),
    "a base that is a table": (
        "PEFT folder",
        (dumped(SETTINGS | {"base_model_name_or_path": {"a": 1}}), WEIGHTS),
    ),
    **{
        f"the pattern {pattern[:20]}": (
            "PEFT folder",
            (dumped(SETTINGS | {"alpha_pattern": {pattern: 2}}), WEIGHTS),
        )
        for pattern in ("(?i)x", "a{9999999999}", "(.+)+x", "(.*.*.*.*.*.*.*)x", "(" * 9999)
    },
    "a fence without end": ("judge's answer", (1, "```" + "\n" * 10**5 + "x")),
    "an answer of brackets": ("judge's answer", (1, "[" * 10**5)),
    "a key twice": ("judge's answer", (0, '{"caption": "a", "caption": "b"}')),
    "a reply of brackets": ("chat completion", b"[" * 10**5),
    "half a character": ("judge's answer", (0, '{"caption": "\\ud800"}')),
    "a candidate called __base__": _legend(2, r"A \|", "__base__ |"),
    "a candidate called model_config": _legend(2, r"A \|", "model_config |"),
    "no columns": _legend(1, r"in \d+ columns", "in 0 columns"),
    "cells without width": _legend(1, r"Cells: \d+", "Cells: 0"),
    "squares without sides": _legend(2, r"of \d+ pixel squares", "of 0 pixel squares"),
    "cells described without end": _legend(2, "In each cell.*", _CELLS * 30_000),
    "a source of another size": _one_picture_of_another_size(0),
    "a recomposition of another size": _one_picture_of_another_size(1),
    "a layer of another size": _one_picture_of_another_size(2),
}


@pytest.mark.parametrize("name", MET)
def test_cases_that_were_met(name, tmp_path):
    subject, case = MET[name]
    assert outcome(subjects()[subject], case, tmp_path)[0] != "read"


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_patterns_as_people_write_them(table, tmp_path):
    for pattern in ("to_q", r".*\.attn\.to_q", r"transformer_blocks\.(0|1)\..*", "^proj_out"):
        case = (dumped(SETTINGS | {table: {pattern: 2}}), WEIGHTS)
        assert outcome(subjects()["PEFT folder"], case, tmp_path)[0] == "read", pattern


@pytest.mark.slow
@pytest.mark.parametrize("name", subjects())
def test_only_documented_errors(name, tmp_path):
    subject, ends = subjects()[name], set()

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(subject.cases)
    def read(case):
        ends.add(outcome(subject, case, tmp_path)[0])

    read()
    assert "read" in ends and len(ends) > 1  # cases of both kinds
