"""Runs tests/triton_kernels beside all other tests, in a process of its own.

Triton's interpreter is chosen when triton is imported, for the whole process, and needs one core for as long as the
other tests need theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

import pytest

# Before torch is imported: two processes share the cores, and threads that spin while they wait take the other's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

THE_TEST = "test_the_kernels_agree_with_float64_in_the_interpreter"  # in test_triton_kernels.py


class Run(NamedTuple):
    process: subprocess.Popen
    output: IO[str]


RUN = pytest.StashKey[Run]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == THE_TEST)  # it waits for that process, so it comes last


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or not any(item.name == THE_TEST for item in session.items):
        return
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open for as long as the process runs)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/triton_kernels"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    session.config.stash[RUN] = Run(process, output)


def pytest_unconfigure(config: pytest.Config) -> None:
    if run := config.stash.get(RUN, None):
        run.process.kill()


@pytest.fixture
def interpreted_kernels(request: pytest.FixtureRequest) -> Run:
    return request.config.stash[RUN]
