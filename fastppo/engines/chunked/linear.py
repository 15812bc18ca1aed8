"""Everything about softmax(h Wᵀ) that a loss needs, in PyTorch, tile by tile, without ever holding [N, V].

    pass 1  for a block of rows [R, D] and each vocabulary tile [v, D]:
                z [R, v] = transform(h Wᵀ + b)  ->  running max m, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m), z[target]   (online softmax)
            and the same of a reference model next to it where a divergence is asked for
    pass 2  for each vocabulary tile, for each block of rows that still has a gradient:
                z recomputed, turned into ∂z in place, then ∂W[tile] += ∂zᵀ h  and  ∂h += ∂z W[tile]

Cost: 2NDV FLOPs for pass 1 and 6NDV for pass 2. Memory: tiles that fit the budget; beyond them a copy of the rows that
contribute and ∂h in float32, [N, D] each. Rows that cannot contribute are left out of both passes: ignored targets of
the first, rows with zero upstream of the second. On an accelerator the host waits for that, once a pass and a tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastppo.engines.chunked.products import accumulation_dtype, pull_back, tiling, upcast_product
from fastppo.engines.engine import (
    VERY_NEGATIVE,
    Gradients,
    Head,
    Needs,
    Options,
    Problem,
    RowCoefficients,
    TerminalLoss,
    Upstream,
    contributing,
)


def linear_statistics(problem: Problem) -> list[Tensor]:
    policy, targets, reference, kl_kind, options = problem
    rows = (targets >= 0).nonzero().squeeze(-1)
    dtype = accumulation_dtype(policy.hidden.dtype)
    out = torch.zeros(4 if reference is None else 8, targets.numel(), dtype=dtype, device=targets.device)
    block, width = tiling(rows.numel(), *policy.weight.shape, options.budget)
    for index in rows.split(block):
        p, q = (None if head is None else Logits(head, index, options, dtype) for head in (policy, reference))
        out[:, index] = block_statistics(p, q, targets[index], kl_kind, width)
    return list(out)


def linear_vjp(problem: Problem, saved: list[Tensor], upstream: Upstream, needs: Needs) -> Gradients:
    rows = contributing(problem.targets, upstream).nonzero().squeeze(-1)
    block, width = tiling(rows.numel(), *problem.policy.weight.shape, problem.options.budget)
    heads = (problem.policy, None if upstream.kl is None else problem.reference)
    dtype = accumulation_dtype(problem.policy.hidden.dtype)
    blocks = []
    for index in rows.split(block):
        p, q = (None if head is None else Logits(head, index, problem.options, dtype) for head in heads)
        blocks.append(LogitGradient(p, q, problem.targets, problem.kl_kind, saved, upstream, index))
    return pull_back(problem.policy, rows, blocks, width, needs, problem.options.compute_dtype)


def linear_loss(problem: Problem, loss: TerminalLoss, needs: Needs) -> tuple[list[Tensor], Gradients]:
    saved = linear_statistics(problem)
    return saved, linear_vjp(problem, saved, loss.row_gradients(saved), needs)


class Logits:
    """The logits of a block of rows in `dtype`, a vocabulary tile at a time."""

    def __init__(self, head: Head, index: Tensor, options: Options, dtype: torch.dtype) -> None:
        self.hidden = head.hidden[index].to(options.compute_dtype)  # [R, D]
        self.weight, self.bias, self.vocab = head.weight, head.bias, head.weight.shape[0]  # [V, D], [V]
        self.transform, self.dtype = options.transform, dtype

    def tile(self, lo: int, hi: int) -> Tensor:
        """z [R, hi − lo], a buffer of the caller's own."""
        x = upcast_product(self.hidden, self.weight[lo:hi]).to(self.dtype)
        if self.bias is not None:
            x += self.bias[lo:hi]
        return self.transform.apply_(x)


def block_statistics(policy: Logits, reference: Logits | None, targets: Tensor, kl_kind: str, width: int) -> Tensor:
    """[4 or 8, R]: the statistics of one block of rows, whose targets are [R]."""
    p = _Online(targets, policy.dtype)
    q = None if reference is None else _Online(targets, policy.dtype)
    for lo in range(0, policy.vocab, width):
        hi = min(lo + width, policy.vocab)
        z = policy.tile(lo, hi)
        p.see_target(z, targets, lo, hi)
        if q is None:
            p.fold(z)
        elif kl_kind == "forward":
            q.fold_beside(p, reference.tile(lo, hi), z)
        else:
            p.fold_beside(q, z, reference.tile(lo, hi))
    statistics = [p.logprobs(), p.entropy(policy.vocab), p.row_max, p.log_sum()]
    if q is not None:
        forward = kl_kind == "forward"
        divergence = q.divergence_from(p) if forward else p.divergence_from(q)
        center = torch.zeros_like(divergence) if forward else divergence
        statistics += [divergence.clamp(min=0.0), center, q.row_max, q.log_sum()]
    return torch.stack(statistics)


class _Online:
    """Online softmax statistics of a block of rows; every sum is kept relative to the running row maximum."""

    def __init__(self, targets: Tensor, dtype: torch.dtype) -> None:
        self.row_max = targets.new_full(targets.shape, torch.finfo(dtype).min, dtype=dtype)
        self.sum = torch.zeros_like(self.row_max)  # Σ eᶻ⁻ᵐ
        self.weighted = self.sum.clone()  # Σ eᶻ⁻ᵐ (z − m)
        self.difference = self.sum.clone()  # Σ eᶻ⁻ᵐ ((z − m) − (z' − m')), z' the other model's
        # A target that no tile has is outside the vocabulary, and must not pass for a probability.
        self.target = torch.full_like(self.sum, torch.nan)

    def see_target(self, z: Tensor, targets: Tensor, lo: int, hi: int) -> None:
        here = (targets >= lo) & (targets < hi)
        taken = z.gather(1, (targets - lo).clamp(0, hi - lo - 1).unsqueeze(1)).squeeze(1)
        self.target = torch.where(here, taken, self.target)

    def fold(self, z: Tensor) -> Tensor:
        """Take in the tile z [R, v], which becomes z − m in place. Returns eᶻ⁻ᵐ."""
        shift = self._raise_max(z)
        exp = z.exp()
        scale = shift.exp()
        self.weighted = (self.weighted + self.sum * shift) * scale + torch.linalg.vecdot(
            exp, z.clamp_(min=VERY_NEGATIVE)
        )
        self.sum = self.sum * scale + exp.sum(1)
        return exp

    def fold_beside(self, other: _Online, z: Tensor, other_z: Tensor) -> None:
        """Take in a tile of both models, and the mean of the difference of their logits under this one's weights.

        One sum of small differences: the difference of two large sums would lose a small divergence in rounding.
        """
        sum_before, max_before, other_max_before = self.sum, self.row_max, other.row_max
        exp = self.fold(z)
        other.fold(other_z)
        shift = (max_before - self.row_max).clamp_(min=VERY_NEGATIVE)
        other_shift = (other_max_before - other.row_max).clamp_(min=VERY_NEGATIVE)
        before = (self.difference + sum_before * (shift - other_shift)) * shift.exp()
        self.difference = before + torch.linalg.vecdot(exp, z.sub_(other_z))

    def divergence_from(self, other: _Online) -> Tensor:
        """KL(this ‖ other), after `fold_beside` of every tile."""
        return self.difference / self.sum - self.log_sum() + other.log_sum()

    def _raise_max(self, z: Tensor) -> Tensor:
        """Move the running maximum up to z's; z becomes z − m. Returns the shift, at most 0, of the sums so far."""
        row_max = torch.maximum(self.row_max, z.amax(1))
        shift = (self.row_max - row_max).clamp_(min=VERY_NEGATIVE)
        self.row_max = row_max
        z.sub_(row_max.unsqueeze(1))
        return shift

    def log_sum(self) -> Tensor:
        return self.sum.log()

    def entropy(self, vocab: int) -> Tensor:
        return (self.log_sum() - self.weighted / self.sum).clamp_(0.0, math.log(vocab))

    def logprobs(self) -> Tensor:
        return ((self.target - self.row_max) - self.log_sum()).clamp_(max=0.0)


class LogitGradient:
    """∂loss/∂x of a block of rows [R] (indices), x the raw logits, a vocabulary tile at a time."""

    def __init__(
        self, policy: Logits, reference: Logits | None, targets: Tensor, kl_kind: str, saved: list[Tensor],
        upstream: Upstream, index: Tensor,
    ) -> None:  # fmt: skip
        self.policy, self.reference, self.kl_kind = policy, reference, kl_kind
        self.targets, self.rows = targets[index], RowCoefficients.of(saved[1], upstream, index)
        self.row_max, self.log_sum = saved[2][index], saved[3][index]
        if reference is not None:
            self.kl_center, self.ref_row_max, self.ref_log_sum = (x[index] for x in saved[5:8])

    @property
    def hidden(self) -> Tensor:
        return self.policy.hidden

    def tile(self, lo: int, hi: int) -> Tensor:
        """[R, hi − lo] in float32 (float64 for float64), a buffer of the caller's own."""
        z = self.policy.tile(lo, hi)
        capped = z.clone() if self.policy.transform.softcap is not None else z
        log_p = _log_softmax_(z, self.row_max, self.log_sum)
        p = log_p.exp()
        coefficient = self.rows.a.unsqueeze(1)
        if self.rows.b is not None:
            coefficient = self.rows.b.unsqueeze(1) * log_p + coefficient
        dz = p * coefficient
        if self.reference is not None:
            log_q = _log_softmax_(self.reference.tile(lo, hi), self.ref_row_max, self.ref_log_sum)
            dz += self.rows.d_kl.unsqueeze(1) * self._divergence_gradient(p, log_p, log_q)
        here = ((self.targets >= lo) & (self.targets < hi)).nonzero().squeeze(-1)
        dz[here, self.targets[here] - lo] += self.rows.c[here]
        return self.policy.transform.backward_(dz, capped)

    def _divergence_gradient(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """∂/∂z of the divergence from the reference, which is held constant."""
        if self.kl_kind == "forward":
            return p - log_q.exp()
        return p * (log_p - log_q - self.kl_center.unsqueeze(1))


def _log_softmax_(z: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
    """z becomes log p, in place; the two subtractions stay apart for the sake of logits with a large common offset."""
    return z.sub_(row_max.unsqueeze(1)).clamp_(min=VERY_NEGATIVE).sub_(log_sum.unsqueeze(1))
