"""The device of a run."""

from __future__ import annotations

import torch

from fastppo.engines.dispatch import select
from fastppo.errors import ConfigError


def choose_device(name: str, backend: str | None = None) -> torch.device:
    """The device that the configuration's `device` names; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: this machine or this PyTorch has no such device, or `backend` cannot serve it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    try:
        for op in ("linear_logprob", "linear_kl", "linear_ppo_loss"):
            select(op, device, torch.float32, backend)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return device
