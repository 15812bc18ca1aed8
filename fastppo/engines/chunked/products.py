"""Matrix products in tiles: how a problem is cut, and how ∂logits become gradients with every sum in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastppo.engines.engine import Gradients, Head, Needs

# Rows in a block: enough for a matrix product to run at full speed, few enough for wide vocabulary tiles.
ROWS = 1024


class Block(Protocol):
    """Some rows' hidden states [R, D] in the products' precision, and their ∂logits, a vocabulary tile at a time."""

    hidden: Tensor

    def tile(self, lo: int, hi: int) -> Tensor:
        """∂x [R, hi − lo] of the raw logits x in float32 (float64 for float64)."""


def pull_back(
    policy: Head, rows: Tensor, blocks: Sequence[Block], width: int, needs: Needs, product_dtype: torch.dtype
) -> Gradients:
    """∂hidden, ∂weight, ∂bias in the dtypes of their arguments, empty where not needed.

    Args:
        rows: [n] indices of the rows that contribute; `blocks` are them, in order.
        width: columns in a tile.
    """
    hidden, weight, bias = policy
    (vocab, dim), dtype = weight.shape, accumulation_dtype(hidden.dtype)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs.weight else weight.new_empty(0)
    d_bias = torch.empty_like(bias) if needs.bias else weight.new_empty(0)
    d_rows = hidden.new_zeros(rows.numel() if needs.hidden else 0, dim, dtype=dtype)
    parts = d_rows.split([block.hidden.shape[0] if needs.hidden else 0 for block in blocks])
    for lo in range(0, vocab, width):
        hi = min(lo + width, vocab)
        d_weight_tile = hidden.new_zeros(hi - lo, dim, dtype=dtype) if needs.weight else None
        d_bias_tile = hidden.new_zeros(hi - lo, dtype=dtype) if needs.bias else None
        for part, block in zip(parts, blocks, strict=True):
            dz = block.tile(lo, hi)
            if needs.weight:
                add_product(d_weight_tile, dz.t(), block.hidden, product_dtype, last_sum=len(blocks) == 1)
            if needs.bias:
                d_bias_tile += dz.sum(0)
            if needs.hidden:
                add_product(part, dz, weight[lo:hi], product_dtype, last_sum=hi - lo == vocab)
        if needs.weight:
            d_weight[lo:hi] = d_weight_tile
        if needs.bias:
            d_bias[lo:hi] = d_bias_tile
    d_hidden = hidden.new_zeros(hidden.shape if needs.hidden else (0,))
    if needs.hidden:
        d_hidden[rows] = d_rows.to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def upcast_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, D] times weight [v, D] transposed, in rows' precision; float32 from a low one, float64 from float64."""
    weight = weight.to(rows.dtype)
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    # On a CPU a bfloat16 product comes rounded to bfloat16, as the naive path's logits do.
    product = torch.mm(rows, weight.t())
    return product.to(accumulation_dtype(product.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor, compute_dtype: torch.dtype, *, last_sum: bool) -> None:
    """out += a @ b, accumulated in out's float32.

    A CPU's bfloat16 product comes rounded to bfloat16. That is fine where the product is the whole sum (`last_sum`:
    the naive path rounds there too), and biases training where many such are added up; those run in float32.
    """
    if compute_dtype == out.dtype:
        out.addmm_(a, b.to(out.dtype))
    elif out.is_cuda:
        out += torch.mm(a.to(compute_dtype), b.to(compute_dtype), out_dtype=torch.float32)
    elif last_sum:
        out += torch.mm(a.to(compute_dtype), b.to(compute_dtype))
    else:
        out.addmm_(a, b.to(out.dtype))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiling(rows: int, vocab: int, dim: int, budget: int) -> tuple[int, int]:
    """Rows in a block and columns in a tile, so that what a tile needs stays within `budget` bytes.

    At its widest (∂z with a divergence) five float32 buffers [R, v] are alive, and two copies of the weight tile.
    """
    block = max(1, min(rows, ROWS))
    width = budget // (4 * (5 * block + 2 * dim))
    if width < 64:
        # A budget for less than 64 columns of this many rows: fewer rows then.
        width = 64
        block = max(1, min(block, (budget // (4 * width) - 2 * dim) // 5))
    return block, min(vocab, width) if width < 64 or vocab <= width else width // 64 * 64
