"""Leaving out of the backward what has hardly any probability, with a bound on what that does to the gradient.

    pass 1   statistics, a tile of the vocabulary at a time  ->  the probability mass of each tile in each row
    pass 2   for each tile, only the rows in which its mass exceeds its allowance, or whose target it holds

A tile of v columns may drop a row that has at most δ · v / V of its mass there, so that a row never loses more than δ
in all: for a flat distribution nothing is dropped, for a peaked one most tiles are. Cut cross-entropy (Wijmans et al.,
2025, arXiv:2411.09009) skips tiles whose probabilities are all small, without such a bound.

The bound. Let a row n lose the columns S with mass μ ≤ δ. Its target is not among them, so what is missing of
∂loss/∂z is p (a + b log p) on S, with b = −∂loss/∂entropy and a = ∂loss/∂logsumexp − ∂loss/∂logprob + b · entropy. Now
Σ_S p = μ, and Σ_S −p log p ≤ μ log(|S| / μ) by Jensen's inequality, which grows with both |S| ≤ V and μ ≤ δ ≤ V / e:

    ‖missing_n‖₁  ≤  ε_n  =  δ (|a| + |b| log(V / δ)) · |logit_scale| / temperature

the last factor being the most that the logit transform's derivative can be. Hence, with Euclidean norms of rows,

    ‖error of ∂hidden_n‖ ≤ ε_n · max_v ‖weight_v‖        Σ_v ‖error of ∂weight_v‖ ≤ Σ_n ε_n ‖hidden_n‖

No such bound holds for a divergence, whose gradient has log q in it: a loss with one is computed in full.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops import chunked, triton_engine
from fastppo.ops.engine import contributing, fake_statistics, fake_vjp

# Columns that are kept or dropped together: enough for the products of one tile to run at full speed.
TILE = 2048

# A tile's products have a vocabulary of their own, in which a row's target may not be; these engines take that.
ENGINES: dict[str, ModuleType] = {"chunked": chunked, "triton": triton_engine}


class FilteredEngine(NamedTuple):
    """An engine as `fastppo.ops.chunked` that drops at most `mass` of every row's probability from its `vjp`."""

    backend: str
    mass: float

    def statistics(self, *arguments) -> list[Tensor]:
        """What the engine returns, and, without a divergence, each tile's mass [tiles, N]."""
        return _statistics(*arguments, self.backend)

    def vjp(self, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        return _vjp(*arguments, self.backend, self.mass)


@torch.library.custom_op("fastppo::filtered_statistics", mutates_args=())
def _statistics(
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
    backend: str,
) -> list[Tensor]:
    engine = ENGINES[backend]
    options = (temperature, logit_scale, softcap, _products_dtype(hidden, compute_dtype), budget)
    if kl_kind:
        reference = (ref_hidden, ref_weight, ref_bias, kl_kind)
        return engine.statistics(hidden, weight, bias, targets, *reference, *options)
    valid, parts = targets >= 0, []
    for lo, hi in _tiles(weight.shape[0]):
        here, target = _in_tile(targets, lo, hi)
        # A row whose target is elsewhere needs one all the same, or it would be left out.
        inside = torch.where(here, target, 0).masked_fill(~valid, -1)
        bias_tile = None if bias is None else bias[lo:hi]
        parts.append(engine.statistics(hidden, weight[lo:hi], bias_tile, inside, None, None, None, "", *options))
    logprobs, entropy, row_max, log_sum = (torch.stack(x) for x in zip(*parts, strict=True))  # [tiles, N] each
    top = row_max.amax(0)
    relative = (row_max - top) + log_sum  # log of the sum of a tile's eᶻ⁻ᵐ
    total = torch.logsumexp(relative, 0)
    mass = (relative - total).exp()
    # Σ p (z − m) within a tile is log_sum − entropy, relative to its own maximum.
    mean = mass * ((log_sum - entropy) + (row_max - top))
    mean = mean.masked_fill(mass == 0, 0.0).sum(0)  # a tile may have logits of −inf alone
    tile = torch.where(valid, targets, 0) // TILE
    taken = (logprobs + relative).gather(0, tile.unsqueeze(0)).squeeze(0) - total
    out = [taken.clamp(max=0.0), (total - mean).clamp(min=0.0), top, total]
    return [*(x.masked_fill(~valid, 0.0) for x in out), mass]


@_statistics.register_fake
def _(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind, *_options):
    out = fake_statistics(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind)
    return out if kl_kind else [*out, out[0].new_empty(-(-weight.shape[0] // TILE), targets.shape[0])]


@torch.library.custom_op("fastppo::filtered_vjp", mutates_args=())
def _vjp(
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
    backend: str,
    filter_mass: float,
) -> tuple[Tensor, Tensor, Tensor]:
    engine, needs = ENGINES[backend], (need_hidden, need_weight, need_bias)
    options = (temperature, logit_scale, softcap, _products_dtype(hidden, compute_dtype), budget)
    upstream = (d_logprobs, d_entropy, d_logsumexp, d_kl)
    if kl_kind:
        reference = (ref_hidden, ref_weight, ref_bias, kl_kind)
        return engine.vjp(hidden, weight, bias, targets, *reference, saved, *upstream, *options, *needs)
    *saved, mass = saved
    d_hidden = torch.zeros_like(hidden, dtype=mass.dtype) if need_hidden else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape if need_weight else 0, dtype=weight.dtype, device=weight.device)
    d_bias = torch.zeros_like(bias) if need_bias else weight.new_empty(0)
    contributes = contributing(targets, upstream)

    tiles, keep = _tiles(weight.shape[0]), []
    for number, (lo, hi) in enumerate(tiles):
        here, _ = _in_tile(targets, lo, hi)
        keep.append(contributes & (here | (mass[number] > filter_mass * (hi - lo) / weight.shape[0])))
    counts = torch.stack(keep).sum(1).tolist()
    for (lo, hi), kept, count in zip(tiles, keep, counts, strict=True):
        if count == 0:
            continue
        rows = kept.nonzero().squeeze(1)
        here, target = _in_tile(targets[rows], lo, hi)
        bias_tile = None if bias is None else bias[lo:hi]
        d_hidden_rows, d_weight_tile, d_bias_tile = engine.vjp(
            hidden[rows].to(mass.dtype),  # so that its gradient comes without having been rounded
            weight[lo:hi],
            bias_tile,
            torch.where(here, target, hi - lo),  # a column that is not there
            None,
            None,
            None,
            "",
            [x[rows] for x in saved],
            *(None if g is None else g[rows] for g in upstream),
            *options,
            *needs,
        )
        if need_hidden:
            d_hidden[rows] += d_hidden_rows
        if need_weight:
            d_weight[lo:hi] = d_weight_tile
        if need_bias:
            d_bias[lo:hi] = d_bias_tile
    return d_hidden.to(hidden.dtype), d_weight, d_bias


@_vjp.register_fake
def _(*arguments):
    return fake_vjp(*arguments[:-2])


def _tiles(vocab: int) -> list[tuple[int, int]]:
    return [(lo, min(lo + TILE, vocab)) for lo in range(0, vocab, TILE)]


def _in_tile(targets: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Which targets are columns lo … hi − 1, and their places there."""
    return (targets >= lo) & (targets < hi), targets - lo


def _products_dtype(hidden: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    """A CPU's products come rounded to their dtype, and those of many tiles are summed here."""
    return torch.promote_types(compute_dtype, torch.float32) if hidden.device.type == "cpu" else compute_dtype
