"""The judge's rooms run where no accelerator framework is installed."""

import subprocess
import sys

_SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "torch"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import asyncio, pkgutil
import sl_jax.imaging, sl_jax.scoring
from sl_jax.scoring import cases

for room in (sl_jax.imaging, sl_jax.scoring):
    for module in pkgutil.iter_modules(room.__path__):
        __import__(f"{room.__name__}.{module.name}")
case = cases.built_cases(32)[0]
group = sl_jax.scoring.Group("g", case.source, (case.clean, case.flawed))
judge = sl_jax.scoring.TwoStageJudge(sl_jax.scoring.EmbeddedJudge())
scores = asyncio.run(judge.judge(group))
assert scores.two_stage and scores.reward[0] > scores.reward[1]
print("judged")
"""


def test_judging_needs_no_accelerator_framework():
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "judged", done.stderr
