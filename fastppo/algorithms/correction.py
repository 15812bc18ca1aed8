"""Importance weights for tokens that another distribution sampled than the one that is trained.

    ρ_t = π(a_t|s_t) / μ(a_t|s_t)       π: the policy that scored the rollout; μ: what the engine sampled with
    ρ = Π_t ρ_t                         of a whole completion

    truncate         w_t = min(ρ_t, high)                            TIS
    mask             w_t = ρ_t where low ≤ ρ_t ≤ high, else 0        IcePop
    sequence_ratio   w_t = min(ρ, high)                              sequence-level TIS
    sequence_mask    w_t = ρ where low ≤ ρ ≤ high, else 0            sequence-level MIS

w_t multiplies the surrogate of its token: −w_t min(r A, clip(r) A), with r = π_θ / π as ever. An engine's μ differs
from π by its kernels, the precision of its weights and cache, and by stale weights.

Unbounded, E_μ[ρ f] = E_π[f] for any f of a completion: a completion's ratio gives the gradient that sampling from π
would have given, whatever the length. A token's ratio corrects the choice of that token, and neither how often its
prefix is visited nor what follows: exact for completions of one token, else with a bias that grows with the square of
the length (Liu, Li et al., part 2). Bounds trade variance for bias: E_μ[w f] = E_π[(w / ρ) f], which is off by at most
max |f| · E_π[1 − w / ρ].

TIS: Ionides, 2008, "Truncated importance sampling"; Yao et al., 2025, "Your efficient RL framework secretly brings you
off-policy RL training" (fengyao.notion.site/off-policy-rl). IcePop: Ling team, 2025, "Every step evolves"
(arXiv:2510.18855). Sequences: Liu, Li et al., 2025, "When speed kills stability" (richardli.xyz/rl-collapse).
"""

from __future__ import annotations

import math

from torch import Tensor

BOUNDS = {
    "truncate": (None, 2.0),  # Yao et al.
    "mask": (0.5, 5.0),  # IcePop
    "sequence_ratio": (None, 2.0),  # verl
    "sequence_mask": (0.5, 2.0),  # verl
}
"""Each method's bounds of the ratio, low and high, where none are given; a method without a low one has no use for it.
"""


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    method: str,
    low: float | None = None,
    high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """w [B, T], 0 on padding, and where a bound has changed it, [B, T] bool.

    Args:
        logprobs, sampler_logprobs: log π and log μ of the sampled tokens, [B, T].
        mask: [B, T] bool, True for a sampled token.
        method: a key of BOUNDS.
        low, high: bounds of ρ_t or ρ; None takes the method's.
    """
    lowest, highest = BOUNDS[method]
    log_ratios = (logprobs - sampler_logprobs).masked_fill(~mask, 0.0)
    if method.startswith("sequence"):
        log_ratios = log_ratios.sum(1, keepdim=True).expand_as(log_ratios)
    log_high = math.log(high or highest)
    changed = log_ratios > log_high
    weights = log_ratios.clamp(max=log_high).exp()
    if lowest is not None:
        changed = changed | (log_ratios < math.log(low or lowest))
        weights = weights.masked_fill(changed, 0.0)
    return weights.masked_fill(~mask, 0.0), changed & mask
