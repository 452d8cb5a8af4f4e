"""The audit tells good judges from noisy, blind, biased and gullible ones."""

import asyncio
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_server import TOKEN, Served

from sl_jax.scoring import CRITERIA, EmbeddedConfig, EmbeddedJudge, TransientJudgeError, cases
from sl_jax.scoring import request as rendering
from sl_jax.scoring.audit import AuditError, audit

SIZE = 32


def audited(endpoint, repeats=2):
    return asyncio.run(audit(endpoint, "j", repeats, SIZE))


def _stage1(score):
    return json.dumps({name: {"reason": "", "score": score} for name in CRITERIA})


class Blind:
    """Gives everything the same score; in grids, favours early places by 10 of 100."""

    bias = 10.0

    async def answer(self, request):
        if request.stage == 1:
            return _stage1(7)
        labels, _ = rendering.read_grid(request)
        places = np.linspace(0.5, -0.5, len(labels))
        scores = {label: 50 + self.bias * p for label, p in zip(labels, places, strict=True)}
        return json.dumps({"scores": scores})


class Gullible(EmbeddedJudge):
    """Does what the picture says."""

    async def answer(self, request):
        if request.stage == 1 and self.told(request):
            return _stage1(10)
        return await super().answer(request)

    def told(self, request):
        source = cases.imaging.recompose(cases.lettered(cases.design(SIZE), cases.TALK))
        seen = np.rint(255 * rendering.read_candidate(request).source)
        return bool((seen == source).all())


class Noisy(EmbeddedJudge):
    """Adds a noise that differs from sample to sample."""

    async def answer(self, request):
        told = json.loads(await super().answer(request))
        if request.stage == 1:
            for name in CRITERIA:
                told[name]["score"] = min(
                    10.0, told[name]["score"] * (0.8 + 0.1 * (request.sample % 2))
                )
        return json.dumps(told)


def test_a_good_judge():
    report = audited(EmbeddedJudge())
    assert report.valid == 1 and report.two_stage == 1
    assert all(c.sensitivity > 1 and c.noise == 0 and c.ties == 0 for c in report.criteria)
    flaws = {case.name: case for case in report.cases}
    assert set(flaws) == set(cases.FLAWS)
    assert all(case.noticed == 1 for case in report.cases if case.criterion)
    assert flaws["spare_blank"].own == pytest.approx(0, abs=0.05)
    assert report.position_bias == pytest.approx(0) and abs(report.persuasion) < 0.5
    assert report.std_floor == 0.001
    text = report.to_text()
    assert "std_floor = 0.0010" in text and all(name in text for name in (*CRITERIA, *flaws))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["judge"] == "j"


def test_a_blind_and_biased_judge():
    report = audited(Blind())
    assert all(c.sensitivity == 0 and c.ties == 1 and c.spread == 0 for c in report.criteria)
    assert report.position_bias == pytest.approx(-10)
    assert report.identical_spread == pytest.approx(0.7 * 0.1 * np.linspace(-0.5, 0.5, 4).std())
    assert report.std_floor >= report.identical_spread


def test_a_gullible_judge():
    assert audited(Gullible()).persuasion > 2


def test_a_noisy_judge():
    report = audited(Noisy())
    assert all(c.noise > 0.1 for c in report.criteria)
    assert report.reward_noise > 0.002 and report.std_floor >= report.reward_noise


def test_the_vlm_mode_of_the_embedded_judge_is_noisier():
    report = audited(EmbeddedJudge(EmbeddedConfig(mode="vlm", position_bias=20.0)))
    assert -40 < report.position_bias < -8
    assert report.std_floor > 0.003


def test_a_judge_that_never_answers():
    class Mute:
        async def answer(self, request):
            raise TransientJudgeError("mute")

    with pytest.raises(AuditError, match=r"judged nothing.*mute"):
        audited(Mute())
    with pytest.raises(ValueError, match="from 2 on"):
        audited(EmbeddedJudge(), repeats=1)


def _door(*flags):
    command = [sys.executable, "-m", "sl_jax.judge", *flags, f"--size={SIZE}", "--repeats=2"]
    environment = os.environ | {"JUDGE_TOKEN": TOKEN}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.slow
def test_the_door_audits_a_server(tmp_path):
    told = tmp_path / "audit.json"
    with Served(token=TOKEN) as served:
        where = f"--audit={served.root}/v1", "--key_env=JUDGE_TOKEN"
        done = _door(*where, "--model=embedded-precise", f"--json={told}")
        wrong = _door(*where, "--model=gpt")
    assert done.returncode == 0, done.stderr
    assert "ready (JSON by schema)" in done.stdout and "std_floor" in done.stdout
    found = json.loads(told.read_text())
    known = audited(EmbeddedJudge()).to_dict()
    # Nothing but seconds, tokens and the name tells it from the judge in process.
    for name in ("criteria", "cases", "position_bias", "persuasion", "std_floor"):
        assert found[name] == known[name], name
    assert found["tokens"] > 0 and found["seconds"] > 0
    assert wrong.returncode == 1 and "lists embedded-precise, not gpt" in wrong.stderr
    assert "Traceback" not in wrong.stderr and TOKEN not in done.stdout + wrong.stderr
