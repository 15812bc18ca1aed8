"""Tests of the real vLLM, which need an environment of their own: `bash .ci/vllm` makes it and runs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

INSTALLED = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INSTALLED:
        for item in items:
            if "with_vllm" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; `bash .ci/vllm` runs these tests"))


def pytest_report_header() -> str:
    return f"vLLM: {importlib.util.find_spec('vllm').origin if INSTALLED else 'not installed'}"


@pytest.fixture(scope="module", autouse=True)
def _no_report():
    """Skip the report's plots, which take most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppo.training.trainer.write_report", lambda folder: folder / "report.html")
        yield
