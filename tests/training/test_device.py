"""The device that a configuration names."""

from __future__ import annotations

import pytest
import torch

from fastppo.config_fields import ConfigError
from fastppo.training.device import choose_device


def test_device(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device("auto") == torch.device(expected)
    for name in ("no-such-device", "cuda:77"):
        with pytest.raises(ConfigError, match=f"device: '{name}' cannot be used") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)
