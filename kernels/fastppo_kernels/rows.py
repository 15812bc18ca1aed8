"""Rows picked out, brought together, and put back, without the host learning how many there are.

    compact_rows   targets [N], upstream scalars [N]  ->  rows [N] int32, count [1] int32
    gather_rows    x [N, D], rows, count              ->  [N, D'] in the dtype of the products, zeros behind the count
    scatter_rows   x [M, D'], rows, count             ->  out[rows[m]] = x[m] · scale[m] for m < count
    target_logits  h [N, D'], weight [V, D], targets  ->  z[m, target] [N] float32

Bytes: each reads its input once and writes its output once; target_logits reads a row of hidden and one of the weight
for each target. FLOPs: at most 2 an element.
Tiling: compact_rows is one program that walks over all rows, bound by latency; the others take blocks of rows and are
bound by memory.

A count that stays on the device keeps the host from waiting for the work queued before it, and lets a CUDA graph
capture everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import TRITON_DTYPE, launch
from fastppo_kernels.tile import transform


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["targets", "d_logprobs", "d_entropy", "d_logsumexp", "d_kl"],
)
def compact_rows_kernel(
    targets,  # [N]
    # upstream: [N] float32 or None
    d_logprobs,
    d_entropy,
    d_logsumexp,
    d_kl,
    # results: [N] int32; [1] int32
    rows,
    count,
    num_rows,
    WITH_UPSTREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program walks the list, a prefix sum within a block and a running total between blocks: the order, and hence
    # every later result, is the same on every run.
    found = 0
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        keep = tl.load(targets + row, mask=inside, other=-1) >= 0
        if WITH_UPSTREAM:
            has_gradient = tl.zeros((BLOCK,), dtype=tl.int1)
            if d_logprobs is not None:
                has_gradient = has_gradient | (tl.load(d_logprobs + row, mask=inside, other=0.0) != 0.0)
            if d_entropy is not None:
                has_gradient = has_gradient | (tl.load(d_entropy + row, mask=inside, other=0.0) != 0.0)
            if d_logsumexp is not None:
                has_gradient = has_gradient | (tl.load(d_logsumexp + row, mask=inside, other=0.0) != 0.0)
            if d_kl is not None:
                has_gradient = has_gradient | (tl.load(d_kl + row, mask=inside, other=0.0) != 0.0)
            keep = keep & has_gradient
        ones = keep.to(tl.int32)
        tl.store(rows + found + tl.cumsum(ones, 0) - 1, row, mask=keep)
        found += tl.sum(ones, 0)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(rows + row, tl.zeros((BLOCK,), dtype=tl.int32), mask=(row >= found) & (row < num_rows))
    tl.store(count, found)


def compact_rows(
    targets: torch.Tensor, upstream: tuple[torch.Tensor | None, ...] = (None, None, None, None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a target (≥ 0) and, if any upstream [N] is given, with one that is not zero.

    Args:
        targets: [N] integers, contiguous.
        upstream: d_logprobs, d_entropy, d_logsumexp, d_kl: [N] float32, contiguous, or None.

    Returns:
        rows [N] int32, of which the first `count` [1] int32 hold indices in ascending order and the rest 0.
    """
    rows = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    count = torch.empty(1, dtype=torch.int32, device=targets.device)
    config = ELEMENTWISE["compact_rows"]
    launch(
        compact_rows_kernel,
        (1,),
        targets,
        *upstream,
        rows,
        count,
        targets.numel(),
        WITH_UPSTREAM=any(g is not None for g in upstream),
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return rows, count


@triton.jit(do_not_specialize=["num_rows"])
def gather_rows_kernel(
    x,  # [N, D], rows `stride` apart
    rows,  # [N]
    count,  # [1]
    scale,  # [N] float32 or None
    out,  # [N, D']
    num_rows,
    dim,
    stride,
    out_dim,
    ZEROS_BEHIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = m < tl.load(count)
    if not ZEROS_BEHIND:
        num_rows = tl.load(count)
    index = tl.load(rows + m, mask=real, other=0).to(tl.int64)
    values = tl.load(x + index[:, None] * stride + d[None, :], mask=real[:, None] & (d[None, :] < dim), other=0.0)
    if scale is not None:
        values = values.to(tl.float32) * tl.load(scale + m, mask=real, other=0.0)[:, None]
    inside = (m[:, None] < num_rows) & (d[None, :] < out_dim)
    tl.store(out + m[:, None].to(tl.int64) * out_dim + d[None, :], values.to(out.dtype.element_ty), mask=inside)


def gather_rows(
    x: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    *,
    zeros_behind: bool = True,
) -> torch.Tensor:
    """x [N, D] of any strides -> [N, D'] of `dtype`, contiguous: x[rows[m]] · scale[m] for m < count, else zeros.

    D' is D rounded up to 16 elements, zeros behind D, so that descriptors can read it. The zeros behind the count
    matter where a product sums over the rows: over all N it then is the product over the contributing ones. Without
    `zeros_behind` those rows are not written at all.
    """
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    num_rows, dim = rows.numel(), x.shape[1]
    out = torch.empty(num_rows, padded_dim(dim), dtype=dtype, device=x.device)
    config = ELEMENTWISE["gather_rows"]
    launch(
        gather_rows_kernel,
        (triton.cdiv(num_rows, config.rows), triton.cdiv(out.shape[1], config.block)),
        x,
        rows,
        count,
        scale,
        out,
        num_rows,
        dim,
        x.stride(0),
        out.shape[1],
        ZEROS_BEHIND=zeros_behind,
        BLOCK_M=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return out


def padded_dim(dim: int) -> int:
    """dim rounded up to 16 elements, so that descriptors can read the rows, and loads are 16 bytes wide."""
    return -(-dim // 16) * 16


@triton.jit
def scatter_rows_kernel(
    x,  # [M, D'], rows `stride` apart
    rows,  # [≥ M]
    count,  # [1]
    scale,  # [M] float32 or None
    out,  # [N, D]
    dim,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = m < tl.load(count)
    index = tl.load(rows + m, mask=inside, other=0).to(tl.int64)
    real = inside[:, None] & (d[None, :] < dim)
    values = tl.load(x + m[:, None].to(tl.int64) * stride + d[None, :], mask=real, other=0.0)
    if scale is not None:
        values = values * tl.load(scale + m, mask=inside, other=0.0)[:, None]
    tl.store(out + index[:, None] * dim + d[None, :], values.to(out.dtype.element_ty), mask=real)


def scatter_rows(
    x: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None = None
) -> None:
    """x [M, D'] float32 into out [N, D], contiguous: out[rows[m]] = x[m, :D] · scale[m]; the other rows stay."""
    config = ELEMENTWISE["scatter_rows"]
    launch(
        scatter_rows_kernel,
        (triton.cdiv(x.shape[0], config.rows), triton.cdiv(out.shape[1], config.block)),
        x,
        rows,
        count,
        scale,
        out,
        out.shape[1],
        x.stride(0),
        BLOCK_M=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize_on_alignment=["targets"])
def target_logits_kernel(
    hidden,  # [N, D'] gathered rows
    weight,  # [V, D] of any strides
    bias,  # [V] or None
    targets,  # [N]
    rows,  # [N]
    count,  # [1]
    out,  # [N] float32
    vocab,
    dim,
    hidden_stride,
    weight_stride,
    weight_stride_k,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    if m < tl.load(count):
        target = tl.load(targets + tl.load(rows + m)).to(tl.int64)
        target = tl.where(target < vocab, target, 0)  # another rank's token: any column serves as the anchor
        d = tl.arange(0, BLOCK).to(tl.int64)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, dim, BLOCK):
            here = start + d < dim
            h = tl.load(hidden + m * hidden_stride + start + d, mask=here, other=0.0)
            w = tl.load(weight + target * weight_stride + (start + d) * weight_stride_k, mask=here, other=0.0)
            total += h.to(tl.float32) * w.to(COMPUTE).to(tl.float32)
        x = tl.sum(total, 0)
        if bias is not None:
            x += tl.load(bias + target).to(tl.float32)
        tl.store(out + m, transform(x, inner, outer, SOFTCAP))


def target_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    *,
    inner: float,
    outer: float,
    SOFTCAP: int,
) -> torch.Tensor:
    """[N] float32: the transformed logit of each gathered row's target, for m < count; the rest is not written.

    A target beyond the vocabulary stands for a token that another rank has: column 0 is taken.

    Args:
        hidden: [N, D'] of `gather_rows`; weight: [V, D] of any strides and dtype; bias: [V] or None.
        targets: [N] int64 by original row; rows, count: of `compact_rows`.
    """
    num_rows = hidden.shape[0]
    out = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    config = ELEMENTWISE["target_logits"]
    launch(
        target_logits_kernel,
        (num_rows,),
        hidden,
        weight,
        bias,
        targets,
        rows,
        count,
        out,
        *weight.shape,
        hidden.stride(0),
        *weight.stride(),
        inner,
        outer,
        SOFTCAP=SOFTCAP,
        COMPUTE=TRITON_DTYPE[hidden.dtype],
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return out
