"""The PPO loss for those who have log-probabilities or logits already.

forward   one read of logits [N, V] (and of a reference's)   ->  log-prob, entropy, KL a row  ->  the loss
backward  ∂loss/∂(those), a few scalars a row  ->  one read, one write of ∂logits [N, V], in place on request
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.dispatch import select
from fastppo.engines.transform import LogitTransform
from fastppo.ops.checks import check_shape, checked
from fastppo.ops.head import IGNORED
from fastppo.ops.loss_options import LossOptions, SampledTokens
from fastppo.ops.outputs import PPOLossOutput
from fastppo.ops.selective_logprob import selective


@checked
def ppo_loss(
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    logits: Tensor | None = None,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    ref_logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
    entropy_coef: float = 0.0,
    loss_agg: str = "token-mean",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> PPOLossOutput:
    """The loss of `linear_ppo_loss`, from log-probabilities or from logits.

    Args:
        old_logprobs, advantages: [..., T], see `linear_ppo_loss`.
        logprobs: [..., T] of the sampled tokens, differentiable, with `entropy` [..., T] if it enters the loss.
        logits: [..., T, V] instead, with `targets` [..., T]; row t predicts targets[t].
        ref_logits: [..., T, V], for kl_estimator exact; only together with `logits`.
        inplace_backward: the backward writes ∂logits over the logits (see `selective_logprob`).
        mask, importance_weights, clip_low, clip_high, dual_clip, ratio_level, ref_logprobs, kl_coef, kl_estimator,
            entropy_coef, loss_agg: see `linear_ppo_loss`.
        temperature, logit_scale, softcap, backend: see `linear_ppo_loss`; of logits only.

    Returns:
        PPOLossOutput; `loss.backward()` reaches `logprobs` and `entropy`, or `logits`.

    Raises:
        ValueError, TypeError: as `linear_ppo_loss`; or neither or both of logprobs and logits given.
    """
    options = LossOptions(clip_low, clip_high, dual_clip, ratio_level, kl_coef, kl_estimator, entropy_coef, loss_agg)
    if (logprobs is None) == (logits is None):
        raise ValueError("logprobs, logits: give exactly one of them")
    if ref_logits is not None and logits is None:
        raise ValueError("ref_logits: only together with logits")
    if entropy is not None and logits is not None:
        raise ValueError("entropy: only together with logprobs; logits have their own")
    if (logits is None) != (targets is None):
        raise ValueError("targets: given with logits, to pick the sampled tokens' log-probabilities, and only then")
    exact_kl = None
    constants = (old_logprobs, advantages, ref_logprobs, importance_weights)
    given = logits if logprobs is None else logprobs
    if backend is not None or logits is not None:  # with logprobs it makes no difference, but must be one there is
        backend = select("ppo_loss", given.device, given.dtype, backend)
    if logits is not None:
        check_shape("targets", targets, tuple(logits.shape[:-1]), "one for each row of logits")
        options.check(
            has_ref_logprobs=ref_logprobs is not None, has_ref_model=ref_logits is not None, dims=targets.dim()
        )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        real = targets != IGNORED
        tokens = SampledTokens.open(mask, *constants, like=targets, dtype=dtype, real=real)
        logprobs, entropy, _, exact_kl = selective(
            "ppo_loss",
            logits,
            ref_logits,
            torch.where(tokens.mask, targets, IGNORED),
            transform=LogitTransform(temperature, logit_scale, softcap),
            ignore_index=IGNORED,
            inplace_backward=inplace_backward,
            backend=backend,
        )
    else:
        options.check(has_ref_logprobs=ref_logprobs is not None, has_ref_model=False, dims=logprobs.dim())
        if entropy_coef != 0.0 and entropy is None:
            raise ValueError(f"entropy: needed with logprobs for entropy_coef={entropy_coef}")
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        tokens = SampledTokens.open(mask, *constants, like=logprobs, dtype=dtype)
        logprobs = torch.where(tokens.mask, logprobs.to(dtype), 0.0)
        if entropy is not None:
            check_shape("entropy", entropy, tuple(logprobs.shape), "like logprobs")
            entropy = torch.where(tokens.mask, entropy.to(dtype), 0.0)
    evaluate = tokens.fused_loss if logits is not None and backend == "triton" else tokens.loss
    loss, metrics = evaluate(logprobs, entropy, exact_kl, options)
    return PPOLossOutput(loss, logprobs.detach(), None if entropy is None else entropy.detach(), metrics)
