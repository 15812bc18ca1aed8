"""The device of a run."""

from __future__ import annotations

import torch

from fastppo.engines.budget import scratch_bytes
from fastppo.engines.dispatch import select
from fastppo.errors import ConfigError, one_line, quote


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
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"device: {quote(name)} cannot be used ({one_line(str(error).partition(chr(10))[0])})"
        ) from None
    scratch_bytes()  # raises for a FASTPPO_SCRATCH_MB that is no size
    try:
        for op in ("linear_logprob", "linear_kl", "linear_ppo_loss"):
            select(op, device, torch.float32, backend)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return device
