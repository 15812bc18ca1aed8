"""The device of a run."""

from __future__ import annotations

import os

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
        torch.zeros(1, device=device).item()  # which "meta" refuses
    except Exception as error:  # PyTorch raises a RuntimeError, an AssertionError, an ImportError, ...
        reason = one_line(error, 120)
        expected = "expected auto, cpu, cuda or cuda:0, cuda:1, ..."
        raise ConfigError(f"device: {quote(name)} cannot be used ({reason}); {expected}") from None
    scratch_bytes()  # raises for a FASTPPO_SCRATCH_MB that is no size
    try:
        for op in ("linear_logprob", "linear_kl", "linear_ppo_loss"):
            select(op, device, torch.float32, backend)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return device


def busy_machine() -> str | None:
    """A warning, with its remedy, if others leave too few cores for PyTorch's threads; else None.

    While such a thread waits for the others it spins, on a core that one of them may need.
    """
    threads, passive = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if threads == 1 or passive or not hasattr(os, "getloadavg"):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load <= max(cores - threads, cores / 2):  # half of the cores: a load average counts what has ended, too
        return None
    return (
        f"this machine is busy (load {load:.1f}, {cores} cores), and {threads} threads, which spin while they wait, "
        "may take many times as long as one; set OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1"
    )
