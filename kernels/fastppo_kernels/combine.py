"""Partial results by tile of columns merged into one result a row, where the row came from.

    combine_statistics   S, T (and the maximum)                      [2 or 3, tiles, M]  ->  [4, N]
    combine_divergence   both models' S and maximum, T, difference   [6, tiles, M]       ->  [8, N]
    combine_fisher       S, Σ E dz, the maximum, max |dz|            [4, tiles, M]       ->  [4, M]

Bytes: 4 a partial result, read once, and 4 a result: 33 MB at [2, 501, 8,192]. FLOPs: a few a row and tile.
Tiling: one program for a block of rows, which walks the tiles a block of them at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LOWEST, exp, log, logprob_and_entropy, raise_max


@triton.jit
def partial_tiles(partial, quantity, first, m, inside, num_rows, tiles, other: tl.constexpr, BLOCK_T: tl.constexpr):
    """[BLOCK_T, BLOCK_M] of one quantity of partial [*, tiles, num_rows], `other` where there is none."""
    t = first + tl.arange(0, BLOCK_T)
    place = (quantity * tiles + t).to(tl.int64)[:, None] * num_rows + m[None, :]
    return tl.load(partial + place, mask=(t < tiles)[:, None] & inside[None, :], other=other)


@triton.jit
def store_statistics(
    target_logits, targets, rows, m, inside, out, out_stride, top, total, weighted, vocab, max_entropy
):
    """logprobs, entropy, shift and log Σ e of rows m, `out_stride` apart from out on; returns log Σ e."""
    taken = tl.load(target_logits + m, mask=inside, other=0.0)
    logprob, entropy, log_sum = logprob_and_entropy(taken, top, total, weighted, max_entropy)
    # A target that is not in this vocabulary must not pass for a probability.
    target = tl.load(targets + tl.load(rows + m, mask=inside, other=0), mask=inside, other=0)
    tl.store(out, tl.where(target < vocab, logprob, float("nan")), mask=inside)
    tl.store(out + out_stride, entropy, mask=inside)
    tl.store(out + 2 * out_stride, top, mask=inside)
    tl.store(out + 3 * out_stride, log_sum, mask=inside)
    return log_sum


@triton.jit(do_not_specialize=["num_rows", "tiles"], do_not_specialize_on_alignment=["targets", "out"])
def combine_statistics_kernel(
    partial,  # [2 or 3, tiles, num_rows]
    shift,  # [num_rows] or None
    target_logits,  # [num_rows]
    targets,  # [N] by original row
    rows,  # [num_rows] original row
    count,  # [1]
    out,  # [4, out_stride]
    far,  # [num_rows] int32 or None: where the row is to be computed again 0, else −1
    num_rows,
    out_stride,
    tiles,
    vocab,
    max_entropy,
    farthest,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if shift is not None:
        top = tl.load(shift + m, mask=inside, other=0.0)
    else:
        top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    for first in range(0, tiles, BLOCK_T):
        s = partial_tiles(partial, 0, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        t = partial_tiles(partial, 1, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        if shift is not None:
            total += tl.sum(s, 0)
            weighted += tl.sum(t, 0)
        else:
            tile_max = partial_tiles(partial, 2, first, m, inside, num_rows, tiles, LOWEST, BLOCK_T)
            top, before, by = raise_max(top, tile_max, 0)
            scale, tile_scale = exp(before), exp(by)
            weighted = (weighted + before * total) * scale + tl.sum((t + by * s) * tile_scale, 0)
            total = total * scale + tl.sum(s * tile_scale, 0)
    out += tl.load(rows + m, mask=inside, other=0)
    log_sum = store_statistics(
        target_logits, targets, rows, m, inside, out, out_stride, top, total, weighted, vocab, max_entropy
    )
    if far is not None:
        near = (log_sum > -farthest) & (log_sum < farthest) & (tl.abs(weighted) < 1e38)
        tl.store(far + m, tl.where(inside & (near == 0), 0, -1), mask=m < num_rows)


def combine_statistics(
    partial: torch.Tensor,
    shift: torch.Tensor | None,
    target_logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    vocab: int,
    farthest: float | None = None,
) -> torch.Tensor | None:
    """logprobs, entropy, shift or maximum, log S into out [4, N] (rows any distance apart) for the rows named.

    Args:
        partial, shift: of `statistics.launch_statistics`.
        target_logits: [M] float32; targets: [N] int64; rows: [M] int32, count: [1] int32.
        farthest: nats. With it comes back [M] int32: 0 for a real row whose log S is not within them, else −1.
    """
    _, tiles, num_rows = partial.shape
    far = None if farthest is None else torch.empty(num_rows, dtype=torch.int32, device=partial.device)
    config = ELEMENTWISE["combine"]
    launch(
        combine_statistics_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        shift,
        target_logits,
        targets,
        rows,
        count,
        out,
        far,
        num_rows,
        out.stride(0),
        tiles,
        vocab,
        math.log(vocab),
        0.0 if farthest is None else farthest,
        BLOCK_M=config.rows,
        BLOCK_T=config.block,
        num_warps=config.warps,
    )
    return far


@triton.jit(do_not_specialize=["num_rows", "out_stride", "tiles"], do_not_specialize_on_alignment=["targets", "out"])
def combine_divergence_kernel(
    partial,  # [6, tiles, num_rows]
    target_logits,  # [num_rows]
    targets,  # [N] by original row
    rows,  # [num_rows] original row
    count,  # [1]
    out,  # [8, out_stride]
    num_rows,
    out_stride,
    tiles,
    vocab,
    max_entropy,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    ref_top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    ref_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    difference = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, tiles, BLOCK_T):
        s = partial_tiles(partial, 0, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        t = partial_tiles(partial, 1, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        tile_max = partial_tiles(partial, 2, first, m, inside, num_rows, tiles, LOWEST, BLOCK_T)
        ref_s = partial_tiles(partial, 3, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        ref_max = partial_tiles(partial, 4, first, m, inside, num_rows, tiles, LOWEST, BLOCK_T)
        d = partial_tiles(partial, 5, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        top, before, by = raise_max(top, tile_max, 0)
        ref_top, ref_before, ref_by = raise_max(ref_top, ref_max, 0)
        scale, tile_scale = exp(before), exp(by)
        ref_scale, ref_tile_scale = exp(ref_before), exp(ref_by)
        # The difference is a sum over the one distribution, of a distance that both maxima shift.
        if KIND == "reverse":
            difference = (difference + (before - ref_before) * total) * scale
            difference += tl.sum((d + (by - ref_by) * s) * tile_scale, 0)
        else:
            difference = (difference + (ref_before - before) * ref_total) * ref_scale
            difference += tl.sum((d + (ref_by - by) * ref_s) * ref_tile_scale, 0)
        weighted = (weighted + before * total) * scale + tl.sum((t + by * s) * tile_scale, 0)
        total = total * scale + tl.sum(s * tile_scale, 0)
        ref_total = ref_total * ref_scale + tl.sum(ref_s * ref_tile_scale, 0)
    out += tl.load(rows + m, mask=inside, other=0)
    store_statistics(target_logits, targets, rows, m, inside, out, out_stride, top, total, weighted, vocab, max_entropy)
    # One logarithm of the quotient: the difference of two would round each where they are large and alike.
    if KIND == "reverse":
        kl = difference / total + log(ref_total / total)
    else:
        kl = difference / ref_total + log(total / ref_total)
    tl.store(out + 4 * out_stride, tl.where(kl < 0.0, 0.0, kl), mask=inside)
    tl.store(out + 5 * out_stride, kl, mask=inside)
    tl.store(out + 6 * out_stride, ref_top, mask=inside)
    tl.store(out + 7 * out_stride, log(ref_total), mask=inside)


def combine_divergence(
    partial: torch.Tensor,
    target_logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    vocab: int,
    kind: str,
) -> None:
    """Into out [8, N] (rows any distance apart), for the rows named, of `divergence.launch_divergence`'s partial.

    out: logprobs, entropy, row_max, log_sum, kl, kl_center, ref_row_max, ref_log_sum. kl is kl_center, at least 0.

    Args:
        target_logits: [M] float32; targets: [N] int64; rows: [M] int32, count: [1] int32.
        kind: that of the partial results.
    """
    _, tiles, num_rows = partial.shape
    config = ELEMENTWISE["combine"]
    launch(
        combine_divergence_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        target_logits,
        targets,
        rows,
        count,
        out,
        num_rows,
        out.stride(0),
        tiles,
        vocab,
        math.log(vocab),
        KIND=kind,
        BLOCK_M=config.rows,
        BLOCK_T=config.block,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def combine_fisher_kernel(
    partial,  # [4, tiles, num_rows]
    count,  # [1]
    out,  # [4, num_rows]
    num_rows,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    peak = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, tiles, BLOCK_T):
        s = partial_tiles(partial, 0, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        w = partial_tiles(partial, 1, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        tile_max = partial_tiles(partial, 2, first, m, inside, num_rows, tiles, LOWEST, BLOCK_T)
        tile_peak = partial_tiles(partial, 3, first, m, inside, num_rows, tiles, 0.0, BLOCK_T)
        top, before, by = raise_max(top, tile_max, 0)
        scale, tile_scale = exp(before), exp(by)
        weighted = weighted * scale + tl.sum(w * tile_scale, 0)
        total = total * scale + tl.sum(s * tile_scale, 0)
        peak = tl.maximum(peak, tl.max(tile_peak, 0))
    # Behind the count there are zeros, which the scale of the whole and the rows' weights may look at.
    inside_out = m < num_rows
    out += m
    quantity = num_rows.to(tl.int64)
    tl.store(out, tl.where(inside, top, 0.0), mask=inside_out)
    tl.store(out + quantity, tl.where(inside, log(total), 0.0), mask=inside_out)
    tl.store(out + 2 * quantity, tl.where(inside, weighted / total, 0.0), mask=inside_out)
    tl.store(out + 3 * quantity, tl.where(inside, peak, 0.0), mask=inside_out)


def combine_fisher(partial: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """partial [4, tiles, M] of `fisher_statistics` -> maximum, log S, Σ p dz, max |dz|: [4, M], 0 behind the count."""
    _, tiles, num_rows = partial.shape
    out = torch.empty(4, num_rows, dtype=torch.float32, device=partial.device)
    config = ELEMENTWISE["combine"]
    launch(
        combine_fisher_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        count,
        out,
        num_rows,
        tiles,
        BLOCK_M=config.rows,
        BLOCK_T=config.block,
        num_warps=config.warps,
    )
    return out
