"""A loss with its gradients from one product of logits, 6NDV: chunks of rows, each with all of the vocabulary.

    for each chunk of rows:
        compact_rows -> gather_rows
        statistics       hidden [M, D], weight  ->  log-prob, entropy, S of every row;  E = exp(z − shift) [M, V] stored
        the caller's scalars a row: ∂loss/∂(log-prob, entropy), from the log-probs
        stored_gradient  without entropy, softcap and bias one element a row of E is written: ∂z = α E, α = −g / S;
                         otherwise E becomes ∂z in place, and α = 1
        products         ∂hidden = α ⊙ (E weight),   ∂weight += Eᵀ (α ⊙ hidden)
        scatter_rows

Memory: E and the partial statistics of a chunk, and with several chunks ∂weight's sum in float32; besides, the chunk's
rows of hidden and float32 ∂hidden. The host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo_kernels.launch import ceilings, interpreted_dtype
from fastppo_kernels.operands import Projection, needs_copy
from fastppo_kernels.products import hidden_product, weight_product
from fastppo_kernels.rows import compact_rows, gather_rows, scatter_rows
from fastppo_kernels.statistics import row_statistics
from fastppo_kernels.stored_gradient import stored_gradient, write_targets
from fastppo_kernels.tile import steepest, transform_factors
from fastppo_kernels.tiling import LossShape, Tiling, choose, row_stride

# Below this slope of the logit transform bfloat16's exponentials say too little of log p + H, which shrinks with it: at
# 0.1 the entropy's gradient is off by 0.4%, at 0.01 by 2%, at 0.001 by 70%.
FLATTEST = 0.1
# Below this bound of a softcap over the temperature they say too little of tanh.
LEAST_BOUND = 1.0


def choose_tiling(
    hidden: Tensor,
    weight: Tensor,
    unit: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
    *,
    with_entropy: bool,
) -> Tiling:
    """How a loss of these tensors is computed: by `linear`, or, if `whole`, by `loss_by_rows` in chunks of `rows`.

    Args:
        unit: consecutive rows that must stay together.
        with_entropy: whether the loss has an entropy term.
    """
    dtype = interpreted_dtype(compute_dtype)
    transform = transform_factors(temperature, logit_scale, softcap)
    flat = with_entropy and steepest(transform) < FLATTEST
    bounded = softcap is not None and abs(transform["outer"]) < LEAST_BOUND
    # float16 has too few exponents for exponentials relative to anything but the row's own maximum.
    whole_rows = dtype == torch.float32 or (dtype == torch.bfloat16 and not flat and not bounded)
    problem = LossShape(
        hidden.shape[0], *weight.shape, dtype.itemsize, weight.element_size(), unit, needs_copy(weight, dtype)
    )
    return choose(problem, budget, ceilings(hidden.device), whole_rows=whole_rows)


def loss_by_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_scalars: Callable[[Tensor, slice], tuple[Tensor, Tensor | None]],
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    chunk: int,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [4, N] as of `linear.statistics`, and ∂hidden, ∂weight, ∂bias as of `linear.vjp`.

    Args:
        row_scalars: (statistics [4, N], whose rows up to the slice's end are there, slice of rows) -> d_logprobs and
            d_entropy of those rows, float32; d_entropy is None where the loss has no such term.
        chunk: rows in a chunk; see `choose_tiling`.
        compute_dtype: bfloat16 or float32.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    (vocab, dim), device, num_rows = weight.shape, hidden.device, hidden.shape[0]
    targets, transform = targets.contiguous(), transform_factors(temperature, logit_scale, softcap)
    out = torch.zeros(4, row_stride(num_rows), dtype=torch.float32, device=device)[:, :num_rows]
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=device)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=device)
    d_bias = torch.zeros(vocab if need_bias else 0, dtype=torch.float32, device=device)

    memory = torch.empty(min(chunk, num_rows), row_stride(vocab), dtype=compute_dtype, device=device)
    sums = None
    if num_rows == 0:
        d_weight.zero_()
    for first in range(0, num_rows, chunk):
        span = slice(first, min(first + chunk, num_rows))
        here, part = targets[span], out[:, span]
        rows, count = compact_rows(here)
        head = Projection.make(gather_rows(hidden[span], rows, count, compute_dtype), weight, bias, budget)
        weight, bias = head.weight, head.bias  # a copy that was needed serves all chunks
        stored = memory[: here.numel(), :vocab]
        row_statistics(head, here, rows, count, part, transform, stored)

        d_logprobs, d_entropy = (None if g is None else g.float().contiguous() for g in row_scalars(out, span))
        scaled_hidden, alpha = head.hidden, None
        if d_entropy is None and softcap is None and not need_bias:
            alpha = write_targets(stored, rows, count, here, part, d_logprobs, transform["outer"])
            scaled_hidden = gather_rows(hidden[span], rows, count, compute_dtype, scale=alpha)
        else:
            stored_gradient(stored, rows, count, here, part, d_logprobs, d_entropy, transform)
        if need_weight:
            if sums is None:
                fits = d_weight.dtype == torch.float32 or (chunk >= num_rows and d_weight.dtype == compute_dtype)
                fits = fits and head.hidden.shape[1] == dim
                sums = d_weight if fits else d_weight.new_empty(vocab, head.hidden.shape[1], dtype=torch.float32)
            weight_product(stored, scaled_hidden, sums, count, 0, accumulate=first > 0)
        if need_bias:
            d_bias += stored.sum(0, dtype=torch.float32)
        if need_hidden:
            d_rows = torch.empty(here.numel(), head.hidden.shape[1], dtype=torch.float32, device=device)
            for lo, hi, weight_slice in head.weight_slices():
                hidden_product(stored[:, lo:hi], weight_slice, d_rows, count, 0, accumulate=lo > 0)
            scatter_rows(d_rows, rows, count, d_hidden[span], alpha)
    if sums is not None and sums is not d_weight:
        d_weight.copy_(sums[:, :dim])
    return out, d_hidden, d_weight, d_bias.to(bias.dtype) if need_bias else d_bias.to(d_weight.dtype)
