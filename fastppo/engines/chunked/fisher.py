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

from fastppo.engines.chunked.products import accumulation_dtype, pull_back, tiling, upcast_product
from fastppo.engines.engine import VERY_NEGATIVE, Head, Needs, Options


def fisher_vector_product(policy: Head, direction: Head, row_weights: Tensor, options: Options) -> Head:
    rows = row_weights.nonzero().squeeze(-1)
    vocab, dim = policy.weight.shape
    directions = 1 if direction.weight is None else 2
    block, width = tiling(rows.numel(), vocab, directions * dim, options.budget)
    # ∂logits are as small as w p, which float16 rounds to zero.
    product_dtype = torch.float32 if options.compute_dtype == torch.float16 else options.compute_dtype
    blocks = [_Tangent(policy, direction, row_weights, index, options, width) for index in rows.split(block)]
    needs = Needs(*(x is not None for x in direction))
    return Head(*pull_back(policy, rows, blocks, width, needs, product_dtype))


class _Tangent:
    """The logits of a block of rows, their derivative along a direction, and what the Fisher matrix makes of it."""

    def __init__(
        self, policy: Head, direction: Head, row_weights: Tensor, index: Tensor, options: Options, width: int
    ) -> None:
        self.dtype = accumulation_dtype(policy.hidden.dtype)
        # [2R, D]
        self.stacked = torch.cat([x[index].to(options.compute_dtype) for x in (policy.hidden, direction.hidden)])
        self.hidden = self.stacked[: index.numel()]
        self.weight, self.bias, self.d_weight, self.d_bias = *policy[1:], *direction[1:]
        self.transform = options.transform
        self.row_max, total, self.mean = self._mean(width)
        self.scale = row_weights[index] / total

    def tile(self, lo: int, hi: int) -> Tensor:
        """g = w t′ p (∂z − Σ p ∂z) [R, hi − lo] in float32 (float64 for float64)."""
        z, dz = self._logits(lo, hi)
        p = (z - self.row_max.unsqueeze(1)).exp_()
        g = dz.sub_(self.mean.unsqueeze(1)).mul_(p).mul_(self.scale.unsqueeze(1))
        return self.transform.backward_(g, z)

    def _logits(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """z, ∂z [R, hi − lo], buffers of the caller's own."""
        z, dz = upcast_product(self.stacked, self.weight[lo:hi]).to(self.dtype).chunk(2)
        if self.d_weight is not None:
            dz += upcast_product(self.hidden, self.d_weight[lo:hi])
        if self.bias is not None:
            z += self.bias[lo:hi]
        if self.d_bias is not None:
            dz += self.d_bias[lo:hi]
        z = self.transform.apply_(z)
        return z, self.transform.backward_(dz, z)  # elementwise, so the same forward and backward

    def _mean(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row maximum m, Σ eᶻ⁻ᵐ and Σ p ∂z, each [R], by online softmax."""
        rows, vocab = self.hidden.shape[0], self.weight.shape[0]
        row_max = self.hidden.new_full((rows,), torch.finfo(self.dtype).min, dtype=self.dtype)
        total, weighted = torch.zeros_like(row_max), torch.zeros_like(row_max)
        for lo in range(0, vocab, width):
            z, dz = self._logits(lo, min(lo + width, vocab))
            higher = torch.maximum(row_max, z.amax(1))
            scale = (row_max - higher).clamp_(min=VERY_NEGATIVE).exp_()
            e = z.sub_(higher.unsqueeze(1)).exp_()
            total = total * scale + e.sum(1)
            weighted = weighted * scale + torch.linalg.vecdot(e, dz)
            row_max = higher
        return row_max, total, weighted / total
