"""The device of a run."""

from __future__ import annotations

import torch

from fastppo.config_fields import ConfigError


def choose_device(name: str) -> torch.device:
    """The device that the configuration's `device` names; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: this machine or this PyTorch has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device
