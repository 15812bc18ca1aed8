"""What the tests of whole runs share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def no_report():
    """Skip the report's plots, which take most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppo.training.trainer.write_report", lambda folder: folder / "report.html")
        yield
