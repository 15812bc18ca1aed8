"""Statistics and gradients from logits that are already there, in PyTorch, a block of rows at a time in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastppo.engines.engine import VERY_NEGATIVE, Options, RowCoefficients, Upstream, expectation


def selective_statistics(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options) -> list[Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = torch.zeros(4 if ref_logits is None else 8, targets.numel(), dtype=dtype, device=logits.device)
    for rows, z, ref_z in _blocks(logits, ref_logits, targets, options):
        out[2, rows], out[3, rows] = _log_softmax_(z)
        log_p, p = z, z.exp()
        out[0, rows] = log_p.gather(1, targets[rows].unsqueeze(1)).squeeze(1).clamp(max=0.0)
        out[1, rows] = -expectation(p, log_p)
        if ref_z is not None:
            out[6, rows], out[7, rows] = _log_softmax_(ref_z)
            kl = expectation(p, log_p - ref_z)
            out[4, rows], out[5, rows] = kl.clamp(min=0.0), kl
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
    for rows, z, ref_z in _blocks(logits, ref_logits, targets, options):
        a, b, c, d_kl = (None if x is None else x.unsqueeze(1) for x in RowCoefficients.of(saved[1], upstream, rows))
        capped = z.clone() if options.transform.softcap is not None else z
        log_p = z.sub_(saved[2][rows].unsqueeze(1)).sub_(saved[3][rows].unsqueeze(1))
        p = log_p.exp()
        dz = a * p
        if b is not None:
            dz += b * (p * log_p.masked_fill(p == 0, 0.0))
        if ref_z is not None:
            _log_softmax_(ref_z)
            difference = (log_p - ref_z).sub_(saved[5][rows].unsqueeze(1))
            dz += d_kl * (p * difference.masked_fill_(p == 0, 0.0))
        dz.scatter_add_(1, targets[rows].unsqueeze(1), c)
        out[rows] = options.transform.backward_(dz, capped).to(out.dtype)
    out[targets < 0] = 0.0


def _blocks(
    logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(row indices, transformed logits [R, V] in float32, the reference's) for the rows with a target, R at a time."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Four float32 buffers [R, V] are alive at the widest point of the backward, six with a reference.
    block = max(1, options.budget // ((16 if ref_logits is None else 24) * logits.shape[1]))
    for rows in (targets >= 0).nonzero().squeeze(-1).split(block):
        yield rows, *(None if x is None else options.transform.apply_(x[rows].to(dtype)) for x in (logits, ref_logits))


def _log_softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [R, V] becomes log p, in place; returns row_max and log_sum [R].

    A logit far below its row's maximum counts as VERY_NEGATIVE below, so that no −inf meets another.
    """
    row_max = z.amax(1)
    z.sub_(row_max.unsqueeze(1)).clamp_(min=VERY_NEGATIVE)
    log_sum = z.exp().sum(1).log()
    z.sub_(log_sum.unsqueeze(1))
    return row_max, log_sum
