"""Which backend computes an operator: chosen by device, overridable by argument and by FASTPPO_BACKEND.

`reference` is plain PyTorch with full logits: the oracle and the naive baseline. `chunked` is PyTorch in tiles of a
fixed budget, on any device. `cpu` is the C++ extension (csrc/). `triton` is kernels/fastppo_kernels.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch

from fastppo.engines import chunked, cpu, extension, triton, triton_kernels
from fastppo.errors import ConfigError, quote

# For each operator, its backends: the first usable one is taken, `triton` only on chips that have passed every check of
# benchmarks/gpu.py.
BACKENDS: dict[str, tuple[str, ...]] = {
    "linear_logprob": ("triton", "cpu", "chunked", "reference"),
    "linear_kl": ("triton", "cpu", "chunked", "reference"),
    "linear_ppo_loss": ("triton", "cpu", "chunked", "reference"),
    "fisher_vector_product": ("triton", "chunked", "reference"),
    "selective_logprob": ("triton", "cpu", "chunked", "reference"),
    "ppo_loss": ("triton", "cpu", "chunked", "reference"),
    "gae": ("triton", "cpu", "reference"),
}
# Who computes what; `reference` is the formulas of `fastppo.ops.reference`, which the operators call themselves.
ENGINES: dict[str, ModuleType] = {"chunked": chunked, "cpu": cpu, "triton": triton}
NAMES = ("reference", *ENGINES)

_warned: set[str] = set()


class FastPPOWarning(UserWarning):
    """Something works, but more slowly or otherwise than it could; the message says how to mend it."""


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FastPPOWarning, stacklevel=3)


def unusable(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot serve tensors of this device and dtype, in a line; None if it can."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device.type}"
        return extension.why_missing()
    if backend == "triton":
        return triton_kernels.why_unusable(device, dtype)
    return None


def select(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """The backend that computes `op` on tensors of this device and dtype.

    An explicit `backend` is used, or raises. FASTPPO_BACKEND is a preference: operators that have no such backend
    use the fastest they have, and so do tensors that it cannot serve, after one warning that says why.

    Raises:
        ValueError: an unknown backend, or one that does not serve this operator, device or dtype.
    """
    available = BACKENDS[op]
    if backend is not None:
        if backend not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
        if backend not in available:
            raise ValueError(f"backend: {op} has no {backend!r} backend, only {', '.join(available)}")
        if reason := unusable(backend, device, dtype):
            raise ValueError(f"backend: {backend!r} cannot be used for {op}: {reason}")
        return backend
    wanted = os.environ.get("FASTPPO_BACKEND") or "auto"
    if wanted not in (*NAMES, "auto"):
        raise ConfigError(f"FASTPPO_BACKEND: expected one of {', '.join(NAMES)}, auto; got {quote(wanted)}")
    if wanted in available:
        reason = unusable(wanted, device, dtype)
        if reason is None:
            return wanted
        warn_once(f"FASTPPO_BACKEND={wanted} is not used: {reason}; another backend takes its place")
    for name in available:
        reason = unusable(name, device, dtype)
        if reason is None and (name != "triton" or triton_kernels.is_measured(device)):
            return name
        if name == "cpu" and device.type == "cpu":
            warn_once(f"fastppo's C++ extension is not used, {op} runs more slowly: {reason}")
    raise AssertionError(f"{op} has no backend for {device}")  # `reference` serves every device
