"""The five criteria, the prompts, and the shape and checking of a judge's answers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
from jaxtyping import Float

from sl_jax.scoring.types import CRITERIA, BrokenAnswerError

REASON_LETTERS = 400  # longest reason that a server is asked for

DESCRIPTIONS = {
    "semantic_separation": (
        "each layer holds one nameable thing; no thing is smeared over several layers."
    ),
    "alpha_quality": "clean mattes, no halos, no colour bleeding into transparent regions.",
    "background_inpainting": (
        "what was hidden behind objects is filled plausibly; no ghosts of them remain."
    ),
    "content_distribution": (
        "content is spread sensibly: not one layer with everything, no copies of the whole "
        "picture, no object cut in two without need."
    ),
    "validity": (
        "no noise, no layers of artefacts, no blank layer while something is missing elsewhere; "
        "together the layers give the source back."
    ),
}

_PLACEHOLDERS = {
    "candidate": {"layers", "caption", "criteria", "keys"},
    "grid": {"count", "layers", "caption", "context", "criteria", "keys"},
}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The two prompt templates (`string.Template` syntax).

    Attributes:
      candidate: stage 1, with $layers, $caption, $criteria and $keys.
      grid: stage 2, with $count, $layers, $caption, $context, $criteria and $keys.
    """

    candidate: str
    grid: str

    def fill_candidate(self, layers: int, caption: str) -> str:
        """The text of stage 1 for a stack of `layers` layers."""
        return _fill(self.candidate, layers=layers, caption=caption, keys=_quoted(CRITERIA))

    def fill_grid(
        self, layers: int, caption: str, context: Sequence[tuple[str, float | None]]
    ) -> str:
        """The text of stage 2; `context` pairs each label with its stage-1 score in 0…10."""
        known = [f"{label}: {score:.1f}" for label, score in context if score is not None]
        return _fill(
            self.grid,
            count=len(context),
            layers=layers,
            caption=caption,
            context=", ".join(known) if known else "(not given)",
            keys=_quoted([label for label, _ in context]),
        )


def load_prompts(folder: str | None = None) -> Prompts:
    """Reads `candidate.md` and `grid.md` from a folder; None takes the packaged ones.

    Raises:
      FileNotFoundError: a template is missing.
      ValueError: a template names a placeholder that does not exist or lacks "$keys".
    """
    root = (
        importlib.resources.files("sl_jax.scoring") / "prompts"
        if folder is None
        else pathlib.Path(folder)
    )
    texts = {}
    for name, allowed in _PLACEHOLDERS.items():
        path = root / f"{name}.md"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a prompt folder holds candidate.md and grid.md"
            )
        texts[name] = path.read_text(encoding="utf-8")
        template = string.Template(texts[name])
        found = set(template.get_identifiers())
        if not template.is_valid() or not found <= allowed or "keys" not in found:
            raise ValueError(
                f"{path}: placeholders {sorted(found)}; please use $keys and any of "
                f"{', '.join('$' + name for name in sorted(allowed))}, and write $$ for a dollar"
            )
    return Prompts(**texts)


def _fill(template: str, *, caption: str, **values: object) -> str:
    criteria = "\n".join(f"- {name}: {text}" for name, text in DESCRIPTIONS.items())
    said = f"The picture is described as: {json.dumps(caption, ensure_ascii=False)}"
    return string.Template(template).substitute(
        values, criteria=criteria, caption=said if caption else ""
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CriterionVerdict(_Model):
    """One criterion: the reason comes first, so that the score follows from it."""

    # In the schema alone: it stops a server's runaway; what is longer all the same is read.
    reason: Annotated[str, pydantic.Field(json_schema_extra={"maxLength": REASON_LETTERS})]
    score: Annotated[float, pydantic.Field(ge=0, le=10)]


class CandidateVerdict(_Model):
    """Stage 1: what a judge says about one candidate."""

    semantic_separation: CriterionVerdict
    alpha_quality: CriterionVerdict
    background_inpainting: CriterionVerdict
    content_distribution: CriterionVerdict
    validity: CriterionVerdict

    def scores(self) -> Float[np.ndarray, " 5"]:
        """The five scores in the order of `CRITERIA`, scaled to 0…1."""
        return np.array([getattr(self, name).score for name in CRITERIA]) / 10

    def reasons(self) -> tuple[str, ...]:
        """The five reasons in the order of `CRITERIA`."""
        return tuple(getattr(self, name).reason for name in CRITERIA)


_GridScore = Annotated[float, pydantic.Field(ge=0, le=100)]


@functools.lru_cache(maxsize=256)
def grid_verdict(labels: tuple[str, ...]) -> type[_Model]:
    """The model of a stage-2 answer: {"scores": {label: 0…100}} with each label required."""
    scores = pydantic.create_model(
        "GridScores", __base__=_Model, **dict.fromkeys(labels, (_GridScore, ...))
    )
    return pydantic.create_model("GridVerdict", __base__=_Model, scores=(scores, ...))


@functools.lru_cache(maxsize=256)
def _schema(model: type[_Model]) -> dict[str, Any]:
    raw = model.model_json_schema()
    return _inline(raw, raw.get("$defs", {}))


def candidate_schema() -> dict[str, Any]:
    """The JSON schema of stage 1, without references (some servers know none)."""
    return _schema(CandidateVerdict)


def grid_schema(labels: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of stage 2 for these labels, without references."""
    return _schema(grid_verdict(tuple(labels)))


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {
        key: _inline(value, definitions)
        for key, value in node.items()
        if key != "$defs" and not (key in ("title", "description") and isinstance(value, str))
    }


def parse_candidate(text: str) -> CandidateVerdict:
    """Reads a stage-1 answer.

    Raises:
      BrokenAnswerError: it is not JSON under the schema, or a score is not within 0…10.
    """
    return parse_object(CandidateVerdict, text)


def parse_grid(text: str, labels: Sequence[str]) -> Float[np.ndarray, " labels"]:
    """Reads a stage-2 answer: scores scaled to 0…1, in the order of `labels`.

    Raises:
      BrokenAnswerError: it is not JSON under the schema, a label is missing, unknown or named
        twice, or a score is not within 0…100.
    """
    verdict = parse_object(grid_verdict(tuple(labels)), text)
    return np.array([getattr(verdict.scores, label) for label in labels]) / 100


_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def parse_object(model: type[pydantic.BaseModel], text: str) -> Any:
    """Parses the one JSON object of an answer, whatever is said around it.

    Raises:
      BrokenAnswerError: there is none that `model` allows.
    """
    try:
        content = json.loads(json_object_in(text), object_pairs_hook=_unique_keys)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a character is no text
        return model.model_validate(content)
    except (ValueError, RecursionError) as error:
        first = str(error).splitlines()
        raise BrokenAnswerError(f"broken answer: {' '.join(first[:3])[:300]}") from error


def json_object_in(text: str) -> str:
    """What the outermost braces enclose, past any thinking aloud; the text if there are none."""
    body = _THOUGHT.sub("", text)
    start, end = body.find("{"), body.rfind("}")
    return body[start : end + 1] if 0 <= start < end else body


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key is named twice: {sorted(keys)}")
    return dict(pairs)
