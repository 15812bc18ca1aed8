"""The test-suite of the kernels on this GPU, in parallel, for as long as there is time."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from gpu_stages.bench import Bench, run_within

ROOT = Path(__file__).parents[2]


def run(bench: Bench) -> None:
    bench.attempt("tests", "tests/triton_kernels", lambda: suite(bench))


def suite(bench: Bench) -> dict:
    """Passed and failed are counted from what pytest prints, so that running out of time loses no result."""
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "tests/triton_kernels"]
    if not bench.on_gpu:
        command += ["--collect-only", "-q"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    code, text = run_within(bench.left(), command, bench.out / "tests.txt", cwd=ROOT)
    if not bench.on_gpu:
        found = re.search(r"(\d+) tests? collected", text)
        return {"status": "PASS" if found and code == 0 else "FAIL", "collected": int(found[1]) if found else 0}
    return judge(code, text)


def judge(code: int | None, text: str) -> dict:
    """Of what `pytest -v` printed, with or without xdist; code is None if it had to be killed."""
    # The sections after the tests' own lines repeat what failed.
    lines = re.split(r"^=+ (?:ERRORS|FAILURES|warnings summary|short test summary info) =+$", text, flags=re.M)[0]
    bad = len(re.findall(r"\b(FAILED|ERROR)\b", lines))
    names = re.findall(r"\b(?:FAILED|ERROR) (tests/\S+)|(tests/\S+) (?:FAILED|ERROR)\b", lines)
    passed = len(re.findall(r"\bPASSED\b", lines))
    fields = {"passed": passed, "failed": bad, "finished": code is not None}
    if code is None and not passed and not bad:
        return {"status": "skipped", "error": "no test ended in time", **fields}
    wrong = bad or code not in (None, 0)
    return {"status": "FAIL" if wrong else "PASS", "error": "; ".join(a or b for a, b in names[:5])[:300], **fields}
