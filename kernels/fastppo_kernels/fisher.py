"""The Fisher-vector product of softmax(transform(hidden weightᵀ + bias)) without [N, V]: the kernels put together.

    compact_rows  ->  gather_rows (hidden, d_hidden)  ->  fisher_statistics  ->  combine_fisher             4NDV
                  ->  for each tile of the vocabulary:
                      fisher_gradient -> g [M, v];  hidden product += g weight tile;  weight product tile = gᵀ hidden
                  ->  scatter_rows                                                                     6NDV

In all 10NDV, or 16NDV with a direction for the weight. The products after `fisher_gradient` are cuBLAS's, accumulated
in float32. Memory: `budget` bytes for g and the float32 tile of the weight product, besides the contributing rows of
hidden and d_hidden and the float32 product of hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo_kernels.compact_rows import compact_rows
from fastppo_kernels.fisher_gradient import fisher_gradient
from fastppo_kernels.fisher_statistics import fisher_statistics
from fastppo_kernels.fisher_tile import Tangent
from fastppo_kernels.gather_rows import gather_rows
from fastppo_kernels.launch import interpreted_dtype
from fastppo_kernels.linear import _power_of_two_scale, _product, _RowCount, _unit_stride
from fastppo_kernels.scatter_rows import scatter_rows
from fastppo_kernels.tile import transform_factors
from fastppo_kernels.tiling import tile_of_columns


def fisher_vector_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    row_weights: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_n w_n Jᵀ (diag(p) − p pᵀ) J v in the dtypes of hidden [N, D], weight [V, D], bias [V].

    Args:
        d_hidden, d_weight, d_bias: the direction v; None for what is constant, whose product then is empty.
        row_weights: [N] float32; rows of weight 0 are left out, whatever they hold.
        temperature, logit_scale, softcap: z = softcap · tanh(logit_scale · x / softcap) / temperature.
        compute_dtype: of the products: bfloat16, float16 or float32.
        budget: bytes of scratch.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    (vocab, dim), device = weight.shape, hidden.device
    need_weight, need_bias = d_weight is not None, d_bias is not None
    out_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device)
    out_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=weight.dtype, device=device)
    out_bias = torch.zeros(vocab if need_bias else 0, dtype=bias.dtype if need_bias else weight.dtype, device=device)
    if not row_weights.numel():
        return out_hidden, out_weight, out_bias

    rows, count = compact_rows(torch.where(row_weights != 0, 0, -1))
    known = _RowCount(count, row_weights.numel())
    h, dh = (gather_rows(_unit_stride(x), rows, count, compute_dtype) for x in (hidden, d_hidden))
    num_rows = known.padded()
    if num_rows == 0:
        return out_hidden, out_weight, out_bias
    tangent = Tangent(h[:num_rows], dh[:num_rows], weight, d_weight, bias, d_bias)
    transform = transform_factors(temperature, logit_scale, softcap)
    *statistics, peak = fisher_statistics(tangent, count, **transform)
    weights = row_weights[rows[:num_rows].long()]  # behind the count: the first row's, which no kernel looks at
    # float16 has few exponents and g is as small as w p dz; a power of two is exact to undo.
    scale = _power_of_two_scale([weights * peak])

    block, width = tile_of_columns(num_rows, vocab, dim if need_weight else 0, compute_dtype.itemsize, budget)
    product = torch.zeros(num_rows, dim, dtype=torch.float32, device=device)
    scratch = torch.empty(block * width, dtype=compute_dtype, device=device)
    accumulator = torch.empty(width if need_weight else 0, dim, dtype=torch.float32, device=device)
    for lo in range(0, vocab, width):
        hi = min(lo + width, vocab)
        weight_tile = accumulator[: hi - lo]
        bias_tile = torch.zeros(hi - lo if need_bias else 0, dtype=torch.float32, device=device)
        for first in range(0, num_rows, block):
            span = slice(first, min(first + block, num_rows))
            part = tangent._replace(hidden=tangent.hidden[span], d_hidden=tangent.d_hidden[span])
            num = part.hidden.shape[0]
            g = scratch[: num * (hi - lo)].view(num, hi - lo)
            fisher_gradient(
                part,
                count,
                [x[span] for x in statistics],
                weights[span],
                scale,
                g,
                first_row=first,
                first_column=lo,
                **transform,
            )
            _product(product[span], g, weight[lo:hi].to(compute_dtype), accumulate=lo > 0)
            if need_weight:
                _product(weight_tile, g.t(), part.hidden, accumulate=first > 0)
            if need_bias:
                bias_tile += g.sum(0, dtype=torch.float32)
        if need_weight:
            out_weight[lo:hi] = weight_tile / scale
        if need_bias:
            out_bias[lo:hi] = bias_tile / scale
    scatter_rows(product.div_(scale), rows, count, out_hidden)
    return out_hidden, out_weight, out_bias
