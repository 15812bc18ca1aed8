"""Statistics and gradients of softmax(transform(hidden weightᵀ + bias)) without [N, V], for any upstream gradient.

    statistics   compact_rows  ->  gather_rows  ->  row_statistics (or divergence)                         2NDV
    vjp          compact_rows  ->  gather_rows  ->  for each slice of the vocabulary:
                     logit_gradient -> ∂z [M, v];  ∂weight[slice] = ∂zᵀ hidden;  ∂hidden += ∂z weight[slice]     6NDV
                 ->  scatter_rows

The host never asks the device how many rows contribute: shapes are those of all rows, and the kernels stop at the
count. Memory of vjp: `budget` bytes for ∂z and the float32 sums of a slice of ∂weight; beyond them hidden gathered and
float32 ∂hidden, [N, D] each, and a copy of a weight's slice that products cannot read as it lies. Of statistics: hidden
gathered, and 8 to 24 bytes for each row and tile of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo_kernels.combine import combine_divergence
from fastppo_kernels.divergence import launch_divergence
from fastppo_kernels.launch import interpreted_dtype
from fastppo_kernels.logit_gradient import RowScalars, logit_gradient
from fastppo_kernels.operands import Projection, needs_copy
from fastppo_kernels.products import hidden_product, power_of_two_scale, weight_product
from fastppo_kernels.rows import compact_rows, gather_rows, padded_dim, scatter_rows, target_logits
from fastppo_kernels.statistics import row_statistics
from fastppo_kernels.tile import steepest, transform_factors
from fastppo_kernels.tiling import row_stride, tile_of_columns


def statistics(
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
) -> Tensor:
    """Per-row statistics; rows whose target is negative are left out and give zeros.

    Args:
        hidden: [N, D]; weight: [V, D]; bias: [V]; targets: [N] int64.
        ref_hidden: [N, D']; ref_weight: [V, D']; ref_bias: [V]: the other model of a divergence, or None.
        kl_kind: reverse or forward; empty for none.
        temperature, logit_scale, softcap: z = softcap · tanh(logit_scale · x / softcap) / temperature.
        compute_dtype: of the products: bfloat16, float16 or float32.
        budget: bytes for copies of a weight that products cannot read as it lies.

    Returns:
        logprobs, entropy, row_max, log_sum, and with a divergence kl, kl_center, ref_row_max, ref_log_sum:
        [4 or 8, N] float32. log p = (z − row_max) − log_sum; row_max need not be the maximum, only near it.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    num_rows, targets = targets.numel(), targets.contiguous()
    out = torch.zeros(8 if kl_kind else 4, row_stride(num_rows), dtype=torch.float32, device=hidden.device)
    out = out[:, :num_rows]
    if num_rows == 0:
        return out
    transform = transform_factors(temperature, logit_scale, softcap)
    rows, count = compact_rows(targets)
    policy = Projection.make(gather_rows(hidden, rows, count, compute_dtype, zeros_behind=False), weight, bias, budget)
    if not kl_kind:
        row_statistics(policy, targets, rows, count, out, transform)
        return out
    gathered = gather_rows(ref_hidden, rows, count, compute_dtype, zeros_behind=False)
    reference = Projection.make(gathered, ref_weight, ref_bias, budget)
    width = min(hi - lo for lo, hi in (policy.spans[0], reference.spans[0]))
    policy, reference = policy.cut(width), reference.cut(width)
    anchors = target_logits(policy.hidden, policy.weight, policy.bias, targets, rows, count, **transform)
    partial = launch_divergence(policy, reference, count, kind=kl_kind, transform=transform)
    combine_divergence(partial, anchors, targets, rows, count, out, weight.shape[0], kl_kind)
    return out


def vjp(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """∂hidden [N, D], ∂weight [V, D], ∂bias [V] in their arguments' dtypes, empty where not needed.

    Args:
        saved: the rows of what `statistics` returned for the same arguments.
        d_logprobs, d_entropy, d_logsumexp, d_kl: [N] float32, or None where that term is absent.
        budget: bytes of scratch.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    (vocab, dim), device, num_rows = weight.shape, hidden.device, targets.numel()
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=device)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=device)
    d_bias = torch.empty(vocab if need_bias else 0, dtype=bias.dtype if need_bias else weight.dtype, device=device)

    targets = targets.contiguous()
    upstream = [None if g is None else g.float().contiguous() for g in (d_logprobs, d_entropy, d_logsumexp, d_kl)]
    if all(g is None for g in upstream) or num_rows == 0:
        return d_hidden, d_weight.zero_(), d_bias.zero_()
    kind = kl_kind if d_kl is not None else ""
    rows, count = compact_rows(targets, tuple(upstream))
    transform = transform_factors(temperature, logit_scale, softcap)
    scale = power_of_two_scale(upstream, steepest(transform)) if compute_dtype == torch.float16 else None
    scalars = RowScalars(targets, *saved[1:4], *(saved[5:8] if kl_kind else (None, None, None)), *upstream)

    gathered = gather_rows(hidden, rows, count, compute_dtype)
    padded = gathered.shape[1]
    # Bytes a column beside ∂z's, in float32 elements: its row of each copy of a weight, and of the sums.
    reads = [(weight, padded), *([(ref_weight, padded_dim(ref_weight.shape[1]))] if kind else [])]
    copied = sum(columns for x, columns in reads if needs_copy(x, compute_dtype)) * compute_dtype.itemsize // 4
    block, width = tile_of_columns(num_rows, vocab, copied, compute_dtype.itemsize, budget)
    # A slice of ∂weight that all rows make at once needs no float32 sum beside it.
    direct = block >= num_rows and scale is None and padded == dim and weight.dtype in (compute_dtype, torch.float32)
    if need_weight and not direct:
        block, width = tile_of_columns(num_rows, vocab, padded + copied, compute_dtype.itemsize, budget)
    policy, reference = Projection.make(gathered, weight, bias, 0, width), None
    if kind:
        reference = Projection.make(gather_rows(ref_hidden, rows, count, compute_dtype), ref_weight, ref_bias, 0, width)
    d_rows = torch.empty(num_rows if need_hidden else 0, padded, dtype=torch.float32, device=device)
    scratch = torch.empty(block, row_stride(width), dtype=compute_dtype, device=device)
    sums = torch.empty(width if need_weight and not direct else 0, padded, dtype=torch.float32, device=device)

    for lo, hi, weight_slice in policy.weight_slices():
        ref_slice = None if reference is None else reference.weight_slice(lo, hi)
        d_weight_slice = d_weight[lo:hi] if direct else sums[: hi - lo]
        d_bias_slice = torch.zeros(hi - lo if need_bias else 0, dtype=torch.float32, device=device)
        for first in range(0, num_rows, block):
            span = slice(first, min(first + block, num_rows))
            dz = scratch[: span.stop - first, : hi - lo]
            logit_gradient(
                policy.operands(span, lo, hi, weight_slice),
                None if reference is None else reference.operands(span, lo, hi, ref_slice),
                rows[span],
                count,
                scalars,
                dz,
                first_row=first,
                first_column=lo,
                kind=kind,
                transform=transform,
                scale=scale,
            )
            if need_weight:
                weight_product(dz, policy.hidden[span], d_weight_slice, count, first, accumulate=first > 0)
            if need_bias:
                d_bias_slice += dz.sum(0, dtype=torch.float32)
            if need_hidden:
                hidden_product(dz, weight_slice, d_rows[span], count, first, accumulate=lo > 0)
        if need_weight and not direct:
            d_weight[lo:hi] = (d_weight_slice if scale is None else d_weight_slice / scale)[:, :dim]
        if need_bias:
            d_bias[lo:hi] = d_bias_slice if scale is None else d_bias_slice / scale
    if need_hidden:
        scatter_rows(d_rows if scale is None else d_rows.div_(scale), rows, count, d_hidden)
    return d_hidden, d_weight, d_bias
