"""The formulas once more, in float64, a token and a sequence at a time: what every backend is measured against.

Nothing here is shared with the library. Gradients come from autograd through these loops.
"""

from __future__ import annotations

import math

import torch


def logits(hidden, weight, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """hidden [N, D] -> z [N, V], all float64."""
    x = hidden @ weight.T
    if bias is not None:
        x = x + bias
    x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def row(z, target=None):
    """One row of logits -> (log p(target), entropy, logsumexp)."""
    top = z.detach().max()
    lse = top + torch.log(torch.exp(z - top).sum())
    p = torch.exp(z - lse)
    alive = p > 0
    entropy = lse - (p[alive] * z[alive]).sum()
    return (None if target is None else z[target] - lse), entropy, lse


def divergence(z, ref_z, kind):
    p, q = torch.log_softmax(z, -1), torch.log_softmax(ref_z, -1)  # logarithms, which no distance makes 0

    def kl(a, b):
        alive = torch.exp(a) > 0
        return (torch.exp(a[alive]) * (a[alive] - b[alive])).sum()

    return {"reverse": lambda: kl(p, q), "forward": lambda: kl(q, p)}[kind]()


def ppo(
    logprobs,
    entropy,
    old,
    advantages,
    mask,
    *,
    ref=None,
    exact_kl=None,
    importance_weights=None,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    ratio_level="token",
    kl_coef=0.0,
    kl_estimator="k1",
    entropy_coef=0.0,
    loss_agg="token-mean",
):
    """Lists of lists [B][T] of 0-dim float64 tensors -> scalar."""
    sequences = []
    for b, row_mask in enumerate(mask):
        real = [t for t, m in enumerate(row_mask) if m]
        if not real:
            continue
        log_ratios = [logprobs[b][t] - old[b][t] for t in real]
        if ratio_level == "sequence":
            log_ratios = [sum(log_ratios)] * len(real)
        elif ratio_level == "sequence-geometric":
            log_ratios = [sum(log_ratios) / len(real)] * len(real)
        losses = []
        for t, log_ratio in zip(real, log_ratios, strict=True):
            ratio, advantage = torch.exp(log_ratio), advantages[b][t]
            bounded = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
            objective = torch.minimum(ratio * advantage, bounded * advantage)
            if dual_clip is not None and advantage < 0:
                objective = torch.maximum(objective, dual_clip * advantage)
            loss = -objective if importance_weights is None else -importance_weights[b][t] * objective
            if kl_coef:
                if kl_estimator == "exact":
                    kl = exact_kl[b][t]
                else:
                    difference = logprobs[b][t] - ref[b][t]
                    kl = {
                        "k1": difference,
                        "k2": difference**2 / 2,
                        "k3": torch.exp(-difference) - 1 + difference,
                    }[kl_estimator]
                loss = loss + kl_coef * kl
            losses.append(loss - entropy_coef * entropy[b][t])
        sequences.append(losses)
    if not sequences:
        return torch.zeros((), dtype=torch.float64)
    if loss_agg == "token-mean":
        return sum(sum(s) for s in sequences) / sum(len(s) for s in sequences)
    if loss_agg == "seq-mean-token-mean":
        return sum(sum(s) / len(s) for s in sequences) / len(sequences)
    total = sum(sum(s) for s in sequences) / len(sequences)
    return total if loss_agg == "seq-mean-token-sum" else total / len(mask[0])


def max_entropy(vocab):
    return math.log(vocab)
