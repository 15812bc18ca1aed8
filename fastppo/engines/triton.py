"""The Triton engine: what `fastppo.engines.chunked` computes, by the kernels of kernels/fastppo_kernels.

The operators have the signatures of `chunked.statistics` and `chunked.vjp`, where the arguments are explained. Which
rows contribute is decided on the device, and the host never asks: a step runs ahead of the device, and a CUDA graph can
capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines import engine, triton_kernels
from fastppo.ops.loss_options import LossOptions, Rollout


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
        budget,
    )
    return [x.clone() for x in out]  # a custom operator's outputs may not share memory


statistics.register_fake(engine.fake_statistics)


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


vjp.register_fake(engine.fake_vjp)


@torch.library.custom_op("fastppo::triton_loss_with_gradients", mutates_args=())
def loss_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    loss_agg: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    """The statistics of a loss's rows and its gradients, by the tiling that the cost model prefers.

    Whole rows (6NDV) where they fit the budget and are expected to be faster; else tiles of the vocabulary (8NDV), as
    for float16, very flat distributions, and every loss with a reference model. Where one ratio stands for a sequence
    its rows stay together, so a sequence that does not fit the budget goes by tiles of the vocabulary too.

    Args:
        mask … ref_logprobs: the fields of `Rollout`; clip_low … loss_agg: those of `LossOptions`. The others: see
            `fastppo.engines.chunked`.

    Returns:
        What `statistics` returns, then ∂hidden, ∂weight, ∂bias as of `vjp`.
    """
    head, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    transform, needs = (temperature, logit_scale, softcap), (need_hidden, need_weight, need_bias)
    rollout = Rollout(mask, old_logprobs, advantages, ref_logprobs)
    options = LossOptions(clip_low, clip_high, dual_clip, ratio_level, kl_coef, kl_estimator, entropy_coef, loss_agg)

    def row_scalars(logprobs: Tensor) -> list[Tensor | None]:
        """∂loss/∂(logprobs, entropy, KL), [N]."""
        gradients = rollout.loss_gradient(logprobs.view(mask.shape), options)
        return [None if g is None else g.reshape(-1) for g in gradients]

    if not kl_kind and targets.numel():
        unit = 1 if ratio_level == "token" else mask.shape[-1]
        tiling = triton_kernels.loss.choose_tiling(
            hidden, weight, unit, *transform, compute_dtype, budget, with_entropy=entropy_coef != 0.0
        )
        if tiling.whole:
            saved, *gradients = triton_kernels.loss.loss_by_rows(
                *head,
                targets,
                lambda saved, span: [None if g is None else g[span] for g in row_scalars(saved[0])[:2]],
                *transform,
                compute_dtype,
                tiling.rows,
                budget,
                *needs,
            )
            return [*(x.clone() for x in saved), *gradients]
    linear = triton_kernels.linear
    saved = linear.statistics(*head, targets, *reference, kl_kind, *transform, compute_dtype, budget)
    d_logprobs, d_entropy, d_kl = row_scalars(saved[0])
    gradients = linear.vjp(
        *head, targets, *reference, kl_kind, saved, d_logprobs, d_entropy, None, d_kl, *transform, compute_dtype,
        budget, *needs,
    )  # fmt: skip
    return [*(x.clone() for x in saved), *gradients]


@loss_with_gradients.register_fake
def _(hidden, weight, bias, *arguments):
    return [
        *engine.fake_statistics(hidden, weight, bias, *arguments),
        *engine.fake_vjp(hidden, weight, bias, *arguments),
    ]
