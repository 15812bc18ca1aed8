"""How much scratch memory an operator may use: a fixed number of bytes, whatever N and V are."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from fastppo.engines import extension
from fastppo.errors import ConfigError, quote

DEFAULT_SCRATCH_BYTES = 32 * 2**20
# On a GPU, storing the exponentials of all logits saves a fourth of a loss's FLOPs (6NDV for 8NDV). They may take what
# is small beside the card: at Llama-3-8B's head 8,192 tokens need 2.1 GB.
SHARE_OF_A_GPU = 16
DEFAULT_ACCELERATOR_SCRATCH_BYTES = 256 * 2**20


class _Budget:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


_open: list[_Budget] = []  # of every `scratch_budget` that is open, in whatever thread: the last one holds


class _Spare(threading.local):
    """A thread's memory for logits that wait for a loss's second pass, kept since its first touch is what costs."""

    memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int, *, most: int) -> None:
        """Have `num_bytes`; what an earlier call left serves if it is no more than `most`."""
        if not num_bytes <= self.memory.numel() <= most:
            self.memory = torch.empty(0, dtype=torch.uint8)  # freed before its successor is there
            self.memory = torch.empty(num_bytes, dtype=torch.uint8)


spare = _Spare()


def held_bytes() -> int:
    """Scratch that waits for the next call on a CPU, on this thread."""
    module = extension.load()
    return spare.memory.numel() + (module.held_scratch() if module else 0)


def scratch_bytes(device: torch.device | None = None) -> int:
    """The budget in force: `scratch_budget`, else FASTPPO_SCRATCH_MB, else the device's default.

    That is 32 MiB on a CPU, a sixteenth of the memory on a GPU, and 256 MiB on another accelerator. A CPU's holds what
    eight threads need; each further thread adds a block of [64, D] and one of [64, 1024].
    """
    for budget in reversed(_open):  # whatever other threads do to the list meanwhile
        return budget.num_bytes
    text = os.environ.get("FASTPPO_SCRATCH_MB")
    if not text:
        if device is None or device.type == "cpu":
            return DEFAULT_SCRATCH_BYTES
        return _share_of_gpu(device) if device.type == "cuda" else DEFAULT_ACCELERATOR_SCRATCH_BYTES
    try:
        return check_scratch(int(float(text) * 2**20))
    except (ValueError, OverflowError):
        raise ConfigError(f"FASTPPO_SCRATCH_MB: expected a number above 0, got {quote(text)}") from None


@torch.compiler.assume_constant_result
def _share_of_gpu(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // SHARE_OF_A_GPU


@contextlib.contextmanager
def scratch_budget(num_bytes: int) -> Iterator[None]:
    """Give the operators called inside another scratch budget, in bytes.

    On a CPU, scratch is kept for the next call. At the end, what is over the budget that holds again is freed.

    Example: ``with fastppo.scratch_budget(256 * 2**20): ...``
    """
    budget = _Budget(check_scratch(num_bytes))
    _open.append(budget)
    try:
        yield
    finally:
        _open.remove(budget)  # its own: threads close theirs in any order
        if not torch.compiler.is_compiling() and held_bytes() > scratch_bytes():
            spare.reserve(0, most=0)
            if module := extension.load():
                module.free_held_scratch()


def check_scratch(num_bytes: int) -> int:
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int):
        raise TypeError(f"num_bytes: expected a whole number above 0, got {quote(num_bytes)}")
    if not 0 < num_bytes < 2**63:
        raise ValueError(f"num_bytes: expected a whole number of scratch bytes above 0, got {quote(num_bytes)}")
    return num_bytes
