"""The naive path: every formula of the library in plain PyTorch, with full logits and ordinary autograd.

It is the oracle in float64 and the baseline of every benchmark. Shapes: B sequences, T tokens, D hidden, V vocabulary.
Everything here is differentiable and nothing is fast. Logits and their gradients have the dtype of the hidden states
before they are upcast, as a model's own have, so those of float16 overflow beyond 65,504. Logits of position t predict
the token at t: they come from the hidden state at t − 1, so a model's output must be shifted by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.engines.engine import VERY_NEGATIVE
from fastppo.engines.transform import LogitTransform
from fastppo.ops.outputs import FisherOutput, LogprobOutput

# exp() of a log-ratio beyond this overflows float32 once multiplied by an advantage; no sampled token comes near it.
MAX_LOG_RATIO = 60.0


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, mask: Tensor) -> Tensor:
    """hidden [..., D], weight [V, D], bias [V] -> transformed logits [..., V], in float32 (float64 for float64).

    Where mask [...] is False hidden may hold anything, NaN included, and neither gives nor gets a gradient.
    """
    return transform.apply(upcast(linear(hidden.masked_fill(~mask.unsqueeze(-1), 0.0), weight, bias)))


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [..., D] times weight [V, D] transposed, plus a bias [V] of any floating dtype."""
    return F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))


def upcast(x: Tensor) -> Tensor:
    """To float32, or float64 if it is that already: what every reduction over the vocabulary is done in."""
    return x if x.dtype == torch.float64 else x.float()


def logprob(z: Tensor, targets: Tensor, *, ignore_index: int = -100, return_entropy: bool = False) -> LogprobOutput:
    """Log-probability of the taken tokens, and entropy, from transformed logits z [..., V] and targets [...]."""
    valid = targets != ignore_index
    logsumexp = torch.logsumexp(z, dim=-1)
    log_p = torch.log_softmax(z, dim=-1)
    taken = log_p.gather(-1, targets.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    entropy = None
    if return_entropy:
        entropy = _Within.apply(-expectation(log_p.exp(), log_p), 0.0, math.log(z.shape[-1])).masked_fill(~valid, 0.0)
    return LogprobOutput(taken.masked_fill(~valid, 0.0), entropy, logsumexp.masked_fill(~valid, 0.0))


def expectation(p: Tensor, x: Tensor) -> Tensor:
    """Σ_v p_v x_v where 0 · (−inf) is 0: a token that cannot occur adds nothing."""
    return (p * x.masked_fill(p == 0, 0.0)).sum(-1)


def sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from the sampled token (Schulman, 2020, joschu.net/blog/kl-approx).

    k1 = log π − log π_ref is unbiased and may be negative; k2 is half its square; k3 is unbiased and never negative.
    Of a token that π rules out (log π = −∞) k1 is −∞, k2 and k3 are +∞, and there is no gradient.
    """
    ruled_out = logprobs == -torch.inf
    log_ratio = (logprobs - ref_logprobs).masked_fill(ruled_out, 0.0)
    if estimator == "k1":
        return log_ratio.masked_fill(ruled_out, -torch.inf)
    if estimator == "k2":
        return (0.5 * log_ratio.square()).masked_fill(ruled_out, torch.inf)
    if estimator == "k3":
        k3 = torch.expm1((-log_ratio).clamp(max=MAX_LOG_RATIO)) + log_ratio
        return k3.masked_fill(ruled_out, torch.inf)
    raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {estimator!r}")


def exact_kl(z: Tensor, ref_z: Tensor, kind: str = "reverse") -> Tensor:
    """Divergence over the whole vocabulary between p = softmax(z) and q = softmax(ref_z), per token [...].

    reverse: KL(p ‖ q). forward: KL(q ‖ p). Never negative, whatever the rounding. A token that one of them rules out (a
    logit of −∞) has a log-probability of −1e20 there: where the other gives it mass, the divergence is huge and finite.
    """
    log_p = _Within.apply(torch.log_softmax(z, dim=-1), VERY_NEGATIVE, 0.0)
    log_q = _Within.apply(torch.log_softmax(ref_z.to(z.dtype), dim=-1), VERY_NEGATIVE, 0.0)
    if kind == "reverse":
        divergence = expectation(log_p.exp(), log_p - log_q)
    elif kind == "forward":
        divergence = expectation(log_q.exp(), log_q - log_p)
    else:
        raise ValueError(f"kind: expected reverse or forward, got {kind!r}")
    return _Within.apply(divergence, 0.0, torch.inf)


class _Within(torch.autograd.Function):
    """What rounding carried out of [low, high] put back; the gradient is as if it had stayed inside. NaN stays NaN."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None


def fisher_vector_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    row_weights: Tensor,
    transform: LogitTransform,
) -> FisherOutput:
    """Σ_n w_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n v with J_n = ∂z_n/∂(h, W, b) and v = (d_hidden, d_weight, d_bias).

    The Fisher matrix of a softmax is the Gauss-Newton matrix of its cross-entropy (Martens, 2020, arXiv:1412.1193).
    All rows [N, D] with row_weights [N]; rows of weight 0 may hold anything, NaN included.
    """
    alive = (row_weights != 0).unsqueeze(-1)
    hidden, d_hidden = hidden.masked_fill(~alive, 0.0), d_hidden.masked_fill(~alive, 0.0)
    z = transform.apply(upcast(linear(hidden, weight, bias)))
    dz = upcast(linear(d_hidden, weight, d_bias))
    if d_weight is not None:
        dz = dz + upcast(F.linear(hidden, d_weight))
    dz = transform.backward_(dz.clone(), z)  # the transform acts elementwise: its derivative is its own transpose
    p = torch.softmax(z, dim=-1)
    u = row_weights.unsqueeze(-1) * p * (dz - (p * dz).sum(-1, keepdim=True))
    g = transform.backward_(u, z).to(hidden.dtype)
    return FisherOutput(
        g @ weight, None if d_weight is None else g.T @ hidden, None if d_bias is None else g.sum(0).to(d_bias.dtype)
    )


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """π(token) / π_old(token), per token [..., T]; π_old is the policy that sampled the rollout, not the reference.

    token: each token's own (PPO). sequence: the product over the sequence. sequence-geometric: its geometric mean
    (GSPO, Zheng et al., 2025, arXiv:2507.18071). The last two hold one value a sequence, repeated along it.
    """
    return log_probability_ratio(logprobs, old_logprobs, mask, level).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def log_probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """The logarithm of `probability_ratio` before it is bounded."""
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    if level != "token":
        total = log_ratio.sum(-1, keepdim=True)
        if level == "sequence-geometric":
            total = total / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = total.expand_as(log_ratio)
    return log_ratio


def aggregation_weights(mask: Tensor, loss_agg: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each token's loss is multiplied by before the sum, [..., T]; 0 on padding and nothing for empty sequences.

    token-mean: over all tokens (DAPO). seq-mean-token-mean: mean over a sequence, then over sequences (PPO, GRPO).
    seq-mean-token-sum: sum over a sequence, mean over sequences. seq-mean-token-sum-norm: that divided by T, a constant
    (Dr. GRPO). Sequences without a token do not count.
    """
    m = mask.to(dtype)
    if loss_agg == "token-mean":
        return m / m.sum().clamp(min=1)
    length = m.sum(-1, keepdim=True)
    sequences = (length > 0).sum().clamp(min=1)
    if loss_agg == "seq-mean-token-mean":
        return m / length.clamp(min=1) / sequences
    if loss_agg == "seq-mean-token-sum":
        return m / sequences
    if loss_agg == "seq-mean-token-sum-norm":
        return m / sequences / max(mask.shape[-1], 1)
    raise ValueError(f"loss_agg: unknown {loss_agg!r}")


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None,
    kl: Tensor | None,
    importance_weights: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    kl_coef: float,
    entropy_coef: float,
    loss_agg: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss (Schulman et al., 2017, arXiv:1707.06347) with asymmetric clip, dual clip (Ye et al., 2020,
    arXiv:1912.09729), KL penalty and entropy bonus, all per-token tensors [..., T]:

        Σ w · (−i · min(r A, clip(r, 1 − clip_low, 1 + clip_high) A) + kl_coef · kl − entropy_coef · entropy)

    with w from loss_agg and i the importance weights, at least 0, or 1 without.

    Returns the loss and detached metrics, each a mean over real tokens: policy_loss (aggregated as the loss is),
    entropy, kl, approx_kl (k3 estimate of KL(π_old ‖ π)), clip_fraction (tokens whose gradient the clip removed),
    dual_clip_fraction, ratio_mean, ratio_min, ratio_max.
    """
    advantages, old_logprobs = advantages.detach(), old_logprobs.detach()
    weights = aggregation_weights(mask, loss_agg, logprobs.dtype)
    ratio = probability_ratio(logprobs, old_logprobs, mask, ratio_level)
    surrogate, clipped, dual_clipped = clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    if importance_weights is not None:
        surrogate = importance_weights.detach() * surrogate
    per_token = surrogate
    if kl is not None and kl_coef != 0.0:
        per_token = per_token + kl_coef * kl
    if entropy is not None and entropy_coef != 0.0:
        per_token = per_token - entropy_coef * entropy
    loss = (weights * per_token.masked_fill(~mask, 0.0)).sum()

    with torch.no_grad():
        token_weights = aggregation_weights(mask, "token-mean", logprobs.dtype)

        def mean(x: Tensor) -> Tensor:
            return (token_weights * x.to(token_weights.dtype).masked_fill(~mask, 0.0)).sum()

        metrics = {
            "policy_loss": (weights * surrogate.masked_fill(~mask, 0.0)).sum(),
            "approx_kl": mean(sampled_kl(old_logprobs, logprobs, "k3")),
            "clip_fraction": mean(clipped),
            "dual_clip_fraction": mean(dual_clipped),
            "ratio_mean": mean(ratio),
            **ratio_range(ratio, mask),
        }
        if entropy is not None:
            metrics["entropy"] = mean(entropy)
        if kl is not None:
            metrics["kl"] = mean(kl)
    return loss, {name: value.detach() for name, value in metrics.items()}


def metric_names(*, has_kl: bool) -> list[str]:
    """The keys of `clipped_loss`'s metrics with entropy, in order: a compiled graph hands on their values alone."""
    names = ["policy_loss", "approx_kl", "clip_fraction", "dual_clip_fraction", "ratio_mean", "ratio_min", "ratio_max"]
    return [*names, "entropy", *(["kl"] if has_kl else [])]


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """−min(r A, clip(r) A), bounded above by −dual_clip · A where A < 0; and where each clip took the gradient away."""
    unclipped = -ratio * advantages
    surrogate = torch.maximum(unclipped, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        dual_clipped = (advantages < 0) & (ratio > dual_clip)
        surrogate = torch.where(advantages < 0, torch.minimum(surrogate, -dual_clip * advantages), surrogate)
    return surrogate, clipped, dual_clipped


def ratio_range(ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The smallest and greatest ratio of a real token; 1 where there is none."""
    if ratio.numel() == 0:
        return {"ratio_min": ratio.new_ones(()), "ratio_max": ratio.new_ones(())}
    return {
        "ratio_min": torch.where(mask.any(), ratio.masked_fill(~mask, torch.inf).amin(), 1.0),
        "ratio_max": torch.where(mask.any(), ratio.masked_fill(~mask, 0.0).amax(), 1.0),
    }


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438) by a loop over time; all [B, T].

    Masked positions are passed over: a token's successor is the next real token. `dones` cuts what flows back;
    `bootstrap` [B] is the value after the last token.
    """
    batch, time = rewards.shape
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    next_value = rewards.new_zeros(batch) if bootstrap is None else bootstrap.to(rewards.dtype)
    next_advantage = rewards.new_zeros(batch)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(time)):
        real = mask[:, t]
        goes_on = torch.ones_like(real) if dones is None else ~dones[:, t]
        flows = goes_on & real
        delta = rewards[:, t] + torch.where(flows, gamma * next_value, 0.0) - values[:, t]
        advantage = delta + torch.where(flows, gamma * lam * next_advantage, 0.0)
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None,
    cliprange_value: float | None,
    loss_agg: str,
) -> tuple[Tensor, Tensor]:
    """½ max((v − R)², (clip(v, v_old ± c) − R)²) with c = cliprange_value, and the fraction where the clip was greater.

    The value clipping of PPO's original code (github.com/openai/baselines, ppo2).
    """
    weights = aggregation_weights(mask, loss_agg, values.dtype)
    squared = (values - returns).square()
    clipped_fraction = values.new_zeros(())
    if cliprange_value is not None:
        # Bounds, not old + clip(v − old): that is not v to the last bit within them, and would count as clipped.
        clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        clipped_squared = (clipped_values - returns).square()
        token_weights = aggregation_weights(mask, "token-mean", values.dtype)
        clipped_fraction = (token_weights * ((clipped_squared > squared) & mask)).sum().detach()
        squared = torch.maximum(squared, clipped_squared)
    return 0.5 * (weights * squared.masked_fill(~mask, 0.0)).sum(), clipped_fraction


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x − mean) / sqrt(var + eps) over the real tokens, with the unbiased variance; 0 on padding.

    In float64 nothing that float32 holds overflows; a variance of inf would turn every value to 0.
    """
    dtype, x = x.dtype, x.double().masked_fill(~mask, 0.0)
    count = mask.sum()
    mean = x.sum() / count.clamp(min=1)
    centered = (x - mean).masked_fill(~mask, 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    whitened = centered * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean * mask).to(dtype)
