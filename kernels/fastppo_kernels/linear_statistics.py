"""Forward-only log-probability, entropy and logsumexp from hidden states: a product with online softmax in registers.

    hidden [N, D]   weight [V, D]
         \\             /
      acc [BLOCK_M, BLOCK_N]  one tile of logits, float32, never leaves the registers
              |  + bias, transform, −inf beyond V
      row_max, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m), z[target]                         [BLOCK_M] each, carried over the columns
              |
      partial [4, splits, N] float32  ->  combine_statistics
      kept    [N, V] on request: eᶻ⁻ᵐ with the m of the moment, which the gradient then need not recompute

Bytes: the weight once for every GROUP_M row blocks, V · D · ceil(N / (GROUP_M · BLOCK_M)); the hidden states once for
every split, mostly from L2; 16 · splits · N written, and N · V of the products' dtype where they are kept. FLOPs:
2 N D V, and about 12 a logit for the softmax.
Tiling: a work item is BLOCK_M rows × one split of the vocabulary. Programs are persistent, one a processor, and take
items in an order that keeps GROUP_M row blocks × a few splits alive at a time, a patch that L2 holds. The number of
rows is read on the device (`compact_rows`), so ignored rows cost nothing and the host needs not know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine_statistics import combine_statistics
from fastppo_kernels.gather_rows import gather_rows
from fastppo_kernels.launch import (
    balanced_splits,
    descriptor,
    fits_descriptor,
    gemm_config,
    gemm_options,
    launch,
    processors,
)
from fastppo_kernels.tile import LOWEST, exp, finish_logits, grouped_order, raise_max, raw_logits

# Partial results cost 16 bytes a row and split; beyond this many splits they are worth no more parallelism.
MAX_SPLITS = 64


@triton.jit
def linear_statistics_kernel(
    hidden,
    weight,
    bias,
    targets,
    rows,
    count,
    partial,
    kept,
    kept_max,
    num_rows,
    vocab,
    dim,
    splits,
    hidden_stride,
    weight_stride,
    weight_stride_k,
    kept_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    real_rows = tl.load(count)
    blocks_m = tl.cdiv(real_rows, BLOCK_M)
    tiles = tl.cdiv(vocab, BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, splits)
    for item in range(tl.program_id(0), blocks_m * splits, tl.num_programs(0)):
        block, split = grouped_order(item, blocks_m, splits, GROUP_M)
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        index = tl.load(rows + m, mask=m < real_rows, other=0).to(tl.int64)
        target = tl.load(targets + index)
        row_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
        taken = tl.zeros((BLOCK_M,), dtype=tl.float32)
        first = split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, tiles)
        for tile in tl.range(first, last, flatten=FLATTEN, warp_specialize=SPECIALIZE):
            column = tile * BLOCK_N
            acc = raw_logits(
                hidden, weight, index, block * BLOCK_M, column, vocab, dim, hidden_stride, weight_stride,
                weight_stride_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, HIDDEN_TMA, WEIGHT_TMA,
            )  # fmt: skip
            columns = column + tl.arange(0, BLOCK_N)
            z = finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP)
            taken += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
            row_max, z, shift = raise_max(row_max, z)
            e = exp(z)
            scale = exp(shift)
            weighted = (weighted + total * shift) * scale + tl.sum(e * z, 1)
            total = total * scale + tl.sum(e, 1)
            if kept is not None:
                exists = (m < real_rows)[:, None] & (columns < vocab)[None, :]
                place = kept + m.to(tl.int64)[:, None] * kept_stride + columns[None, :]
                tl.store(place, e.to(kept.dtype.element_ty), mask=exists)
                tl.store(kept_max + m.to(tl.int64) * tiles + tile, row_max, mask=m < real_rows)
        inside = m < real_rows
        out = partial + split * num_rows + m
        tl.store(out, row_max, mask=inside)
        tl.store(out + splits * num_rows, total, mask=inside)
        tl.store(out + 2 * splits * num_rows, weighted, mask=inside)
        tl.store(out + 3 * splits * num_rows, taken, mask=inside)


class Kept(NamedTuple):
    """What `linear_statistics` wrote down of each logit, by compacted row: eᶻ⁻ᵐ, and m for each tile of columns.

    Attributes:
        values: [R, ≥ V] in the dtype of the products, rows 32-byte aligned; maxima: [N, tiles] float32.
        tile: columns that share a maximum.
    """

    values: torch.Tensor
    maxima: torch.Tensor
    tile: int

    @classmethod
    def make(cls, memory: torch.Tensor, num_rows: int, weight: torch.Tensor, *, softcap: bool) -> Kept:
        """In `memory`: flat, of the products' dtype, `kept_stride(V)` elements a row; for N rows at most."""
        vocab, dim = weight.shape
        tile = gemm_config("linear_statistics_kept", memory.dtype, weight, dim, softcap=softcap).block_n
        stride = kept_stride(vocab)
        maxima = torch.empty(num_rows, triton.cdiv(vocab, tile), dtype=torch.float32, device=memory.device)
        return cls(memory[: memory.numel() // stride * stride].view(-1, stride), maxima, tile)


def kept_stride(vocab: int) -> int:
    return -(-vocab // 16) * 16


def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    *,
    inner: float,
    outer: float,
    softcap: bool,
    compute_dtype: torch.dtype,
    kept: Kept | None = None,
) -> torch.Tensor:
    """logprobs, entropy, row_max, log_sum: [4, N] float32, zeros in rows that `rows` does not name.

    Args:
        hidden: [N, D], last dimension contiguous; weight: [V, D], any strides; bias: [V].
        targets: [N] int64; rows, count: of `compact_rows`.
        inner, outer, softcap: the logit transform, see `tile.transform`.
        compute_dtype: of the products, accumulated in float32.
        kept: filled for `kept_gradient`, with a row for each that `rows` names.
    """
    (num_rows, dim), vocab = hidden.shape, weight.shape[0]
    kernel = "linear_statistics" if kept is None else "linear_statistics_kept"
    config = gemm_config(kernel, compute_dtype, weight, dim, softcap=softcap)
    programs = processors(hidden.device)
    tiles = triton.cdiv(vocab, config.block_n)
    splits = balanced_splits(triton.cdiv(num_rows, config.block_m), tiles, programs, MAX_SPLITS)
    partial = torch.empty(4, splits, num_rows, dtype=torch.float32, device=hidden.device)
    tma = config.tma and fits_descriptor(weight)
    compact = tma and config.compact and fits_descriptor(hidden)
    if compact:
        hidden = descriptor(gather_rows(hidden, rows, count, hidden.dtype), config.block_m, config.block_k)
    launch(
        linear_statistics_kernel,
        (programs,),
        hidden,
        descriptor(weight, config.block_n, config.block_k) if tma else weight,
        bias,
        targets,
        rows,
        count,
        partial,
        *((None, None) if kept is None else (kept.values, kept.maxima)),
        num_rows,
        vocab,
        dim,
        splits,
        dim if compact else hidden.stride(0),
        *weight.stride(),
        0 if kept is None else kept.values.stride(0),
        inner,
        outer,
        SOFTCAP=softcap,
        HIDDEN_TMA=compact,
        WEIGHT_TMA=tma,
        FLATTEN=config.flatten,
        SPECIALIZE=config.specialize,
        **gemm_options(config, compute_dtype, weight.device, dim),
    )
    return combine_statistics(partial, rows, count, vocab)
