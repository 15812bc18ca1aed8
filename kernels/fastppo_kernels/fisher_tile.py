"""What both Fisher kernels do for a tile: the logits and their derivative along a direction, sharing every load.

acc   = h Wᵀ                        [BLOCK_M, BLOCK_N] float32
d_acc = dh Wᵀ (+ h dWᵀ)             the weight tile is loaded once for both, the hidden tile once for both
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import Gemm
from fastppo_kernels.launch import operand
from fastppo_kernels.operands import Projection
from fastppo_kernels.tile import finish_logits, load_bias, transform_gradient


@triton.jit
def tangent_tile(
    hidden,  # descriptors of [M, D], blocks [BLOCK_M, BLOCK_K]
    d_hidden,
    weight,  # descriptors of [v, D], blocks [BLOCK_N, BLOCK_K]; d_weight None: the weight is constant
    d_weight,
    bias,  # [v] or None
    d_bias,
    row,
    column,
    width,
    dim,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(z, dz) [BLOCK_M, BLOCK_N] float32: z is −inf beyond the slice of the vocabulary, dz is 0 there."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    d_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, dim, BLOCK_K):
        h = hidden.load([row, k])
        dh = d_hidden.load([row, k])
        w = weight.load([column, k]).T
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
        d_acc = tl.dot(dh, w, d_acc, input_precision=PRECISION)
        if d_weight is not None:
            d_acc = tl.dot(h, d_weight.load([column, k]).T, d_acc, input_precision=PRECISION)
    columns = column + tl.arange(0, BLOCK_N)
    if d_bias is not None:
        d_acc += load_bias(d_bias, columns, width)
    z = finish_logits(acc, bias, columns, width, inner, outer, SOFTCAP)
    # The transform acts elementwise, so its derivative is the same forward and backward.
    dz = transform_gradient(d_acc, z, inner, outer, SOFTCAP)
    return z, tl.where(columns[None, :] < width, dz, 0.0)


class Slice(NamedTuple):
    """Columns first:last of the vocabulary: weights [v, D'] ready for the products, biases [v]; None as in Tangent."""

    first: int
    last: int
    weight: torch.Tensor
    d_weight: torch.Tensor | None
    bias: torch.Tensor | None
    d_bias: torch.Tensor | None


class Tangent(NamedTuple):
    """A head and a direction for it: d_hidden [M, D'], gathered as the head's hidden, d_weight [V, D], d_bias [V].

    d_weight and d_bias are None for what is constant.
    """

    head: Projection
    d_hidden: torch.Tensor
    d_weight: torch.Tensor | None
    d_bias: torch.Tensor | None

    def slices(self) -> Iterator[Slice]:
        """A span of the head at a time."""
        for lo, hi, weight in self.head.weight_slices():
            d_weight = self.d_weight
            if d_weight is not None:
                d_weight = self.head._replace(weight=d_weight).weight_slice(lo, hi)
            biases = (None if x is None else x[lo:hi] for x in (self.head.bias, self.d_bias))
            yield Slice(lo, hi, weight, d_weight, *biases)

    def operands(self, part: Slice, config: Gemm) -> tuple:
        """The kernels' first six arguments."""
        rows, columns = (config.block_m, config.block_k), (config.block_n, config.block_k)
        return (
            operand(self.head.hidden, *rows),
            operand(self.d_hidden, *rows),
            operand(part.weight, *columns),
            None if part.d_weight is None else operand(part.d_weight, *columns),
            part.bias,
            part.d_bias,
        )
