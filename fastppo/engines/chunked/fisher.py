"""The Fisher-vector product in PyTorch, tile by tile, on any device.

    pass 1  for a block of rows [R, D] and each vocabulary tile [v, D]:
                z, ∂z [R, v]  ->  running max m, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ ∂z              so that s = Σ_v p ∂z is known
    pass 2  for each vocabulary tile, for each block of rows:
                z, ∂z again  ->  g = w · t′ · p (∂z − s)  ->  weight product [tile] += gᵀ h  and  hidden product += g W

z and the part of ∂z that comes from d_hidden are one product, of both stacked [2R, D], which reads the weight once.
Memory: tiles that fit the budget; beyond them the rows that count and their product in float32, [N, D] each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.chunked.linear import add_product, tiling, upcast_product
from fastppo.engines.engine import VERY_NEGATIVE, Head, Options


def fisher_vector_product(policy: Head, direction: Head, row_weights: Tensor, options: Options) -> Head:
    hidden, weight, bias = policy
    d_weight, d_bias = direction[1:]
    (vocab, dim), dtype = weight.shape, torch.promote_types(hidden.dtype, torch.float32)
    rows = row_weights.nonzero().squeeze(-1)
    directions = 1 if d_weight is None else 2
    block, width = tiling(rows.numel(), vocab, directions * dim, options.budget)
    # g is as small as w p, of which float16 has nothing left.
    product_dtype = torch.float32 if options.compute_dtype == torch.float16 else options.compute_dtype

    out_hidden_rows = hidden.new_zeros(rows.numel(), dim, dtype=dtype)
    out_weight = weight.new_empty(weight.shape if d_weight is not None else (0,))
    out_bias = weight.new_empty(vocab, dtype=bias.dtype) if d_bias is not None else weight.new_empty(0)

    blocks = []
    for start in range(0, rows.numel(), block):
        index = rows[start : start + block]
        tangent = _Tangent(policy, direction, index, options)
        blocks.append((slice(start, start + block), tangent, row_weights[index], _mean_tangent(tangent, width)))

    for lo in range(0, vocab, width):
        hi = min(lo + width, vocab)
        weight_tile = hidden.new_zeros(hi - lo, dim, dtype=dtype) if d_weight is not None else None
        bias_tile = hidden.new_zeros(hi - lo, dtype=dtype) if d_bias is not None else None
        for span, tangent, scale, (row_max, total, mean) in blocks:
            z, dz = tangent.tile(lo, hi)
            p = (z - row_max.unsqueeze(1)).exp_()
            g = dz.sub_(mean.unsqueeze(1)).mul_(p).mul_((scale / total).unsqueeze(1))
            g = options.transform.backward_(g, z)
            add_product(out_hidden_rows[span], g, weight[lo:hi], product_dtype, last_sum=hi - lo == vocab)
            if d_weight is not None:
                add_product(weight_tile, g.t(), tangent.hidden, product_dtype, last_sum=len(blocks) == 1)
            if d_bias is not None:
                bias_tile += g.sum(0)
        if d_weight is not None:
            out_weight[lo:hi] = weight_tile
        if d_bias is not None:
            out_bias[lo:hi] = bias_tile

    out_hidden = hidden.new_zeros(hidden.shape)
    out_hidden[rows] = out_hidden_rows.to(hidden.dtype)
    return Head(out_hidden, out_weight, out_bias)


class _Tangent:
    """The logits of a block of rows and their derivative along a direction, a vocabulary tile at a time."""

    def __init__(self, policy: Head, direction: Head, index: Tensor, options: Options) -> None:
        self.accumulation_dtype = torch.promote_types(policy.hidden.dtype, torch.float32)
        # [2R, D]
        self.stacked = torch.cat([x[index].to(options.compute_dtype) for x in (policy.hidden, direction.hidden)])
        self.hidden = self.stacked[: index.numel()]
        self.weight, self.bias, self.d_weight, self.d_bias = *policy[1:], *direction[1:]
        self.transform = options.transform

    def tile(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """z, ∂z [R, hi − lo] in float32 (float64 for float64), buffers of the caller's own."""
        z, dz = upcast_product(self.stacked, self.weight[lo:hi]).to(self.accumulation_dtype).chunk(2)
        if self.d_weight is not None:
            dz += upcast_product(self.hidden, self.d_weight[lo:hi])
        if self.bias is not None:
            z += self.bias[lo:hi]
        if self.d_bias is not None:
            dz += self.d_bias[lo:hi]
        z = self.transform.apply_(z)
        return z, self.transform.backward_(dz, z)  # elementwise, so the same forward and backward


def _mean_tangent(tangent: _Tangent, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """row maximum m, Σ eᶻ⁻ᵐ and Σ p ∂z, each [R], by online softmax."""
    rows, vocab = tangent.hidden.shape[0], tangent.weight.shape[0]
    row_max = tangent.hidden.new_full(
        (rows,), torch.finfo(tangent.accumulation_dtype).min, dtype=tangent.accumulation_dtype
    )
    total, weighted = torch.zeros_like(row_max), torch.zeros_like(row_max)
    for lo in range(0, vocab, width):
        z, dz = tangent.tile(lo, min(lo + width, vocab))
        higher = torch.maximum(row_max, z.amax(1))
        scale = (row_max - higher).clamp_(min=VERY_NEGATIVE).exp_()
        e = z.sub_(higher.unsqueeze(1)).exp_()
        total = total * scale + e.sum(1)
        weighted = weighted * scale + torch.linalg.vecdot(e, dz)
        row_max = higher
    return row_max, total, weighted / total
