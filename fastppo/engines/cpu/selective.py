"""Statistics and gradients from logits that are already there, in C++: whole rows, one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines import chunked, extension
from fastppo.engines.cpu import products
from fastppo.engines.cpu.linear import has_rows, row_scalars, transform_numbers
from fastppo.engines.engine import Options, Upstream


def selective_statistics(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options) -> list[Tensor]:
    if ref_logits is not None or not _serves(logits):
        return chunked.selective_statistics(logits, ref_logits, targets, options)
    rows, out = (targets >= 0).nonzero().squeeze(-1), torch.zeros(4, targets.numel(), dtype=torch.float32)
    extension.load().selective_statistics(
        logits.detach(), transform_numbers(options.transform), rows, targets, out, torch.get_num_threads(), products.isa
    )
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
    if upstream.kl is not None or not _serves(logits):
        return chunked.selective_vjp(out, logits, ref_logits, targets, saved, upstream, options)
    rows = (targets >= 0).nonzero().squeeze(-1)
    extension.load().selective_gradients(
        logits.detach(),
        transform_numbers(options.transform),
        rows,
        targets,
        row_scalars(rows, saved, upstream),
        out,
        torch.get_num_threads(),
        products.isa,
    )
    out[targets < 0] = 0.0


def _serves(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and has_rows(logits)
