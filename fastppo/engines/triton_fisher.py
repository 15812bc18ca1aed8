"""The Fisher-vector product by the Triton kernels; the operator's contract is that of `chunked_fisher`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines import triton_kernels


@torch.library.custom_op("fastppo::triton_fisher_vector_product", mutates_args=())
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
    direction = (d_hidden, d_weight, d_bias)
    options = (temperature, logit_scale, softcap, compute_dtype, budget)
    return triton_kernels.fisher.fisher_vector_product(hidden, weight, bias, *direction, row_weights, *options)


@fisher_vector_product.register_fake
def _(hidden, weight, bias, d_hidden, d_weight, d_bias, *_options):
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape if d_weight is not None else (0,)),
        bias.new_empty(bias.shape) if d_bias is not None else weight.new_empty(0),
    )
