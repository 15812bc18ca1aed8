"""Generalized advantage estimation in C++ (csrc/gae/gae.h), a sequence a lane of the vector registers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines import extension


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Tensor, Tensor, bool]:
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values, bootstrap = (None if x is None else x.to(dtype) for x in (rewards, values, bootstrap))
    advantages, returns = torch.empty(rewards.shape, dtype=dtype), torch.empty(rewards.shape, dtype=dtype)
    if cu_seqlens is None:
        batch, time = rewards.shape
        cu_seqlens = torch.arange(batch + 1) * time

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1).contiguous()

    finite = extension.load().gae(
        *map(flat, (rewards, values, advantages, returns, cu_seqlens.long())),
        gamma,
        lam,
        *map(flat, (mask, dones, bootstrap)),
        torch.get_num_threads(),
    )
    if finite and whiten:
        _whiten_(advantages, mask)
    return advantages, returns, finite


def _whiten_(advantages: Tensor, mask: Tensor | None) -> None:
    """In place, 0 on padding; the formula of `fastppo.whiten`."""
    real = advantages if mask is None else advantages[mask]
    if real.numel() == 0:
        return
    variance, mean = torch.var_mean(real.double(), correction=0)  # in float32 squares may overflow
    variance = variance * (real.numel() / max(real.numel() - 1, 1))
    advantages.copy_(advantages.double().sub_(mean).mul_(torch.rsqrt(variance + 1e-8)))
    if mask is not None:
        advantages.masked_fill_(~mask, 0.0)
