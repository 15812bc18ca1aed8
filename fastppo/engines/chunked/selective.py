"""Statistics and gradients from logits that are already there: the formulas of `linear`, in a single tile."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.chunked.linear import LogitGradient, block_statistics
from fastppo.engines.engine import Options, Upstream


def selective_statistics(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options) -> list[Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = torch.zeros(4 if ref_logits is None else 8, targets.numel(), dtype=dtype, device=logits.device)
    for rows in _blocks(logits, ref_logits, targets, options):
        p, q = (None if x is None else _Rows(x, rows, options, dtype) for x in (logits, ref_logits))
        out[:, rows] = block_statistics(p, q, targets[rows], "reverse", p.vocab)
    return list(out)


def selective_vjp(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    upstream: Upstream,
    options: Options,
) -> None:
    ref_logits = None if upstream.kl is None else ref_logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for rows in _blocks(logits, ref_logits, targets, options):
        p, q = (None if x is None else _Rows(x, rows, options, dtype) for x in (logits, ref_logits))
        gradient = LogitGradient(p, q, targets, "reverse", saved, upstream, rows)
        out[rows] = gradient.tile(0, p.vocab).to(out.dtype)
    out[targets < 0] = 0.0


class _Rows:
    """A block of the rows of logits [N, V]: what `linear.Logits` is for those that must be computed."""

    def __init__(self, logits: Tensor, rows: Tensor, options: Options, dtype: torch.dtype) -> None:
        self.logits, self.rows, self.vocab = logits, rows, logits.shape[1]
        self.transform, self.dtype = options.transform, dtype

    def tile(self, lo: int, hi: int) -> Tensor:
        return self.transform.apply_(self.logits[self.rows, lo:hi].to(self.dtype))


def _blocks(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options) -> tuple[Tensor, ...]:
    """The indices of the rows with a target, as many at a time as the budget has room for."""
    # Four float32 buffers [R, V] are alive at the widest point of the backward, six with a reference.
    block = max(1, options.budget // ((16 if ref_logits is None else 24) * logits.shape[1]))
    return (targets >= 0).nonzero().squeeze(-1).split(block)
