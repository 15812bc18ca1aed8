"""The Fisher-vector product of softmax(transform(hidden weightᵀ + bias)) without [N, V]: the kernels put together.

    compact_rows  ->  gather_rows (hidden, d_hidden)  ->  fisher_statistics  ->  combine_fisher             4NDV
                  ->  for each slice of the vocabulary:
                      fisher_gradient -> g [N, v];  hidden product += g weight;  weight product = gᵀ hidden
                  ->  scatter_rows                                                                     6NDV, 8NDV

In all 10NDV, or 16NDV with a direction for the weight; the plain products run over all N rows, the others over the
contributing ones, which are brought together in front. The host waits for nothing. Memory: `budget` bytes for g, the
float32 slice of the weight product and copies of slices of weights that cannot be read as they lie, besides hidden and
d_hidden in the dtype of the products and the float32 product of hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo_kernels.fisher_gradient import fisher_gradient
from fastppo_kernels.fisher_statistics import fisher_statistics
from fastppo_kernels.fisher_tile import Tangent
from fastppo_kernels.launch import interpreted_dtype
from fastppo_kernels.operands import Projection, needs_copy
from fastppo_kernels.products import hidden_product, power_of_two_scale, weight_product
from fastppo_kernels.rows import compact_rows, gather_rows, scatter_rows
from fastppo_kernels.tile import steepest, transform_factors
from fastppo_kernels.tiling import row_stride, tile_of_columns


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
    num_rows = row_weights.numel()
    if not num_rows:
        return out_hidden, out_weight, out_bias

    rows, count = compact_rows(torch.where(row_weights != 0, 0, -1))
    h, dh = (gather_rows(x, rows, count, compute_dtype) for x in (hidden, d_hidden))
    copies = sum(x is not None and needs_copy(x, compute_dtype) for x in (weight, d_weight))
    # Bytes a column beside g's, in float32 elements: its row of the weight product and of each copy.
    column = h.shape[1] * (need_weight + -(-copies * compute_dtype.itemsize // 4))
    block, width = tile_of_columns(num_rows, vocab, column, compute_dtype.itemsize, budget)
    d_bias = None if d_bias is None else d_bias.contiguous()
    tangent = Tangent(Projection.make(h, weight, bias, budget, width), dh, d_weight, d_bias)
    transform = transform_factors(temperature, logit_scale, softcap)
    statistics = fisher_statistics(tangent, count, transform)
    weights = row_weights[rows.long()]  # behind the count: the first row's, which no kernel looks at
    # float16 has few exponents and g is as small as w p dz; a power of two is exact to undo.
    scale = power_of_two_scale([weights * statistics[3]], steepest(transform))

    product = torch.empty(h.shape, dtype=torch.float32, device=device)
    scratch = torch.empty(block, row_stride(width), dtype=compute_dtype, device=device)
    accumulator = torch.empty(width if need_weight else 0, h.shape[1], dtype=torch.float32, device=device)
    for part in tangent.slices():
        columns = slice(part.first, part.last)
        weight_slice = accumulator[: part.last - part.first]
        bias_product = torch.zeros(part.last - part.first if need_bias else 0, dtype=torch.float32, device=device)
        for first in range(0, num_rows, block):
            span = slice(first, min(first + block, num_rows))
            g = scratch[: span.stop - first, : part.last - part.first]
            fisher_gradient(tangent, part, count, statistics, weights, scale, g, first, transform)
            hidden_product(g, part.weight, product[span], count, first, accumulate=part.first > 0)
            if need_weight:
                weight_product(g, h[span], weight_slice, count, first, accumulate=first > 0)
            if need_bias:
                bias_product += g.sum(0, dtype=torch.float32)
        if need_weight:
            out_weight[columns] = weight_slice[:, :dim] / scale
        if need_bias:
            out_bias[columns] = bias_product / scale
    scatter_rows(product.div_(scale), rows, count, out_hidden)
    return out_hidden, out_weight, out_bias
