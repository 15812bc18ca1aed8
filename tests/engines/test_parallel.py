"""csrc/runtime in a program of its own, with ThreadSanitizer where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def build(program: Path, *flags: str) -> subprocess.CompletedProcess:
    sources = [ROOT / "tests/engines/parallel_test.cpp", ROOT / "csrc/runtime/parallel.cpp"]
    command = [COMPILER, "-std=c++17", "-g", "-pthread", f"-I{ROOT / 'csrc'}", *flags, *sources, "-o", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_exceptions_reach_the_caller_and_no_data_races(tmp_path):
    program = tmp_path / "parallel_test"
    built = build(program, "-fsanitize=thread")
    if built.returncode:  # no ThreadSanitizer here
        built = build(program)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
