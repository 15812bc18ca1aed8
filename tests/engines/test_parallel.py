"""csrc/runtime/parallel.h in a program of its own: exceptions on other threads, and no data race."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path, *flags: str) -> tuple[Path, subprocess.CompletedProcess]:
    program = folder / "parallel_test"
    sources = [ROOT / "tests/engines/parallel_test.cpp", ROOT / "csrc/runtime/parallel.cpp"]
    command = [COMPILER, "-std=c++17", "-g", "-pthread", f"-I{ROOT / 'csrc'}", *flags, *sources, "-o", program]
    return program, subprocess.run(command, capture_output=True, text=True, timeout=300)


def run(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_exceptions_of_other_threads_reach_the_caller(tmp_path):
    program, built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    run(program)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_no_data_race(tmp_path):
    program, built = build(tmp_path, "-fsanitize=thread")
    if built.returncode:
        pytest.skip(f"no ThreadSanitizer here: {built.stderr.splitlines()[-1]}")
    run(program)
