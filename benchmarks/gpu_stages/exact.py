"""The operators' formulas in float64, a few rows at a time: what the kernels are judged against on a GPU.

Nothing here is shared with the library. Every function that has gradients takes `upstream`, a function of the per-row
results, whose gradient is carried back to the logits by autograd, chunk by chunk. Rows that are masked are left out,
so they may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 256  # float64 logits of so many rows at a time, and a few arrays of their size
Tensors = dict[str, Tensor]


def transform(x: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def row_statistics(z: Tensor, targets: Tensor, ref_z: Tensor | None, kind: str) -> Tensors:
    """z, ref_z [R, V], targets [R] -> log-prob, entropy, logsumexp and divergence of every row."""
    log_sum = torch.logsumexp(z, -1)
    log_p = z - log_sum[:, None]
    p = log_p.exp()
    found = {
        "logprobs": log_p.gather(-1, targets[:, None])[:, 0],
        "entropy": -(p * log_p).sum(-1),
        "logsumexp": log_sum,
    }
    if ref_z is not None:
        log_q = torch.log_softmax(ref_z, -1)
        found["kl"] = (p * (log_p - log_q)).sum(-1) if kind == "reverse" else (log_q.exp() * (log_q - log_p)).sum(-1)
    return found


def differentiate(
    x: Tensors, mask: Tensor, upstream: Callable[[Tensors], Tensor], options: dict, kind: str = ""
) -> Tensors:
    """Per-row results [N], 0 where masked, and the gradients of upstream(results).

    Args:
        x: float64 hidden [N, D], weight [V, D], bias [V], ref_hidden, ref_weight; or logits [N, V], ref_logits.
            targets [N].
        mask: [N] bool.
        options: of `transform`.
        kind: reverse or forward, for the divergence to the reference's rows.
    """
    x = {name: t.detach() for name, t in x.items()}
    real = mask.nonzero()[:, 0]

    def logits(rows: Tensor, leaf: Tensors) -> tuple[Tensor, Tensor | None]:
        if "logits" in leaf:
            return transform(leaf["logits"], **options), (
                transform(x["ref_logits"][rows].double(), **options) if kind else None
            )
        z = transform(leaf["hidden"] @ leaf["weight"].t() + leaf.get("bias", 0.0), **options)
        return z, transform(x["ref_hidden"][rows] @ x["ref_weight"].t(), **options) if kind else None

    def leaves(rows: Tensor) -> Tensors:
        per_row = {name: x[name][rows].double() for name in ("hidden", "logits") if name in x}
        return per_row | {name: x[name] for name in ("weight", "bias") if name in x}

    results: Tensors = {}
    with torch.no_grad():
        for rows in real.split(ROWS):
            z, ref_z = logits(rows, leaves(rows))
            for name, value in row_statistics(z, x["targets"][rows], ref_z, kind).items():
                results.setdefault(name, value.new_zeros(mask.shape))[rows] = value
    results = {name: value.requires_grad_() for name, value in results.items()}
    total = upstream(results)
    slopes = torch.autograd.grad(total, list(results.values()), allow_unused=True)
    slopes = {name: g for name, g in zip(results, slopes, strict=True) if g is not None}

    gradients = {f"∂{name}": torch.zeros_like(x[name], dtype=torch.float64) for name in leaves(real[:0])}
    for rows in real.split(ROWS):
        leaf = {name: t.detach().requires_grad_() for name, t in leaves(rows).items()}
        z, ref_z = logits(rows, leaf)
        found = row_statistics(z, x["targets"][rows], ref_z, kind)
        wanted = [found[name] for name in slopes]
        found = torch.autograd.grad(wanted, list(leaf.values()), [slope[rows] for slope in slopes.values()])
        for name, g in zip(leaf, found, strict=True):
            if name in ("hidden", "logits"):
                gradients[f"∂{name}"][rows] = g
            else:
                gradients[f"∂{name}"] += g
    return {name: t.detach() for name, t in results.items()} | gradients | {"total": total.detach()}


def ppo(
    results: Tensors,
    x: Tensors,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
    entropy_coef: float = 0.0,
    loss_agg: str = "token-mean",
) -> tuple[Tensor, Tensor]:
    """The loss, and the sum of its terms' magnitudes, which its rounding errors are in proportion to.

    results: of `differentiate`, [B · T]; x: old, advantages, ref [B, T]; mask [B, T].
    """
    logp, entropy = (results[name].view(mask.shape) for name in ("logprobs", "entropy"))
    keep = mask.double()
    lengths = keep.sum(-1, keepdim=True)
    log_ratio = (logp - x["old"].double()) * keep
    if ratio_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(logp)
    elif ratio_level == "sequence-geometric":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / lengths.clamp(min=1)).expand_as(logp)
    ratio, advantages = log_ratio.exp(), x["advantages"].double()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    loss = -objective - entropy_coef * entropy
    if kl_coef:
        if kl_estimator == "exact":
            kl = results["kl"].view(mask.shape)
        else:
            d = logp - x["ref"].double()
            kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kl_estimator]
        loss = loss + kl_coef * kl
    weights = {
        "token-mean": keep / keep.sum(),
        "seq-mean-token-mean": keep / lengths.clamp(min=1) / (lengths > 0).sum(),
        "seq-mean-token-sum": keep / (lengths > 0).sum(),
        "seq-mean-token-sum-norm": keep / (lengths > 0).sum() / mask.shape[1],
    }[loss_agg]
    terms = torch.where(mask, weights * loss, 0.0)
    return terms.sum(), terms.detach().abs().sum()


def fisher(x: Tensors, mask: Tensor, options: dict) -> Tensors:
    """Σ_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n v over the real rows, for v = (d_hidden, d_weight), by hidden and weight."""
    found = {"F hidden": torch.zeros_like(x["hidden"])}
    if "d_weight" in x:
        found["F weight"] = torch.zeros_like(x["weight"])
    for rows in mask.nonzero()[:, 0].split(ROWS):
        hidden, direction = x["hidden"][rows], x["d_hidden"][rows] @ x["weight"].t()
        if "d_weight" in x:
            direction = direction + hidden @ x["d_weight"].t()
        product = (hidden @ x["weight"].t()).requires_grad_()
        z = transform(product, **options)
        (slope,) = torch.autograd.grad(z.sum(), product)  # the transform acts on each logit by itself
        p, dz = torch.softmax(z.detach(), -1), slope * direction
        g = slope * p * (dz - (p * dz).sum(-1, keepdim=True))
        found["F hidden"][rows] = g @ x["weight"]
        if "d_weight" in x:
            found["F weight"] += g.t() @ hidden
    return found


def gae(x: Tensors, gamma: float, lam: float, whiten: bool) -> Tensors:
    """A loop over time. x: rewards, values, mask, dones [B, T], bootstrap [B]; whitened over all real tokens or not."""
    mask, advantages = x["mask"], torch.zeros_like(x["rewards"], dtype=torch.float64)
    rewards, values = (x[name].double().masked_fill(~mask, 0.0) for name in ("rewards", "values"))
    carried, after = torch.zeros_like(x["bootstrap"], dtype=torch.float64), x["bootstrap"].double()
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        flows = (~x["dones"][:, t]).double()
        now = rewards[:, t] + flows * gamma * after - values[:, t] + flows * gamma * lam * carried
        carried, after = torch.where(real, now, carried), torch.where(real, values[:, t], after)
        advantages[:, t] = torch.where(real, now, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    if whiten:
        real = advantages[mask]
        advantages = torch.where(mask, (advantages - real.mean()) / (real.var() + 1e-8).sqrt(), 0.0)
    return {"advantages": advantages, "returns": returns}
