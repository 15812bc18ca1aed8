"""What both Fisher kernels do for a tile: the logits and their derivative along a direction, sharing every load.

acc   = h Wᵀ                        [BLOCK_M, BLOCK_N] float32
d_acc = dh Wᵀ (+ h dWᵀ)             the weight tile is loaded once for both, the hidden tile once for both
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import Gemm
from fastppo_kernels.launch import descriptor, fits_descriptor
from fastppo_kernels.tile import finish_logits, load_bias, transform_gradient


@triton.jit
def tangent_tile(
    hidden,  # pointer to [M, D], contiguous, or a TMA descriptor; all four alike
    d_hidden,
    weight,  # pointer to [V, D]
    d_weight,  # or None: the weight is constant
    bias,
    d_bias,
    row,  # first row of the block
    columns,  # [BLOCK_N]
    num_rows,
    vocab,
    dim,
    weight_stride,
    weight_stride_k,
    d_weight_stride,
    d_weight_stride_k,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    column,  # first of the columns
):
    """(z, dz) [BLOCK_M, BLOCK_N] float32: z is −inf beyond the vocabulary, dz is 0 there."""
    offs_k = tl.arange(0, BLOCK_K)
    if not TMA:
        local = tl.minimum(row + tl.arange(0, BLOCK_M), num_rows - 1).to(tl.int64)
        h_offsets = local[:, None] * dim + offs_k[None, :]
        # Columns beyond the vocabulary repeat its last one, which spares the loads a mask.
        offs_n = tl.minimum(columns, vocab - 1).to(tl.int64)
        w_offsets = offs_n[:, None] * weight_stride + offs_k[None, :] * weight_stride_k
        if d_weight is not None:
            dw_offsets = offs_n[:, None] * d_weight_stride + offs_k[None, :] * d_weight_stride_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    d_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, dim, BLOCK_K):
        if TMA:
            h, dh, w = hidden.load([row, k]), d_hidden.load([row, k]), weight.load([column, k])
        elif EVEN_K:
            h, dh = tl.load(hidden + h_offsets + k), tl.load(d_hidden + h_offsets + k)
            w = tl.load(weight + w_offsets + k * weight_stride_k)
        else:
            rest = offs_k[None, :] < dim - k
            h = tl.load(hidden + h_offsets + k, mask=rest, other=0.0)
            dh = tl.load(d_hidden + h_offsets + k, mask=rest, other=0.0)
            w = tl.load(weight + w_offsets + k * weight_stride_k, mask=rest, other=0.0)
        w_t = w.to(COMPUTE).T
        acc = tl.dot(h, w_t, acc, input_precision=PRECISION)
        d_acc = tl.dot(dh, w_t, d_acc, input_precision=PRECISION)
        if d_weight is not None:
            if TMA:
                dw = d_weight.load([column, k])
            elif EVEN_K:
                dw = tl.load(d_weight + dw_offsets + k * d_weight_stride_k)
            else:
                dw = tl.load(d_weight + dw_offsets + k * d_weight_stride_k, mask=offs_k[None, :] < dim - k, other=0.0)
            d_acc = tl.dot(h, dw.to(COMPUTE).T, d_acc, input_precision=PRECISION)
    if d_bias is not None:
        d_acc += load_bias(d_bias, columns, vocab)
    z = finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP)
    # The transform acts elementwise, so its derivative is the same forward and backward.
    dz = transform_gradient(d_acc, z, inner, outer, SOFTCAP)
    return z, tl.where(columns[None, :] < vocab, dz, 0.0)


class Tangent(NamedTuple):
    """hidden, d_hidden [M, D]: compacted, contiguous, in the dtype of the products. weight, d_weight [V, D] of any
    strides, bias, d_bias [V]; None where there is no bias or no direction for what is constant.
    """

    hidden: torch.Tensor
    d_hidden: torch.Tensor
    weight: torch.Tensor
    d_weight: torch.Tensor | None
    bias: torch.Tensor | None
    d_bias: torch.Tensor | None

    def operands(self, config: Gemm) -> tuple[tuple, bool]:
        """The kernels' first six arguments, and whether the matrices among them are TMA descriptors."""
        matrices = [x for x in self[:4] if x is not None]
        tma = config.tma and all(x.dtype == self.hidden.dtype and fits_descriptor(x) for x in matrices)
        if not tma:
            return tuple(self), False
        rows, columns = (config.block_m, config.block_k), (config.block_n, config.block_k)
        blocks = (rows, rows, columns, columns)
        described = (None if x is None else descriptor(x, *block) for x, block in zip(self[:4], blocks, strict=True))
        return (*described, self.bias, self.d_bias), True

    def strides(self) -> tuple[int, int, int, int]:
        """Of weight and d_weight."""
        return (*self.weight.stride(), *(self.weight if self.d_weight is None else self.d_weight).stride())
