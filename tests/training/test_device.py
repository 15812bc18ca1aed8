"""The device that a configuration names."""

from __future__ import annotations

import pytest
import torch

from fastppo.errors import ConfigError
from fastppo.training.device import choose_device


def test_device(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for available, expected in ((True, "cuda"), (False, "cpu")):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda available=available: available)
            patched.setattr(torch, "empty", lambda size, device: None)  # which a CPU-only PyTorch cannot place on CUDA
            assert choose_device("auto") == torch.device(expected)
    for name in ("no-such-device", "cuda:77"):
        with pytest.raises(ConfigError, match=f"device: '{name}' cannot be used") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_serve_the_device(monkeypatch):
    with pytest.raises(ConfigError, match=r"^backend: expected one of"):
        choose_device("cpu", "none")
    monkeypatch.setenv("FASTPPO_BACKEND", "none")
    with pytest.raises(ConfigError, match=r"^FASTPPO_BACKEND: expected one of"):
        choose_device("cpu")
