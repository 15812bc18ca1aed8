"""What all tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def with_report():
    """For a test that looks at the report of a run of its own."""


@pytest.fixture(autouse=True)
def _plots_take_longer_than_a_tiny_run(request, monkeypatch):
    """Runs in this process write no report, unless the test asks for it."""
    if "fastppo.training.trainer" in sys.modules and "with_report" not in request.fixturenames:
        monkeypatch.setattr("fastppo.training.trainer.write_report", lambda folder: Path(folder) / "report.html")
