"""∂loss/∂logits of a slice of the vocabulary, from the logits recomputed and a few scalars a row.

    hidden [M, D]   weight[lo : hi] [v, D]          (and a reference model's, for a divergence)
         \\             /
      acc [BLOCK_M, BLOCK_N] float32 in registers
              |  + bias, transform, log p = (z − row_max) − log_sum, p = exp(log p)
              |  ∂z = p (a + b log p) + c [v = target] + d_kl · (the divergence's own term), transformed back
      out [M, v] in the dtype of the products that follow: ∂weight[lo : hi] = outᵀ hidden and ∂hidden += out
      weight[lo : hi]

with a = d_logsumexp − d_logprobs − d_entropy · entropy, b = −d_entropy, c = d_logprobs, and for the divergences
reverse p (log p − log q − KL), forward p − q.

Bytes: the slice of weight, v · D, once for every GROUP_M row blocks; hidden from L2; M · v elements written. FLOPs:
2 M D v, twice with a reference, and about 8 a logit, 15 with one.
Tiling: one program an output tile, in groups of GROUP_M row blocks. Rows are compacted; those behind the count are
written as zeros without a product, so that what follows may run over M rows whatever the count is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastppo_kernels.launch import gemm_config, gemm_options, launch, operand
from fastppo_kernels.operands import Operands
from fastppo_kernels.tile import (
    LN2,
    VERY_NEGATIVE,
    binary_log_softmax,
    described,
    grouped_order,
    logits_tile,
    tanh_of_logits,
)
from fastppo_kernels.tiling import row_stride

ROW_VECTORS = [
    *("targets", "rows", "entropy", "row_max", "log_sum", "kl_center", "ref_row_max", "ref_log_sum"),
    *("d_logprobs", "d_entropy", "d_logsumexp", "d_kl"),
]


@triton.jit(
    do_not_specialize=["first_row", "num_rows", "first_column", "width"], do_not_specialize_on_alignment=ROW_VECTORS
)
def logit_gradient_kernel(
    # the policy's operands of `described`: [M, D] and [v, D]; [v] or None
    hidden,
    weight,
    bias,
    # the reference's: [M, D'] and [v, D'], [v]; None without a divergence
    ref_hidden,
    ref_weight,
    ref_bias,
    # by compacted row: [M] int32 original row; [1] int32, of all blocks of rows
    rows,
    count,
    # by original row: [N] int64, and [N] float32 or None
    targets,
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
    # [1] float32 or None
    scale,
    # result, for `described` too: [M, v], rows `out_stride` apart
    out,
    # sizes: the rows and columns here, and where they begin among all
    first_row,
    num_rows,
    first_column,
    width,
    padded_width,
    dim,
    ref_dim,
    out_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block, tile = grouped_order(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_M)
    row, column = block * BLOCK_M, tile * BLOCK_N
    m, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    real_rows = tl.load(count) - first_row
    out = described(out, num_rows, padded_width, out_stride, TMA, BLOCK_M, BLOCK_N)
    if row >= real_rows:
        out.store([row, column], tl.zeros((BLOCK_M, BLOCK_N), dtype=out.dtype))
        return

    hidden = described(hidden, num_rows, dim, dim, TMA, BLOCK_M, BLOCK_K)
    weight = described(weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    acc = logits_tile(hidden, weight, row, column, dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if KIND != "":
        ref_hidden = described(ref_hidden, num_rows, ref_dim, ref_dim, TMA, BLOCK_M, BLOCK_K)
        ref_weight = described(ref_weight, width, ref_dim, ref_dim, TMA, BLOCK_N, BLOCK_K)
        ref_acc = logits_tile(ref_hidden, ref_weight, row, column, ref_dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

    # Rows behind the count have the last row's scalars, but get no probability, of either model, and no target: their
    # ∂z is 0. To mask every scalar, or to write zeros over ∂z at the end, takes registers that wide tiles do not have.
    real = m < real_rows
    index = tl.load(rows + tl.minimum(m, real_rows - 1))
    shift = tl.load(row_max + index, mask=real, other=-VERY_NEGATIVE)
    log_p = binary_log_softmax(acc, bias, shift, tl.load(log_sum + index), columns, width, inner, outer, SOFTCAP)
    p = tl.exp2(log_p)
    by = outer  # without a softcap, all there is of the transform's derivative
    if scale is not None:
        by *= tl.load(scale)
    a = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if d_logsumexp is not None:
        a += tl.load(d_logsumexp + index)
    if d_logprobs is not None:
        c = tl.load(d_logprobs + index, mask=real, other=0.0)
        a -= c
    if d_entropy is not None:
        g = tl.load(d_entropy + index)
        a -= g * tl.load(entropy + index)
        dz = p * ((a * by)[:, None] - (g * by * LN2)[:, None] * log_p)
    else:
        dz = p * (a * by)[:, None]
    if KIND != "":
        ref_shift = tl.load(ref_row_max + index, mask=real, other=-VERY_NEGATIVE)
        log_q = binary_log_softmax(
            ref_acc, ref_bias, ref_shift, tl.load(ref_log_sum + index), columns, width, inner, outer, SOFTCAP
        )
        k = tl.load(d_kl + index) * by
        if KIND == "forward":
            dz += k[:, None] * (p - tl.exp2(log_q))
        else:
            center = tl.load(kl_center + index) * (1 / LN2)
            dz += (k * LN2)[:, None] * p * (log_p - log_q - center[:, None])
    if d_logprobs is not None:
        target = tl.load(targets + index) - first_column
        # Few tiles hold a target at all.
        if tl.max(((target >= column) & (target < column + BLOCK_N)).to(tl.int32), 0) > 0:
            dz += tl.where(columns[None, :] == target[:, None], (c * by)[:, None], 0.0)
    if SOFTCAP:
        capped = tanh_of_logits(acc, bias, columns, width, inner, SOFTCAP)
        dz *= (1.0 - capped * capped) * inner
    if column + BLOCK_N > width:
        # Without TMA the padding is stored too, and a block of the product's sum over columns may reach into it.
        dz = tl.where(columns[None, :] < width, dz, 0.0)
    out.store([row, column], dz.to(out.dtype))


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


def logit_gradient(
    policy: Operands,
    reference: Operands | None,
    rows: torch.Tensor,
    count: torch.Tensor,
    scalars: RowScalars,
    out: torch.Tensor,
    *,
    first_row: int,
    first_column: int,
    kind: str,
    transform: dict,
    scale: torch.Tensor | None,
) -> None:
    """∂z of compacted rows [first_row, first_row + M) and columns [first_column, first_column + v) into out [M, v].

    Args:
        policy, reference: of these rows and columns; reference is None where kind is ''.
        rows: [M] int32, those of this block; count: [1] int32, of all blocks.
        scalars: indexed by `rows`.
        out: in the dtype of the products, rows at least `tiling.row_stride(v)` apart.
        kind: '', reverse or forward.
        transform: of `tile.transform_factors`.
        scale: [1] float32 that ∂z is multiplied by, or None.
    """
    (num_rows, width), dtype, device = out.shape, policy.hidden.dtype, policy.hidden.device
    kernel = "logit_gradient_kl" if kind else "logit_gradient"
    config = gemm_config(kernel, dtype, device, **transform)

    def operands(part: Operands | None) -> tuple:
        if part is None:
            return None, None, None
        return (
            operand(part.hidden, config.block_m, config.block_k),
            operand(part.weight, config.block_n, config.block_k),
            part.bias,
        )

    launch(
        logit_gradient_kernel,
        (triton.cdiv(num_rows, config.block_m) * triton.cdiv(width, config.block_n),),
        *operands(policy),
        *operands(reference),
        rows,
        count,
        *scalars,
        scale,
        operand(out, config.block_m, config.block_n),
        first_row,
        num_rows,
        first_column,
        width,
        row_stride(width),
        policy.hidden.shape[1],
        (reference or policy).hidden.shape[1],
        out.stride(0),
        **transform,
        KIND=kind,
        **gemm_options(config, dtype, device),
    )
