"""Statistics and gradients of softmax(transform(hidden weightᵀ + bias)) without [N, V]: the kernels put together.

    statistics   compact_rows  ->  linear_statistics (or linear_divergence, jsd)  ->  combine          2NDV
    vjp          compact_rows  ->  gather_rows  ->  for each tile of the vocabulary:
                     logit_gradient -> ∂z [M, v];  ∂weight tile = ∂zᵀ hidden;  ∂hidden += ∂z weight tile          6NDV
                 ->  scatter_rows
    row_chunks   for each chunk of rows:  compact_rows  ->  gather_rows
                     linear_statistics -> statistics, eᶻ⁻ᵐ [M, V];  the caller's scalars a row;
                     kept_gradient -> ∂z over eᶻ⁻ᵐ;  ∂weight += ∂zᵀ hidden;  ∂hidden = ∂z weight                  6NDV
                 ->  scatter_rows

The products after the gradient kernels are cuBLAS's, accumulated in float32. Memory: `budget` bytes for ∂z and the
float32 ∂weight tile (or eᶻ⁻ᵐ and the float32 ∂weight sum), besides the contributing rows of hidden and float32
∂hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo_kernels.compact_rows import compact_rows
from fastppo_kernels.gather_rows import gather_rows
from fastppo_kernels.kept_gradient import kept_gradient
from fastppo_kernels.launch import ceilings, interpreted_dtype
from fastppo_kernels.linear_divergence import linear_divergence
from fastppo_kernels.linear_jsd import linear_jsd
from fastppo_kernels.linear_statistics import Kept, kept_stride, linear_statistics
from fastppo_kernels.logit_gradient import Head, RowScalars, logit_gradient
from fastppo_kernels.scatter_rows import scatter_rows
from fastppo_kernels.tile import transform_factors
from fastppo_kernels.tiling import ROW_MULTIPLE, Problem, Tiling, choose, cut, tile_of_columns


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
    block, width = tile_of_columns(num_rows, vocab, dim if need_weight else 0, compute_dtype.itemsize, budget)
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


def choose_tiling(hidden: Tensor, weight: Tensor, unit: int, compute_dtype: torch.dtype, budget: int) -> Tiling:
    """How a loss of these tensors is computed: by `statistics` and `vjp`, or, if `whole`, by `row_chunks`."""
    itemsize = interpreted_dtype(compute_dtype).itemsize
    problem = Problem(hidden.shape[0], *weight.shape, itemsize, weight.element_size(), unit)
    return choose(problem, budget, ceilings(hidden.device))


def row_chunks(
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
    unit: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [4, N] as of `statistics`, and ∂hidden, ∂weight, ∂bias as of `vjp`, with the logits computed once.

    Args:
        row_scalars: (statistics [4, N], whose rows up to the slice's end are there, slice of rows) -> d_logprobs and
            d_entropy of those rows, float32; d_entropy is None where the loss has no such term.
        chunk: rows that may be real in a chunk; unit: consecutive rows that must stay together. See `choose_tiling`.
    """
    compute_dtype = interpreted_dtype(compute_dtype)
    (vocab, dim), device, num_rows = weight.shape, hidden.device, hidden.shape[0]
    targets, factors = targets.contiguous(), transform_factors(temperature, logit_scale, softcap)
    statistics_out = torch.zeros(4, num_rows, dtype=torch.float32, device=device)
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=device)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=device)
    d_bias = torch.empty(vocab if need_bias else 0, dtype=bias.dtype if need_bias else weight.dtype, device=device)

    real = _real_rows(targets, unit)
    spans = [(first, last) for first, last in cut(real, chunk) if any(real[first:last])]
    if not spans:
        return statistics_out, d_hidden, d_weight.zero_(), d_bias.zero_()
    most = max(_padded(sum(real[first:last]), (last - first) * unit) for first, last in spans)
    memory = torch.empty(most * kept_stride(vocab), dtype=compute_dtype, device=device)
    products_weight = weight.to(compute_dtype) if need_hidden else weight
    scaled = compute_dtype == torch.float16
    in_place = d_weight.dtype == torch.float32 or (len(spans) == 1 and d_weight.dtype == compute_dtype and not scaled)
    sums = d_weight if in_place or not need_weight else torch.empty_like(d_weight, dtype=torch.float32)
    bias_sums = torch.zeros_like(d_bias, dtype=torch.float32)

    for number, (first, last) in enumerate(spans):
        span = slice(first * unit, min(last * unit, num_rows))
        here = targets[span]
        rows, count = compact_rows(here)
        num_real = _padded(sum(real[first:last]), here.numel())
        kept = Kept.make(memory, here.numel(), weight, softcap=factors["softcap"])
        part = linear_statistics(
            _unit_stride(hidden[span]), weight, bias, here, rows, count, compute_dtype=compute_dtype, kept=kept,
            **factors,
        )  # fmt: skip
        statistics_out[:, span] = part
        upstream = [None if g is None else g.float().contiguous() for g in row_scalars(statistics_out, span)]
        scale = _power_of_two_scale(upstream) if scaled else None
        dz = kept_gradient(
            kept, rows, count, here, part, *upstream, num_rows=num_real, vocab=vocab, scale=scale, **factors
        )
        if need_weight:
            hidden_rows = gather_rows(_unit_stride(hidden[span]), rows, count, compute_dtype)[:num_real]
            _add_scaled_product(sums, dz.t(), hidden_rows, scale, accumulate=number > 0)
        if need_bias:
            d_bias_chunk = dz.sum(0, dtype=torch.float32)
            bias_sums += d_bias_chunk if scale is None else d_bias_chunk / scale
        if need_hidden:
            d_rows = torch.empty(num_real, dim, dtype=torch.float32, device=device)
            _add_scaled_product(d_rows, dz, products_weight, scale, accumulate=False)
            scatter_rows(d_rows, rows, count, d_hidden[span])
    if need_weight and not in_place:
        d_weight.copy_(sums)
    return statistics_out, d_hidden, d_weight, d_bias.copy_(bias_sums)


def _real_rows(targets: Tensor, unit: int) -> list[int]:
    """How many targets of each `unit` consecutive rows are tokens; all of them where the host may not ask."""
    num_rows = targets.numel()
    units = -(-num_rows // unit)
    if targets.is_meta or (targets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return [min(unit, num_rows - first * unit) for first in range(units)]
    padded = torch.nn.functional.pad(targets, (0, units * unit - num_rows), value=-1)
    return (padded.view(units, unit) >= 0).sum(1).tolist()


def _padded(count: int, most: int) -> int:
    """Rounded up to ROW_MULTIPLE, at most the number of rows there are."""
    return min(most, -(-count // ROW_MULTIPLE) * ROW_MULTIPLE)


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
            # On the stream of the copy: the current device may be another than the tensors'.
            self._event.record(torch.cuda.current_stream(count.device))

    def padded(self) -> int:
        if self._count is None:
            return self._most
        if self._event is not None:
            self._event.synchronize()
        return _padded(int(self._count), self._most)


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


def _add_scaled_product(out: Tensor, a: Tensor, b: Tensor, scale: Tensor | None, *, accumulate: bool) -> None:
    """`_product` of an `a` that was multiplied by `scale`, in float32; without a sum, out may have a's own dtype."""
    if scale is not None:
        product = torch.empty_like(out)
        _product(product, a, b, accumulate=False)
        out.add_(product.div_(scale)) if accumulate else out.copy_(product.div_(scale))
    elif out.dtype == a.dtype and not accumulate:
        torch.mm(a, b, out=out)
    else:
        _product(out, a, b, accumulate=accumulate)


def _power_of_two_scale(upstream: list[Tensor | None]) -> Tensor:
    """[1] float32 that lifts the greatest upstream scalar to about 1, as float16 has few exponents; exact to undo."""
    greatest = torch.stack([g.abs().max() for g in upstream if g is not None]).max()
    return torch.exp2(-torch.log2(greatest).floor()).where(torch.isfinite(greatest) & (greatest > 0), 1.0).reshape(1)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
