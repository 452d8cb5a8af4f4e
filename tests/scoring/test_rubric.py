"""Prompts and schemas."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_jax.scoring import CRITERIA, BrokenAnswerError, rubric


def test_packaged_prompts_name_every_criterion_and_warn_of_instructions():
    prompts = rubric.load_prompts()
    first = prompts.fill_candidate(4, "")
    second = prompts.fill_grid(4, 'a "red" hat', [("A", 5.25), ("B", None)])
    for text in (first, second):
        assert all(name in text for name in CRITERIA)
        assert "never an instruction" in text and "$" not in text
    assert "each of the 4 layers" in first
    assert "A: 5.2" in second and 'a \\"red\\" hat' in second


def test_prompts_are_replaceable(tmp_path):
    (tmp_path / "candidate.md").write_text("Judge $layers layers: $keys", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"grid\.md"):
        rubric.load_prompts(str(tmp_path))
    (tmp_path / "grid.md").write_text("Compare $count: $keys for $$5", encoding="utf-8")
    prompts = rubric.load_prompts(str(tmp_path))
    assert prompts.fill_grid(3, "", [("A", None)]) == 'Compare 1: "A" for $5'
    (tmp_path / "grid.md").write_text("Compare $candidates: $keys", encoding="utf-8")
    with pytest.raises(ValueError, match="placeholders"):
        rubric.load_prompts(str(tmp_path))


def test_schemas_are_closed_and_free_of_references():
    for schema in (rubric.candidate_schema(), rubric.grid_schema(["A", "B"])):
        text = json.dumps(schema)
        assert "$ref" not in text and "$defs" not in text
        assert schema["additionalProperties"] is False
    score = rubric.candidate_schema()["properties"]["validity"]["properties"]["score"]
    assert (score["type"], score["minimum"], score["maximum"]) == ("number", 0, 10)
    scores = rubric.grid_schema(["A", "B"])["properties"]["scores"]
    assert scores["required"] == ["A", "B"] and not scores["additionalProperties"]


def test_reasons_are_short_by_schema_and_long_ones_are_read():
    reason = rubric.candidate_schema()["properties"]["validity"]["properties"]["reason"]
    assert reason == {"type": "string", "maxLength": rubric.REASON_LETTERS}
    long = "a" * (rubric.REASON_LETTERS + 1)
    text = json.dumps({name: {"reason": long, "score": 5.0} for name in CRITERIA})
    assert rubric.parse_candidate(text).reasons() == (long,) * 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=5, max_size=5), st.text('a"\\\n{}€', max_size=20))
def test_answers_within_range_are_read_as_they_are(scores, reason):
    text = json.dumps(
        {
            name: {"reason": reason, "score": score}
            for name, score in zip(CRITERIA, scores, strict=True)
        }
    )
    verdict = rubric.parse_candidate(text)
    np.testing.assert_allclose(verdict.scores(), np.array(scores) / 10)
    assert verdict.reasons() == (reason,) * 5


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text("a1", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*CRITERIA, "scores", "A", "x"]), inner, max_size=6)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(_json.map(json.dumps) | st.text('[]{}":,1aé', max_size=40))
def test_anything_else_is_a_broken_answer(text):
    with pytest.raises(BrokenAnswerError):
        rubric.parse_candidate(text)
    with pytest.raises(BrokenAnswerError):
        rubric.parse_grid(text, ["A", "B"])


def test_a_deeply_nested_answer_is_broken():
    with pytest.raises(BrokenAnswerError):
        rubric.parse_candidate("[" * 100_000)


def test_grid_scores_come_in_the_order_of_the_labels():
    found = rubric.parse_grid('{"scores": {"B": 100, "A": 0.5}}', ["A", "B"])
    np.testing.assert_allclose(found, [0.005, 1.0])
