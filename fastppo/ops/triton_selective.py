"""`selective_logprob` on the Triton kernels: operators of the signatures in `fastppo.ops.selective_logprob`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops import triton_kernels


@torch.library.custom_op("fastppo::triton_selective_statistics", mutates_args=())
def statistics(
    logits: Tensor, targets: Tensor, temperature: float, logit_scale: float, softcap: float | None, budget: int
) -> list[Tensor]:
    out = triton_kernels.selective.statistics(logits, targets, temperature, logit_scale, softcap)
    return [x.clone() for x in out]  # a custom operator's outputs may not share memory


@statistics.register_fake
def _(logits, targets, *_options):
    return [logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(4)]


@torch.library.custom_op("fastppo::triton_selective_vjp", mutates_args=())
def vjp(
    logits: Tensor,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
) -> Tensor:
    upstream = (d_logprobs, d_entropy, d_logsumexp)
    transform = (temperature, logit_scale, softcap)
    return triton_kernels.selective.vjp(logits, targets, saved, *upstream, *transform, inplace=False)


@vjp.register_fake
def _(logits, *_args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("fastppo::triton_selective_vjp_", mutates_args=("logits",))
def vjp_(
    logits: Tensor,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
) -> None:
    upstream = (d_logprobs, d_entropy, d_logsumexp)
    transform = (temperature, logit_scale, softcap)
    triton_kernels.selective.vjp(logits, targets, saved, *upstream, *transform, inplace=True)


@vjp_.register_fake
def _(logits, *_args):
    return None
