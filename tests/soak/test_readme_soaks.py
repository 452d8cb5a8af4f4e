"""What the README says of the soaks is what their results say.

Its table of faults has a row for each result, with a link to it and the command that made it.
"""

import json
import re
from pathlib import Path
from statistics import median

import pytest
from fuzzing import subjects

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
RESULTS = Path(__file__).with_name("results")


def of_kills(told):
    killed = ", ".join(phase for phase, kills in told["by_phase"].items() if kills)
    yield f"a random phase: {killed}"
    served = told["served"]
    yield f"{told['kills']} in {told['runs']} runs"
    yield f"{served['kills']} of them in {served['runs']} runs that a server judges"
    yield f"{served['asked again']} of {served['undisturbed']:,} requests were asked again"
    yield f"{told['lost']} of {told['compared']:,} arrays, metrics and judgements"


def of_the_long_run(told):
    (tenths,) = (values for name, values in told.items() if name.endswith("tenths"))
    handles, threads = (median(tenths[name]) for name in ("file handles", "threads"))
    second, last = (tenths["resident memory, MB"][number] for number in (1, -1))
    yield f"{told['epochs']:,} epochs"
    yield f"{handles:.0f} file handles and {threads:.0f} threads"
    yield f"memory {second:.0f} MB in its second tenth, {last:.0f} MB in the last"
    saved, grown = told["memory, kB per epoch and save"], told["which makes of 600 epochs, MB"]
    yield f"by {saved:.0f} kB a save, which makes {grown:.0f} MB of 600 epochs"
    yield f"records grow by {told['records, bytes per epoch'] / 1e3:.0f} kB an epoch"
    growing = [name for name, flat in told["flat"].items() if not flat]
    yield f"flat but for {' and '.join(growing)}" if growing else "all flat"


def of_versions(told):
    failed, python = len(told["failed"]), told["python"].rpartition(".")[0]
    yield f"Python {python} with JAX {told['installed']['jax']}"
    yield f"{told['passed'] + told['skipped'] + failed:,} tests"
    yield f"{told['passed']:,} passed, {failed} failed"


def of_fuzzing(told):
    assert set(told) == set(subjects())
    (cases,) = {subject["cases"] for subject in told.values()}
    slowest = max(subject["slowest_seconds"] for subject in told.values())
    yield f"{cases:,} of each of {len(told)} kinds"
    yield f"the slowest took {slowest:.1f} s of a core"


ROWS = {
    "kills.json": of_kills,
    "long_run.json": of_the_long_run,
    "fuzz.json": of_fuzzing,
    **{path.name: of_versions for path in sorted(RESULTS.glob("*_versions.json"))},
}


@pytest.mark.parametrize(("file", "texts"), ROWS.items())
def test_a_row_is_that_of_its_results(file, texts):
    told = json.loads((RESULTS / file).read_text())
    link = f"(tests/soak/results/{file})"
    (row,) = [line for line in README.splitlines() if line.startswith("|") and link in line]
    missing = [text for text in texts(told) if text not in row]
    assert not missing, f"{missing} should stand in {row}"
    (shown,) = re.findall(r"`(python [^`]+)`", row)
    made = [told] if "command" in told else told.values()
    assert all(f"{result['command']} ".startswith(f"{shown} ") for result in made)


@pytest.mark.parametrize("file", [*ROWS, "judge_pool.json"])
def test_a_result_names_its_commit(file):
    told = json.loads((RESULTS / file).read_text())
    for result in [told] if "command" in told else told.values():
        assert re.fullmatch("[0-9a-f]{12}", result["commit"])


def test_the_judge_pool_did_what_it_did():
    told = json.loads((RESULTS / "judge_pool.json").read_text())
    hostile, healthy = told["with_two_hostile_servers"], told["six_healthy_servers"]
    text = " ".join(README.split())
    for said in (
        f"{hostile['requests']:,} requests to eight servers",
        f"all {hostile['right']:,} candidates and {hostile['grids_right']:,} grids got",
        f"{hostile['requests_per_second']:.1f} requests per second",
        f"servers alone give {healthy['requests_per_second']:.1f}",
        f"{hostile['client_cpu_ms_per_request']:.1f} ms of CPU per request",
        f"at most {hostile['peak_memory_mib']} MiB",
    ):
        assert said in text
    assert hostile["servers"] == 8
    assert hostile["wrong"] + hostile["invalid"] + healthy["wrong"] + healthy["invalid"] == 0
