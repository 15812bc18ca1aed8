"""The Triton engine: what `fastppo.ops.chunked` computes, by the kernels of kernels/fastppo_kernels.

The operators have the signatures of `chunked.statistics` and `chunked.vjp`, where the arguments are explained. Which
rows contribute is decided on the device; the host learns their number while the device works, never under CUDA graph
capture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops import triton_kernels


@torch.library.custom_op("fastppo::triton_statistics", mutates_args=())
def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
) -> list[Tensor]:
    out = triton_kernels.linear.statistics(
        hidden,
        weight,
        bias,
        targets,
        ref_hidden,
        ref_weight,
        ref_bias,
        kl_kind,
        temperature,
        logit_scale,
        softcap,
        compute_dtype,
    )
    return [x.clone() for x in out]  # a custom operator's outputs may not share memory


@statistics.register_fake
def _(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind, *_options):
    return [hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(8 if kl_kind else 4)]


@torch.library.custom_op("fastppo::triton_vjp", mutates_args=())
def vjp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernels.linear.vjp(
        hidden,
        weight,
        bias,
        targets,
        ref_hidden,
        ref_weight,
        ref_bias,
        kl_kind,
        saved,
        d_logprobs,
        d_entropy,
        d_logsumexp,
        d_kl,
        temperature,
        logit_scale,
        softcap,
        compute_dtype,
        budget,
        need_hidden,
        need_weight,
        need_bias,
    )


@vjp.register_fake
def _(hidden, weight, bias, *args):
    need_hidden, need_weight, need_bias = args[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape) if need_bias else weight.new_empty(0),
    )
