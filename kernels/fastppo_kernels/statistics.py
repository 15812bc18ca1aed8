"""Log-probability, entropy and normalizer of every row from its hidden state: a product whose epilogue is a softmax.

    hidden [M, D]   weight [v, D]
         \\             /
      acc [BLOCK_M, BLOCK_N]  one tile of logits, float32, never leaves the registers
              |  + bias, transform, − shift of the row, −inf beyond the vocabulary
      E = exp(z − shift),  S = Σ E,  T = Σ E (z − shift)                               [BLOCK_M] each
              |
      partial [2 or 3, tiles, M] float32  ->  combine.combine_statistics
      stored  [M, V] on request: E in the dtype of the products, for the gradient (see `loss`)

ANCHORED: the shift is the target's own logit, known beforehand from one row of the weight (`rows.target_logits`). Then
logp = −log S and H = log S − T / S; no maximum is looked for, no target is compared with, nothing is rescaled: a
multiply-add, an exponential, two sums and a conversion a logit. bfloat16 has float32's exponents, so a row may lie up
to FAR nats from its anchor. Rows that lie farther are found on the device and computed once more with the maximum as
their shift. float16 takes that way for all. Without ANCHORED the shift is the tile's maximum, which is then the third
partial result.

Bytes: weight once for every GROUP_M row blocks, V · D · ceil(M / (GROUP_M · BLOCK_M)), and hidden from L2; 8 or 12
bytes a row and tile written, and M · V elements where they are stored. FLOPs: 2 M D V, and five to nine a logit.
Tiling: one work item an output tile, in groups of GROUP_M row blocks × a few tiles of columns, a patch of both operands
that L2 holds; programs are persistent. How many rows are real is read on the device, so the others cost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine import combine_statistics
from fastppo_kernels.launch import gemm_config, gemm_options, launch, operand, programs
from fastppo_kernels.operands import Projection
from fastppo_kernels.rows import compact_rows, gather_rows, target_logits
from fastppo_kernels.tile import (
    LN2,
    LOWEST,
    VERY_NEGATIVE,
    below,
    binary_exponents,
    described,
    exp,
    finish_logits,
    grouped_order,
    logits_tile,
)
from fastppo_kernels.tiling import row_stride

# How many nats a row's normalizer may lie from its anchor: its reciprocal times a loss's gradient must be a normal
# float32, and its exponentials must not overflow.
FAR = 60.0


@triton.jit(do_not_specialize=["num_rows", "width", "first_tile", "num_tiles"])
def statistics_kernel(
    # operands of `described`: [M, D] and [v, D]
    hidden,
    weight,
    bias,  # [v] or None
    # by row: [M] float32 or None without ANCHORED; [M] int32 row of `stored`, or None for the row itself; [1] int32
    shift,
    rows,
    count,
    # results: [2 or 3, num_tiles, num_rows] float32, and E [*, v], rows `stored_stride` apart; or None. `stored` is
    # for `described` too, but a pointer where rows are scattered
    partial,
    stored,
    # sizes
    num_rows,
    width,
    padded_width,
    dim,
    first_tile,
    num_tiles,
    stored_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ANCHORED: tl.constexpr,
    FLATTEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    real_rows = tl.load(count)
    blocks_m = tl.cdiv(real_rows, BLOCK_M)
    tiles = tl.cdiv(width, BLOCK_N)
    hidden = described(hidden, num_rows, dim, dim, TMA, BLOCK_M, BLOCK_K)
    weight = described(weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    if stored is not None and rows is None:
        stored = described(stored, num_rows, padded_width, stored_stride, TMA, BLOCK_M, BLOCK_N)
    for item in tl.range(tl.program_id(0), blocks_m * tiles, tl.num_programs(0), flatten=FLATTEN):
        block, tile = grouped_order(item, blocks_m, tiles, GROUP_M)
        row, column = block * BLOCK_M, tile * BLOCK_N
        acc = logits_tile(hidden, weight, row, column, dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        m = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        inside = m < real_rows
        if ANCHORED:
            anchor = tl.load(shift + m, mask=inside, other=0.0)
            x = binary_exponents(acc, bias, anchor, columns, width, inner, outer, SOFTCAP)
            # Triton 3.9 has no registers for this branch where the tile is stored in a flattened loop.
            if (FLATTEN and stored is not None) or column + BLOCK_N > width:
                x = tl.where(columns[None, :] < width, x, VERY_NEGATIVE)
            if bias is not None:
                # A bias of −∞ rules tokens out, and 0 · (−∞) would spoil T; a NaN stays one.
                x = tl.maximum(x, VERY_NEGATIVE, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(x)
            moment = tl.sum(e * x, 1) * LN2
        else:
            z = finish_logits(acc, bias, columns, width, inner, outer, SOFTCAP)
            anchor = tl.maximum(tl.max(z, 1), LOWEST)  # a number also where all of the tile is −∞
            z = below(z, anchor[:, None])
            e = exp(z)
            moment = tl.sum(e * z, 1)
        if partial is not None:
            place = partial + (first_tile + tile).to(tl.int64) * num_rows + m
            quantity = num_tiles.to(tl.int64) * num_rows
            tl.store(place, tl.sum(e, 1), mask=inside)
            tl.store(place + quantity, moment, mask=inside)
            if not ANCHORED:
                tl.store(place + 2 * quantity, anchor, mask=inside)
        if stored is not None:
            if rows is None:
                stored.store([row, column], e.to(stored.dtype))
            else:
                to = tl.load(rows + m, mask=inside, other=0).to(tl.int64)
                place = stored + to[:, None] * stored_stride + columns[None, :]
                tl.store(place, e.to(stored.dtype.element_ty), mask=inside[:, None] & (columns < padded_width)[None, :])


def launch_statistics(
    head: Projection,
    count: torch.Tensor,
    *,
    shift: torch.Tensor | None,
    transform: dict,
    stored: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    with_partial: bool = True,
) -> torch.Tensor | None:
    """S, T and without a shift the maximum, for each tile of columns: [2 or 3, tiles, M] float32.

    Args:
        head: hidden gathered; see `operands.Projection`.
        count: [1] int32, how many of its rows are real.
        shift: [M] float32 for anchored rows, else None.
        transform: of `tile.transform_factors`.
        stored: [M, V], rows at least `tiling.row_stride(V)` apart, for E of each row, those behind the count included,
            or of the real ones at rows[m] with `rows` [M] int32.
    """
    hidden, device = head.hidden, head.hidden.device
    kernel = "linear_statistics" if shift is None else "anchored_statistics" if stored is None else "anchored_store"
    config = gemm_config(kernel, hidden.dtype, device, **transform)
    flatten = config.flatten and head.bias is None and not transform["SOFTCAP"]  # these take registers too
    num_rows, dim = hidden.shape
    num_tiles = sum(triton.cdiv(hi - lo, config.block_n) for lo, hi in head.spans)
    partial = None
    if with_partial:
        quantities = 2 if shift is not None else 3
        partial = torch.empty(quantities, num_tiles, num_rows, dtype=torch.float32, device=device)

    def target(lo: int, hi: int) -> object:
        if stored is None or rows is not None:
            return None if stored is None else stored[:, lo:hi]
        return operand(stored[:, lo:hi], config.block_m, config.block_n)

    first_tile = 0
    for lo, hi, weight in head.weight_slices():
        tiles = triton.cdiv(hi - lo, config.block_n)
        launch(
            statistics_kernel,
            (programs(config, triton.cdiv(num_rows, config.block_m) * tiles, device),),
            operand(hidden, config.block_m, config.block_k),
            operand(weight, config.block_n, config.block_k),
            None if head.bias is None else head.bias[lo:hi],
            shift,
            rows,
            count,
            partial,
            target(lo, hi),
            num_rows,
            hi - lo,
            row_stride(hi - lo),
            dim,
            first_tile,
            num_tiles,
            0 if stored is None else stored.stride(0),
            **transform,
            ANCHORED=shift is not None,
            FLATTEN=flatten,
            **gemm_options(config, hidden.dtype, device),
        )
        first_tile += tiles
    return partial


def row_statistics(
    head: Projection,
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    transform: dict,
    stored: torch.Tensor | None = None,
) -> None:
    """logprobs, entropy, shift, log Σ exp(z − shift) into out [4, N] for the rows named; the others stay as they are.

    Args:
        head: the rows named, gathered. rows [M] int32, count [1] int32: of `rows.compact_rows`; targets: [N] int64.
        transform: of `tile.transform_factors`.
        stored: [M, ≥ V] for exp(z − shift) of every logit, or None; not for float16.
    """
    vocab, dtype = head.weight.shape[0], head.hidden.dtype
    anchors = target_logits(head.hidden, head.weight, head.bias, targets, rows, count, **transform)
    if dtype == torch.float16:
        partial = launch_statistics(head, count, shift=None, transform=transform)
        combine_statistics(partial, None, anchors, targets, rows, count, out, vocab)
        return
    partial = launch_statistics(head, count, shift=anchors, transform=transform, stored=stored)
    far = combine_statistics(partial, anchors, anchors, targets, rows, count, out, vocab, farthest=FAR)

    # Rows too far from their anchor, mostly none: the launches below then end at once.
    del partial
    far_rows, far_count = compact_rows(far)
    far_head = head._replace(hidden=gather_rows(head.hidden, far_rows, far_count, dtype, zeros_behind=False))
    partial = launch_statistics(far_head, far_count, shift=None, transform=transform)
    anchors, rows = anchors.index_select(0, far_rows), rows.index_select(0, far_rows)
    combine_statistics(partial, None, anchors, targets, rows, far_count, out, vocab)
    if stored is not None:
        maxima = out[2].index_select(0, rows)
        launch_statistics(
            far_head, far_count, shift=maxima, transform=transform, stored=stored, rows=far_rows, with_partial=False
        )
