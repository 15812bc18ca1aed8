"""∂loss/∂logits of a tile of the vocabulary, from the logits recomputed and a few scalars a row.

    hidden [M, D]   weight[lo : lo + v] [v, D]          (and a reference model's, for a divergence)
         \\             /
      acc [BLOCK_M, BLOCK_N] float32 in registers
              |  + bias, transform, log p = (z − row_max) − log_sum, p = exp(log p)
              |  ∂z = p (a + b log p) + c [v = target] + d_kl · (the divergence's own term), transformed back
      out [M, v] in the dtype of the products that follow: ∂weight[lo : lo + v] = outᵀ hidden and ∂hidden += out
      weight[lo : lo + v]

with a = d_logsumexp − d_logprobs − d_entropy · entropy, b = −d_entropy, c = d_logprobs, and for the divergences
reverse p (log p − log q − KL), forward p − q, jsd ½ p (log p − log m − KL(p ‖ m)).

Bytes: the tile of weight, v · D, once; hidden, M · D, from L2 after the first of each group; M · v written. FLOPs: 2
M D v, twice with a reference, and about 15 a logit.
Tiling: BLOCK_M × BLOCK_N of the output a program, in groups of GROUP_M row blocks. Rows are compacted; those behind
the count are written as zeros without a product, so that what follows may run over M rows whatever the count is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastppo_kernels.launch import descriptor, fits_descriptor, gemm_config, gemm_options, launch
from fastppo_kernels.tile import (
    exp,
    finish_logits,
    grouped_order,
    log_mean,
    log_softmax,
    raw_logits,
    transform_gradient,
)


@triton.jit
def logit_gradient_kernel(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    targets,
    rows,
    count,
    entropy,
    row_max,
    log_sum,
    kl_center,
    ref_row_max,
    ref_log_sum,
    d_logprobs,
    d_entropy,
    d_logsumexp,
    d_kl,
    scale,
    out,
    first_row,
    num_rows,
    first_column,
    width,
    vocab,
    dim,
    ref_dim,
    weight_stride,
    weight_stride_k,
    ref_weight_stride,
    ref_weight_stride_k,
    inner,
    outer,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    block, tile = grouped_order(tl.program_id(0), blocks_m, tl.cdiv(width, BLOCK_N), GROUP_M)
    row = block * BLOCK_M
    column = first_column + tile * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    real_rows = tl.load(count) - first_row
    last_column = first_column + width
    out += row.to(tl.int64) * width + tile * BLOCK_N
    offset = tl.arange(0, BLOCK_M)[:, None] * width + tl.arange(0, BLOCK_N)[None, :]
    inside = (m[:, None] < num_rows) & (columns[None, :] < last_column)
    if row >= real_rows:
        tl.store(out + offset, tl.zeros((BLOCK_M, BLOCK_N), dtype=out.dtype.element_ty), mask=inside)
        return

    local = tl.minimum(m, num_rows - 1).to(tl.int64)
    acc = raw_logits(
        hidden, weight, local, row, column, vocab, dim, dim, weight_stride, weight_stride_k,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, TMA, TMA,
    )  # fmt: skip
    if KIND != "":
        ref_acc = raw_logits(
            ref_hidden, ref_weight, local, row, column, vocab, ref_dim, ref_dim, ref_weight_stride, ref_weight_stride_k,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, TMA, TMA,
        )  # fmt: skip

    real = m < real_rows
    index = tl.load(rows + m, mask=real, other=0)
    z = finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP)
    log_p = log_softmax(z, tl.load(row_max + index), tl.load(log_sum + index))
    p = exp(log_p)
    a = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if d_logsumexp is not None:
        a += tl.load(d_logsumexp + index)
    if d_logprobs is not None:
        c = tl.load(d_logprobs + index)
        a -= c
    if d_entropy is not None:
        g = tl.load(d_entropy + index)
        a -= g * tl.load(entropy + index)
        dz = p * (a[:, None] - g[:, None] * log_p)
    else:
        dz = p * a[:, None]
    if KIND != "":
        ref_z = finish_logits(ref_acc, ref_bias, columns, vocab, inner, outer, SOFTCAP)
        log_q = log_softmax(ref_z, tl.load(ref_row_max + index), tl.load(ref_log_sum + index))
        weight_of_kl = tl.load(d_kl + index)[:, None]
        if KIND == "forward":
            dz += weight_of_kl * (p - exp(log_q))
        else:
            center = tl.load(kl_center + index)[:, None]
            if KIND == "reverse":
                dz += weight_of_kl * p * (log_p - log_q - center)
            else:
                dz += 0.5 * weight_of_kl * p * (log_p - log_mean(log_p, log_q) - center)
    if d_logprobs is not None:
        target = tl.load(targets + index)
        dz += tl.where(columns[None, :] == target[:, None], c[:, None], 0.0)
    # Columns beyond the vocabulary hold −inf, whose derivative under a softcap would be NaN; they are not stored.
    dz = transform_gradient(dz, z, inner, outer, SOFTCAP)
    if scale is not None:
        dz *= tl.load(scale)
    tl.store(out + offset, tl.where(real[:, None], dz, 0.0).to(out.dtype.element_ty), mask=inside)


class RowScalars(NamedTuple):
    """What `statistics` saved and what arrives from upstream, [N] float32, contiguous; None where a term is absent."""

    targets: torch.Tensor
    entropy: torch.Tensor
    row_max: torch.Tensor
    log_sum: torch.Tensor
    kl_center: torch.Tensor | None
    ref_row_max: torch.Tensor | None
    ref_log_sum: torch.Tensor | None
    d_logprobs: torch.Tensor | None
    d_entropy: torch.Tensor | None
    d_logsumexp: torch.Tensor | None
    d_kl: torch.Tensor | None


class Head(NamedTuple):
    """hidden [M, D] compacted and contiguous, weight [V, D], bias [V] or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def logit_gradient(
    policy: Head,
    reference: Head | None,
    rows: torch.Tensor,
    count: torch.Tensor,
    scalars: RowScalars,
    out: torch.Tensor,
    *,
    first_row: int,
    first_column: int,
    kind: str,
    inner: float,
    outer: float,
    softcap: bool,
    scale: torch.Tensor | None,
) -> None:
    """∂z of compacted rows [first_row, first_row + M) and columns [first_column, first_column + v) into out [M, v].

    Args:
        policy, reference: reference is None where kind is ''.
        rows: [M] int32, those of this block; count: [1] int32, of all blocks.
        scalars: indexed by `rows`.
        out: contiguous, in the dtype of the products.
        kind: '', reverse, forward or jsd.
        inner, outer, softcap: the logit transform, see `tile.transform`.
        scale: [1] float32 that ∂z is multiplied by, or None.
    """
    num_rows, width = out.shape
    vocab, dim = policy.weight.shape
    ref_dim = reference.weight.shape[1] if reference is not None else dim
    config = gemm_config(
        "logit_gradient_kl" if kind else "logit_gradient",
        policy.hidden.dtype,
        policy.weight,
        dim,
        ref_dim,
        softcap=softcap,
    )
    heads = [policy] if reference is None else [policy, reference]
    tma = config.tma and all(
        head.weight.dtype == head.hidden.dtype and fits_descriptor(head.hidden) and fits_descriptor(head.weight)
        for head in heads
    )

    def operands(head: Head | None) -> tuple:
        if head is None or not tma:
            return head or (None, None, None)
        return (
            descriptor(head.hidden, config.block_m, config.block_k),
            descriptor(head.weight, config.block_n, config.block_k),
            head.bias,
        )

    tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(width, config.block_n)
    targets, *statistics_and_upstream = scalars
    launch(
        logit_gradient_kernel,
        (tiles,),
        *operands(policy),
        *operands(reference),
        targets,
        rows,
        count,
        *statistics_and_upstream,
        scale,
        out,
        first_row,
        num_rows,
        first_column,
        width,
        vocab,
        dim,
        ref_dim,
        *policy.weight.stride(),
        *(policy if reference is None else reference).weight.stride(),
        inner,
        outer,
        KIND=kind,
        SOFTCAP=softcap,
        TMA=tma,
        **gemm_options(config, policy.hidden.dtype, policy.weight.device, dim, ref_dim),
    )
