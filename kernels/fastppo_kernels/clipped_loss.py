"""PPO's clipped loss from the statistics of the sampled tokens: its value, its metrics, and its gradient, a token.

    segment_sums   logprobs, old, advantages, weights, ref, KL, entropy, mask  ->  partial [QUANTITIES, segments] fp32
    loss_gradient  the same, and the partial sums  ->  d_logprobs, d_entropy, d_kl [N];  loss [], metrics [8 or 9]

A segment is a sequence, or, where neither ratio nor weights ask for sequences, BLOCK tokens.

Bytes: each reads at most 29 a token; the second writes 4 to 12. Its programs each read the tokens' counts, 4 a segment,
which L2 holds. FLOPs: about 60 a token. Both are bound by latency: 8,192 tokens are 200 kB.
Tiling: one program a segment, which walks it in blocks, twice where the ratio is the sequence's; then one a block of
tokens, of which the first also adds up the segments. Sums are kept a lane and merged by a tree at the end, so that
100,000s of terms cost no accuracy in float32, and their order, hence every bit, is the same on every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LN2, LOG2E

BLOCK, WARPS = 512, 4
QUANTITIES = 11  # of `segment_sums_kernel`, in the order of its stores
RATIO_LEVELS = {"token": 0, "sequence": 1, "sequence-geometric": 2}
LOSS_AGGS = {"token-mean": 0, "seq-mean-token-mean": 1, "seq-mean-token-sum": 2, "seq-mean-token-sum-norm": 3}
# A log-ratio beyond this counts as this far, and has no gradient: its exponential would overflow, times an advantage.
MAX_LOG_RATIO = tl.constexpr(60.0)
TENSORS = ["mask", "logprobs", "old_logprobs", "advantages", "importance_weights", "entropy", "ref_logprobs", "kl"]


@triton.jit
def exp(x):
    """eˣ for |x| <= 60, right to the last bits: what x · log₂e loses in rounding is made up for."""
    y = x * LOG2E
    lost = tl.fma(x, LOG2E, -y) + x * 1.92596299e-8  # the rest of log₂e
    return tl.exp2(y) * (1.0 + lost * LN2)


@triton.jit
def excess(x):
    """eˣ − 1 − x for x up to 60, by its series near 0, where the difference would be all rounding."""
    s = x / 12.0 + 1.0
    for k in tl.static_range(11, 2, -1):
        s = s * x / k + 1.0
    return tl.where((x > -1.0) & (x < 1.0), 0.5 * x * x * s, exp(bounded(x)) - 1.0 - x)


@triton.jit
def bounded(x):
    """Within ±MAX_LOG_RATIO; NaN stays NaN."""
    return tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, tl.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x))


@triton.jit
def k3(x):
    """eˣ − 1 − x with x bounded above in the exponential; +∞ at −∞."""
    below = tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, x)
    return tl.where(x == float("-inf"), float("inf"), excess(below) + (below - x))


@triton.jit
def surrogate_loss(ratio, advantage, low, high, dual):
    """−min(r A, clip(r, low, high) A), at most −dual · A where A < 0; where each clip took the gradient away."""
    loss = -ratio * advantage
    clip = -tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    loss = tl.where(clip > loss, clip, loss)
    most = -dual * advantage
    loss = tl.where((advantage < 0.0) & (most < loss), most, loss)
    clipped = ((ratio > high) & (advantage > 0.0)) | ((ratio < low) & (advantage < 0.0))
    return loss, clipped, (advantage < 0.0) & (ratio > dual)


@triton.jit
def load_log_ratio(mask, logprobs, old_logprobs, token, inside):
    """Whether each token is real, its log-probability, and log π / π_old; 0 on padding, whatever stands there."""
    real = tl.load(mask + token, mask=inside, other=0) != 0
    logprob = tl.load(logprobs + token, mask=real, other=0.0)
    return real, logprob, logprob - tl.load(old_logprobs + token, mask=real, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "length"], do_not_specialize_on_alignment=TENSORS)
def segment_sums_kernel(
    mask,  # [N] bytes
    # [N] float32, the last four or None
    logprobs,
    old_logprobs,
    advantages,
    importance_weights,
    entropy,
    ref_logprobs,
    kl,
    partial,  # [QUANTITIES, segments]
    num_tokens,
    length,
    low,
    high,
    dual,
    LEVEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    first = segment * length
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dtype=tl.float32)
    count, total = zeros, zeros
    if LEVEL != 0:
        for start in range(0, length, BLOCK):
            inside = (start + lane < length) & (first + start + lane < num_tokens)
            real, _, log_ratio = load_log_ratio(mask, logprobs, old_logprobs, first + start + lane, inside)
            total += log_ratio
            count += real.to(tl.float32)
        sequence_ratio = tl.sum(total, 0)
        if LEVEL == 2:
            sequence_ratio /= tl.maximum(tl.sum(count, 0), 1.0)
        count = zeros
    surrogates, kls, entropies, old_kl, clips, dual_clips, ratios, d_ratio = (
        zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
    )  # fmt: skip
    least, greatest = zeros + float("inf"), zeros
    for start in range(0, length, BLOCK):
        token = first + start + lane
        inside = (start + lane < length) & (token < num_tokens)
        real, logprob, log_ratio = load_log_ratio(mask, logprobs, old_logprobs, token, inside)
        advantage = tl.load(advantages + token, mask=real, other=0.0)
        count += real.to(tl.float32)
        old_kl += k3(log_ratio)
        if LEVEL != 0:
            log_ratio = tl.where(real, sequence_ratio, 0.0)
        ratio = exp(bounded(log_ratio))
        surrogate, clipped, dual_clipped = surrogate_loss(ratio, advantage, low, high, dual)
        constant = clipped | dual_clipped | (tl.abs(log_ratio) > MAX_LOG_RATIO)
        d_surrogate = tl.where(constant, 0.0, -ratio * advantage)
        if importance_weights is not None:
            importance = tl.load(importance_weights + token, mask=real, other=0.0)
            surrogate *= importance
            d_surrogate *= importance
        surrogates += surrogate
        d_ratio += d_surrogate
        clips += clipped.to(tl.float32)
        dual_clips += dual_clipped.to(tl.float32)
        ratios += tl.where(real, ratio, 0.0)
        least = tl.minimum(least, tl.where(real, ratio, float("inf")))
        greatest = tl.maximum(greatest, tl.where(real, ratio, 0.0))
        if entropy is not None:
            entropies += tl.load(entropy + token, mask=real, other=0.0)
        if ESTIMATOR == "exact":
            kls += tl.load(kl + token, mask=real, other=0.0)
        elif ESTIMATOR != "":
            ref_ratio = logprob - tl.load(ref_logprobs + token, mask=real, other=0.0)
            ruled_out = logprob == float("-inf")
            if ESTIMATOR == "k1":
                kls += tl.where(ruled_out, float("-inf"), ref_ratio)
            elif ESTIMATOR == "k2":
                kls += tl.where(ruled_out, float("inf"), 0.5 * ref_ratio * ref_ratio)
            else:
                kls += tl.where(ruled_out, float("inf"), k3(-ref_ratio))
    segments = tl.num_programs(0)
    place = partial + segment
    tl.store(place, tl.sum(count, 0))
    tl.store(place + segments, tl.sum(surrogates, 0))
    tl.store(place + 2 * segments, tl.sum(old_kl, 0))
    tl.store(place + 3 * segments, tl.sum(clips, 0))
    tl.store(place + 4 * segments, tl.sum(dual_clips, 0))
    tl.store(place + 5 * segments, tl.sum(ratios, 0))
    tl.store(place + 6 * segments, tl.min(least, 0))
    tl.store(place + 7 * segments, tl.max(greatest, 0))
    tl.store(place + 8 * segments, tl.sum(entropies, 0))
    tl.store(place + 9 * segments, tl.sum(kls, 0))
    tl.store(place + 10 * segments, tl.sum(d_ratio, 0))


@triton.jit
def segment_weight(count, AGG: tl.constexpr):
    """What the segment's sums are weighted by, but for the factor that all segments have in common."""
    if AGG == 1:
        return 1.0 / tl.maximum(count, 1.0)
    else:
        return tl.full(count.shape, 1.0, dtype=tl.float32)


@triton.jit(
    do_not_specialize=["num_tokens", "length", "segments"],
    do_not_specialize_on_alignment=[*TENSORS, "d_logprobs", "d_entropy", "d_kl"],
)
def loss_gradient_kernel(
    mask,  # [N] bytes
    # [N] float32, the last four or None
    logprobs,
    old_logprobs,
    advantages,
    importance_weights,
    entropy,
    ref_logprobs,
    kl,
    partial,  # [QUANTITIES, segments]
    # results: [N], the last two or None; [], [8 or 9]
    d_logprobs,
    d_entropy,
    d_kl,
    loss,
    metrics,
    num_tokens,
    length,
    segments,
    low,
    high,
    dual,
    kl_coef,
    entropy_coef,
    LEVEL: tl.constexpr,
    AGG: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    counts, sequences = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, segments, BLOCK):
        count = tl.load(partial + start + lane, mask=start + lane < segments, other=0.0)
        counts += count
        sequences += (count > 0.0).to(tl.float32)
    tokens = tl.sum(counts, 0)
    of_a_token = 1.0 / tl.maximum(tokens, 1.0)
    common = of_a_token
    if AGG != 0:
        common = 1.0 / tl.maximum(tl.sum(sequences, 0), 1.0)
        if AGG == 3:
            common /= tl.maximum(length, 1).to(tl.float32)

    token = tl.program_id(0) * BLOCK + lane
    inside = token < num_tokens
    real, logprob, log_ratio = load_log_ratio(mask, logprobs, old_logprobs, token, inside)
    place = partial + token // tl.maximum(length, 1)
    weight = segment_weight(tl.load(place, mask=real, other=0.0), AGG) * common
    if LEVEL == 0:
        advantage = tl.load(advantages + token, mask=real, other=0.0)
        ratio = exp(bounded(log_ratio))
        _, clipped, dual_clipped = surrogate_loss(ratio, advantage, low, high, dual)
        constant = clipped | dual_clipped | (tl.abs(log_ratio) > MAX_LOG_RATIO)
        d_logprob = tl.where(constant, 0.0, -weight * advantage * ratio)
        if importance_weights is not None:
            d_logprob *= tl.load(importance_weights + token, mask=real, other=0.0)
    else:
        # One ratio stands for the whole sequence: each of its tokens gets what all of them ask for.
        d_logprob = weight * tl.load(place + 10 * segments, mask=real, other=0.0)
        if LEVEL == 2:
            d_logprob /= tl.maximum(tl.load(place, mask=real, other=0.0), 1.0)
    if ESTIMATOR != "" and ESTIMATOR != "exact" and kl_coef != 0.0:
        ref_ratio = logprob - tl.load(ref_logprobs + token, mask=real, other=0.0)
        if ESTIMATOR == "k1":
            slope = tl.full((BLOCK,), 1.0, dtype=tl.float32)
        elif ESTIMATOR == "k2":
            slope = ref_ratio
        else:
            slope = tl.where(ref_ratio < -MAX_LOG_RATIO, 1.0, ref_ratio - excess(-ref_ratio))
        d_logprob += kl_coef * weight * tl.where(ref_ratio == float("-inf"), 0.0, slope)
    tl.store(d_logprobs + token, tl.where(real, d_logprob, 0.0), mask=inside)
    if d_entropy is not None:
        tl.store(d_entropy + token, tl.where(real, -entropy_coef * weight, 0.0), mask=inside)
    if d_kl is not None:
        tl.store(d_kl + token, tl.where(real, kl_coef * weight, 0.0), mask=inside)

    if tl.program_id(0) == 0:
        zeros = tl.zeros((BLOCK,), dtype=tl.float32)
        policy, penalty, bonus, old_kl, clips, dual_clips, ratios, entropies, kls = (
            zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
        )  # fmt: skip
        least, greatest = zeros + float("inf"), zeros
        for start in range(0, segments, BLOCK):
            here = start + lane < segments
            place = partial + start + lane
            weight = segment_weight(tl.load(place, mask=here, other=0.0), AGG)
            policy += weight * tl.load(place + segments, mask=here, other=0.0)
            old_kl += tl.load(place + 2 * segments, mask=here, other=0.0)
            clips += tl.load(place + 3 * segments, mask=here, other=0.0)
            dual_clips += tl.load(place + 4 * segments, mask=here, other=0.0)
            ratios += tl.load(place + 5 * segments, mask=here, other=0.0)
            least = tl.minimum(least, tl.load(place + 6 * segments, mask=here, other=float("inf")))
            greatest = tl.maximum(greatest, tl.load(place + 7 * segments, mask=here, other=0.0))
            if entropy is not None:
                of_segment = tl.load(place + 8 * segments, mask=here, other=0.0)
                entropies += of_segment
                bonus += weight * of_segment
            if ESTIMATOR != "":
                of_segment = tl.load(place + 9 * segments, mask=here, other=0.0)
                kls += of_segment
                penalty += weight * of_segment
        total = tl.sum(policy, 0)
        tl.store(metrics, total * common)
        if ESTIMATOR != "" and kl_coef != 0.0:
            total += kl_coef * tl.sum(penalty, 0)
        if entropy is not None and entropy_coef != 0.0:
            total -= entropy_coef * tl.sum(bonus, 0)
        tl.store(loss, total * common)
        tl.store(metrics + 1, tl.sum(old_kl, 0) * of_a_token)
        tl.store(metrics + 2, tl.sum(clips, 0) * of_a_token)
        tl.store(metrics + 3, tl.sum(dual_clips, 0) * of_a_token)
        mean = tl.sum(ratios, 0) * of_a_token
        tl.store(metrics + 4, mean)
        # A minimum passes over NaN, a sum does not.
        none, nan = tokens == 0.0, mean != mean
        tl.store(metrics + 5, tl.where(nan, mean, tl.where(none, 1.0, tl.min(least, 0))))
        tl.store(metrics + 6, tl.where(nan, mean, tl.where(none, 1.0, tl.max(greatest, 0))))
        after = metrics + 7
        if entropy is not None:
            tl.store(after, tl.sum(entropies, 0) * of_a_token)
            after += 1
        if ESTIMATOR != "":
            tl.store(after, tl.sum(kls, 0) * of_a_token)


def clipped_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    loss_agg: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """loss [], metrics [7 to 9], and ∂loss/∂(logprobs, entropy, kl), the last two None where there is no such term.

    metrics: policy_loss, approx_kl, clip_fraction, dual_clip_fraction, ratio_mean, ratio_min, ratio_max, and entropy
    and kl where there are some.

    Args:
        logprobs, entropy, kl: N float32, contiguous; kl is the divergence of the whole distributions, or None.
        mask: [..., T] bool; old_logprobs, advantages, ref_logprobs, importance_weights: [..., T] float32, the last two
            or None. Padding may hold anything.
        kl_estimator: exact takes kl; the others ref_logprobs. With a kl_coef of 0 what there is stands in.
    """
    estimator = ""
    if ref_logprobs is not None and (kl is None or kl_estimator != "exact"):
        estimator = "k3" if kl_estimator == "exact" else kl_estimator
    elif kl is not None:
        estimator = "exact"
    num_tokens = mask.numel()
    length = BLOCK if ratio_level == "token" and loss_agg == "token-mean" else mask.shape[-1]
    segments = -(-num_tokens // length) if num_tokens else 0
    penalties = (ref_logprobs if estimator in ("k1", "k2", "k3") else None, kl if estimator == "exact" else None)
    tensors = [mask.view(torch.uint8), logprobs, old_logprobs, advantages, importance_weights, entropy, *penalties]
    tensors = [None if x is None else x.contiguous() for x in tensors]
    bounds = (1 - clip_low, 1 + clip_high, math.inf if dual_clip is None else dual_clip)
    partial = logprobs.new_empty(QUANTITIES, segments)
    options = {"LEVEL": RATIO_LEVELS[ratio_level], "ESTIMATOR": estimator, "BLOCK": BLOCK, "num_warps": WARPS}
    launch(segment_sums_kernel, (segments,), *tensors, partial, num_tokens, length, *bounds, **options)

    loss = logprobs.new_empty(())
    metrics = logprobs.new_empty(7 + (entropy is not None) + (estimator != ""))
    present = (True, entropy_coef != 0.0, kl_coef != 0.0 and estimator == "exact")
    gradients = [torch.empty_like(logprobs) if term else None for term in present]
    launch(
        loss_gradient_kernel,
        (max(1, triton.cdiv(num_tokens, BLOCK)),),
        *tensors,
        partial,
        *gradients,
        loss,
        metrics,
        num_tokens,
        length,
        segments,
        *bounds,
        kl_coef,
        entropy_coef,
        AGG=LOSS_AGGS[loss_agg],
        **options,
    )
    return loss, metrics, *gradients
