"""The door shared by the operators that start from hidden states and an lm_head weight."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops import chunked, cpu, triton_engine
from fastppo.ops.budget import scratch_bytes
from fastppo.ops.checks import check_head, check_targets
from fastppo.ops.dispatch import select
from fastppo.ops.transform import LogitTransform, check_transform

IGNORED = -100  # what a row that is left out carries as its target inside the library


class Head(NamedTuple):
    """A model's last hidden states as rows and its lm_head, checked."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class Options(NamedTuple):
    """Who computes the passes over the vocabulary, and how."""

    backend: str
    transform: LogitTransform
    compute_dtype: torch.dtype
    budget: int

    def flat(self) -> tuple:
        """The trailing arguments of an engine's operators."""
        return (*self.transform, self.compute_dtype, self.budget)

    @property
    def engine(self) -> ModuleType:
        """The module whose `statistics` and `vjp` do the work; the contract is that of `fastppo.ops.chunked`."""
        return ENGINES[self.backend]


ENGINES: dict[str, ModuleType] = {"chunked": chunked, "cpu": cpu, "triton": triton_engine}


def open_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "", device: torch.device | None = None
) -> Head:
    """Check one model's head and flatten its hidden states to rows; a sharded (DTensor) weight is gathered."""
    weight, bias = _whole(weight), _whole(bias)
    check_head(hidden, weight, bias, prefix=prefix, device=device)
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def open_targets(targets: Tensor, hidden: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Checked targets as rows [N] int64, with IGNORED where they carry no token."""
    check_targets(targets, tuple(hidden.shape[:-1]), vocab, hidden.device, ignore_index)
    rows = targets.reshape(-1).long()
    return rows if ignore_index == IGNORED else rows.masked_fill(rows == ignore_index, IGNORED)


def open_options(
    op: str, backend: str | None, hidden: Tensor, temperature: float, logit_scale: float, softcap: float | None
) -> Options:
    name = select(op, hidden.device, hidden.dtype, backend)
    transform = check_transform(temperature, logit_scale, softcap)
    return Options(name, transform, compute_dtype_for(hidden), scratch_bytes(hidden.device))


def _whole(tensor: Tensor | None) -> Tensor | None:
    """FSDP2 leaves a DTensor where the lm_head weight was: gathered here, and its gradient averaged and scattered back.

    Each process has a gradient of its own, from its own rows. Without a word of it DTensor takes them for the same and
    keeps this process's; their mean is what FSDP makes of every other parameter (and, where all see the same rows, as
    under tensor parallelism, it is the same).
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def compute_dtype_for(hidden: Tensor) -> torch.dtype:
    """Precision of the products: autocast's where it is on, else the arguments'; float16 runs in float32 on a CPU."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if dtype == torch.float16 and hidden.device.type == "cpu":
        dtype = torch.float32
    return dtype
