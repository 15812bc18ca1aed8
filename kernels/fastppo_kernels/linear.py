"""Statistics and gradients of softmax(transform(hidden weightᵀ + bias)) without [N, V]: the kernels put together.

    statistics   compact_rows  ->  linear_statistics (or linear_divergence, jsd)  ->  combine          2NDV
    vjp          compact_rows  ->  gather_rows  ->  for each tile of the vocabulary:
                     logit_gradient -> ∂z [M, v];  ∂weight tile = ∂zᵀ hidden;  ∂hidden += ∂z weight tile          6NDV
                 ->  scatter_rows

The two products after `logit_gradient` are cuBLAS's, accumulated in float32. Memory: `budget` bytes for ∂z and the
float32 ∂weight tile, besides the contributing rows of hidden and float32 ∂hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo_kernels.compact_rows import compact_rows
from fastppo_kernels.gather_rows import gather_rows
from fastppo_kernels.launch import interpreted_dtype
from fastppo_kernels.linear_divergence import linear_divergence
from fastppo_kernels.linear_jsd import linear_jsd
from fastppo_kernels.linear_statistics import linear_statistics
from fastppo_kernels.logit_gradient import Head, RowScalars, logit_gradient
from fastppo_kernels.scatter_rows import scatter_rows
from fastppo_kernels.tile import transform_factors

# A product over fewer columns than this leaves tensor cores idle; the budget then cuts the rows instead.
MIN_WIDTH = 512
# The count of rows is rounded up to this, so that the shapes of the products are few and aligned.
ROW_MULTIPLE = 128


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
) -> list[Tensor]:
    """Per-row statistics; rows whose target is negative are left out and give zeros.

    Args:
        hidden: [N, D]; weight: [V, D]; bias: [V]; targets: [N] int64.
        ref_hidden: [N, D']; ref_weight: [V, D']; ref_bias: [V]: the other model of a divergence, or None.
        kl_kind: reverse, forward or jsd; empty for none.
        temperature, logit_scale, softcap: z = softcap · tanh(logit_scale · x / softcap) / temperature.
        compute_dtype: of the products: bfloat16, float16 or float32.

    Returns:
        logprobs, entropy, row_max, log_sum, and with a divergence kl, kl_center, ref_row_max, ref_log_sum: [N] float32.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    rows, count = compact_rows(targets.contiguous())
    policy = Head(_unit_stride(hidden), weight, bias)
    options = {**transform_factors(temperature, logit_scale, softcap), "compute_dtype": compute_dtype}
    if not kl_kind:
        return list(linear_statistics(*policy, targets.contiguous(), rows, count, **options).unbind(0))
    reference = Head(_unit_stride(ref_hidden), ref_weight, ref_bias)
    out = linear_divergence(policy, reference, targets.contiguous(), rows, count, kind=kl_kind, **options)
    if kl_kind == "jsd":
        linear_jsd(policy, reference, out, rows, count, **options)
    return list(out.unbind(0))


def vjp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂hidden [N, D], ∂weight [V, D], ∂bias [V] in their arguments' dtypes, empty where not needed.

    Args:
        saved: what `statistics` returned for the same arguments.
        d_logprobs, d_entropy, d_logsumexp, d_kl: [N] float32, or None where that term is absent.
        budget: bytes of scratch.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    (vocab, dim), device = weight.shape, hidden.device
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=device)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=device)
    d_bias = torch.empty(vocab if need_bias else 0, dtype=bias.dtype if need_bias else weight.dtype, device=device)

    targets = targets.contiguous()
    upstream = [None if g is None else g.float().contiguous() for g in (d_logprobs, d_entropy, d_logsumexp, d_kl)]
    if all(g is None for g in upstream) or not targets.numel():
        return d_hidden, d_weight.zero_(), d_bias.zero_()
    kind = kl_kind if d_kl is not None else ""
    rows, count = compact_rows(targets, tuple(upstream))
    known = _RowCount(count, targets.numel())

    # Both are enqueued before the host asks for the count, so that the device has work while it waits.
    policy = Head(gather_rows(_unit_stride(hidden), rows, count, compute_dtype), weight, bias)
    reference = None
    if kind:
        reference = Head(gather_rows(_unit_stride(ref_hidden), rows, count, compute_dtype), ref_weight, ref_bias)
    scale = _power_of_two_scale(upstream) if compute_dtype == torch.float16 else None

    num_rows = known.padded()
    if num_rows == 0:
        return d_hidden, d_weight.zero_(), d_bias.zero_()
    scalars = RowScalars(targets, *saved[1:4], *(saved[5:8] if kl_kind else (None, None, None)), *upstream)
    block, width = tiling(num_rows, vocab, dim if need_weight else 0, compute_dtype.itemsize, budget)
    d_rows = torch.zeros(num_rows if need_hidden else 0, dim, dtype=torch.float32, device=device)
    scratch = torch.empty(block * width, dtype=compute_dtype, device=device)
    accumulator = torch.empty(width if need_weight else 0, dim, dtype=torch.float32, device=device)
    transform = transform_factors(temperature, logit_scale, softcap)

    for lo in range(0, vocab, width):
        hi = min(lo + width, vocab)
        d_weight_tile = accumulator[: hi - lo]
        d_bias_tile = torch.zeros(hi - lo if need_bias else 0, dtype=torch.float32, device=device)
        for first in range(0, num_rows, block):
            last = min(first + block, num_rows)
            span = slice(first, last)
            dz = scratch[: (last - first) * (hi - lo)].view(last - first, hi - lo)
            logit_gradient(
                policy._replace(hidden=policy.hidden[span]),
                None if reference is None else reference._replace(hidden=reference.hidden[span]),
                rows[span],
                count,
                scalars,
                dz,
                first_row=first,
                first_column=lo,
                kind=kind,
                scale=scale,
                **transform,
            )
            if need_weight:
                _product(d_weight_tile, dz.t(), policy.hidden[span], accumulate=first > 0)
            if need_bias:
                d_bias_tile += dz.sum(0, dtype=torch.float32)
            if need_hidden:
                _product(d_rows[span], dz, weight[lo:hi].to(compute_dtype), accumulate=lo > 0)
        if need_weight:
            d_weight[lo:hi] = d_weight_tile if scale is None else d_weight_tile / scale
        if need_bias:
            d_bias[lo:hi] = d_bias_tile if scale is None else d_bias_tile / scale
    if need_hidden:
        scatter_rows(d_rows if scale is None else d_rows.div_(scale), rows, count, d_hidden)
    return d_hidden, d_weight, d_bias


class _RowCount:
    """How many rows contribute, on its way to the host while the device works on.

    Under CUDA graph capture the host may not wait, and on meta tensors there is nothing to wait for: all rows are
    then taken, those behind the count as zeros.
    """

    def __init__(self, count: Tensor, most: int) -> None:
        self._most, self._event = most, None
        self._count = count
        if count.is_meta:
            self._count = None
        elif count.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                self._count = None
                return
            self._count = torch.empty(1, dtype=count.dtype, pin_memory=True)
            self._count.copy_(count, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def padded(self) -> int:
        """Rounded up to ROW_MULTIPLE, at most the number of rows there are."""
        if self._count is None:
            return self._most
        if self._event is not None:
            self._event.synchronize()
        return min(self._most, -(-int(self._count) // ROW_MULTIPLE) * ROW_MULTIPLE)


def tiling(num_rows: int, vocab: int, accumulator_dim: int, itemsize: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of a tile of ∂z: it and the float32 ∂weight tile [columns, accumulator_dim] fit the budget.

    All rows at once where that leaves MIN_WIDTH columns: ∂weight is then written without being added up.
    """
    width = min(vocab, MIN_WIDTH)
    rows_that_fit = (budget // width - 4 * accumulator_dim) // itemsize
    if rows_that_fit < num_rows:
        return min(num_rows, max(ROW_MULTIPLE, rows_that_fit // ROW_MULTIPLE * ROW_MULTIPLE)), width
    fits = budget // (num_rows * itemsize + 4 * accumulator_dim)
    return num_rows, vocab if fits >= vocab else fits // MIN_WIDTH * MIN_WIDTH


def _product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, with out and every sum in float32."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=1.0 if accumulate else 0.0, out=out)
    elif a.is_cuda and accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=1.0 if accumulate else 0.0, out=out)


def _power_of_two_scale(upstream: list[Tensor | None]) -> Tensor:
    """[1] float32 that lifts the greatest upstream scalar to about 1, as float16 has few exponents; exact to undo."""
    greatest = torch.stack([g.abs().max() for g in upstream if g is not None]).max()
    return torch.exp2(-torch.log2(greatest).floor()).where(torch.isfinite(greatest) & (greatest > 0), 1.0).reshape(1)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
