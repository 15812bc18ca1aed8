"""Seeds every test from one number, and runs tests/triton_kernels in a process beside all other tests.

The number is in the header of the run. FASTPPO_SEED sets it, and FASTPPO_SEED=random draws a new one. What a test draws
depends on this number and the test's own id, not on which other tests are selected.

Whether Triton's interpreter is used is decided when triton is imported, for the whole process, so its tests need their
own. It occupies one core for as long as the other tests occupy theirs. With pytest-xdist its test comes first, and one
worker waits for it.
"""

from __future__ import annotations

import gc
import os
import random
import secrets
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import pytest

# Before torch is imported: two processes share the cores, and threads that spin while they wait take the other's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:  # there is one for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before trackio is imported, which reads it once, and which other packages import: never the user's own runs.
TRACKIO = tempfile.TemporaryDirectory()
os.environ["TRACKIO_DIR"] = TRACKIO.name

if os.environ.setdefault("FASTPPO_SEED", "0") == "random":
    # In the environment, so that processes started by tests (the interpreted kernels, xdist's workers) have it too.
    os.environ["FASTPPO_SEED"] = str(secrets.randbelow(2**32))
SEED = int(os.environ["FASTPPO_SEED"])

THE_TEST = "test_the_kernels_agree_with_float64_in_the_interpreter"  # in test_triton_kernels.py


class Run(NamedTuple):
    process: subprocess.Popen
    output: IO[str]


RUN = pytest.StashKey[Run]()


def seed(name: str) -> None:
    """Seed the global generators of random, NumPy and PyTorch from SEED and `name`."""
    import numpy as np
    import torch

    number = zlib.crc32(f"{SEED}:{name}".encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  (transformers and datasets draw from the global generator)
    torch.manual_seed(number)


@pytest.fixture(autouse=True)
def _seed_test(request: pytest.FixtureRequest) -> None:
    seed(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """Fixtures of a module or a session are set up before the fixture above, by whichever test comes first."""
    if fixturedef.scope != "function":
        seed(f"{request.node.nodeid}:{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"FASTPPO_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number once more where there are failures, since `pytest -q` prints no header."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.line(f"To draw the same random numbers again: FASTPPO_SEED={SEED}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # It waits for that process, which has started by then. In a worker it starts the process, and others work on.
    items.sort(key=lambda item: (item.name == THE_TEST) != IN_WORKER)


def pytest_collection_finish(session: pytest.Session) -> None:
    # What the imported libraries made stays. Every start of transformers' Trainer collects garbage, several times, and
    # going through all of it takes longer than the training of a test.
    gc.freeze()
    # All workers collect the test. The one that runs it starts the process.
    if not (session.config.option.collectonly or IN_WORKER) and any(item.name == THE_TEST for item in session.items):
        start_interpreted_kernels(session.config)


def start_interpreted_kernels(config: pytest.Config) -> None:
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open for as long as the process runs)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/triton_kernels"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    config.stash[RUN] = Run(process, output)


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
    if run := config.stash.get(RUN, None):
        run.process.kill()


@pytest.fixture
def interpreted_kernels(request: pytest.FixtureRequest) -> Run:
    if RUN not in request.config.stash:
        start_interpreted_kernels(request.config)
    return request.config.stash[RUN]
