"""Per-token log-probability and entropy from logits that are already there, with the backward in place on request.

forward   one read of logits [N, V], a block of rows at a time in float32        ->  logprobs, entropy, logsumexp [N]
          and of a reference model's, where `ppo_loss` wants the exact divergence  ->  KL(p ‖ q) [N]
backward  one read, one write of ∂logits [N, V] in the logits' own dtype: in their own memory on request
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.engines import cpu, extension, triton_kernels
from fastppo.engines.budget import scratch_bytes
from fastppo.engines.chunked import VERY_NEGATIVE
from fastppo.engines.dispatch import select
from fastppo.engines.transform import LogitTransform, check_transform
from fastppo.ops import reference
from fastppo.ops.checks import check_floating, check_shape, check_targets
from fastppo.ops.head import IGNORED
from fastppo.ops.outputs import LogprobOutput


def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> LogprobOutput:
    """log p(target) under softmax(transform(logits)).

    Args:
        logits: [..., V] float32, bfloat16 or float16; row t predicts targets[t], so already shifted by one.
        targets: [...] int64 or int32 token ids, or `ignore_index`.
        temperature, logit_scale, softcap: transform(x) = softcap · tanh(logit_scale · x / softcap) / temperature.
        return_entropy: also the entropy of the whole distribution, in nats.
        inplace_backward: the backward writes ∂logits over the logits, which nothing else may need any more.

    Returns:
        LogprobOutput of float32 tensors [...]; all three are differentiable. Ignored rows give zeros.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that don't go together; a target outside the vocabulary.
    """
    logprobs, entropy, logsumexp, _ = selective(
        "selective_logprob",
        logits,
        None,
        targets,
        transform=check_transform(temperature, logit_scale, softcap),
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return LogprobOutput(logprobs, entropy if return_entropy else None, logsumexp)


def selective(
    op: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform,
    ignore_index: int,
    inplace_backward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logprobs, entropy, logsumexp, KL(p ‖ q) or None), of the shape of `targets`, after all checks.

    Args:
        op: the operator's name in `dispatch.BACKENDS`.
        ref_logits: [..., V] of q, a constant; the transform applies to both. The others: see `selective_logprob`.
    """
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with V > 0, got {tuple(logits.shape)}")
    check_targets(targets, tuple(logits.shape[:-1]), logits.shape[-1], logits.device, ignore_index)
    if ref_logits is not None:
        check_floating("ref_logits", ref_logits, logits.device)
        check_shape("ref_logits", ref_logits, tuple(logits.shape), "like logits")
        ref_logits = ref_logits.detach().reshape(-1, logits.shape[-1])
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("inplace_backward: expected contiguous logits; call .contiguous() on them or leave it off")
    rows = targets.reshape(-1).long()
    rows = rows.masked_fill(rows == ignore_index, IGNORED)
    flat = logits.reshape(-1, logits.shape[-1])
    backend = select(op, logits.device, logits.dtype, backend)
    if backend == "reference":
        padding = (rows == IGNORED).unsqueeze(1)
        z = transform.apply(reference.upcast(flat).masked_fill(padding, 0.0))
        out = reference.logprob(z, rows, ignore_index=IGNORED, return_entropy=True)
        kl = None
        if ref_logits is not None:
            ref_z = transform.apply(reference.upcast(ref_logits).masked_fill(padding, 0.0))
            kl = reference.exact_kl(z, ref_z).masked_fill(padding.squeeze(1), 0.0)
    else:
        *out, kl = _SelectiveLogprob.apply(flat, ref_logits, rows, transform, inplace_backward, backend)
    logprobs, entropy, logsumexp = (x.view(targets.shape) for x in out)
    return logprobs, entropy, logsumexp, None if kl is None else kl.view(targets.shape)


class _SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        ref_logits: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        inplace_backward: bool,
        backend: str,
    ):
        saved = _statistics(logits, ref_logits, targets, *transform, scratch_bytes(logits.device), backend)
        ctx.save_for_backward(logits, ref_logits, targets, *saved)
        ctx.transform, ctx.inplace_backward, ctx.backend = transform, inplace_backward, backend
        ctx.set_materialize_grads(False)
        logprobs, entropy, row_max, log_sum, *divergence = saved
        kl = divergence[0].clone() if divergence else None
        return logprobs.clone(), entropy.clone(), row_max + log_sum, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        logits, *rest = ctx.saved_tensors
        ref_logits, targets, *saved = rest
        options = (*ctx.transform, scratch_bytes(logits.device), ctx.backend)
        if ctx.inplace_backward:
            logits = logits.detach()
            _vjp_(logits, ref_logits, targets, saved, *upstream, *options)
            return logits, None, None, None, None, None
        return _vjp(logits, ref_logits, targets, saved, *upstream, *options), None, None, None, None, None


@torch.library.custom_op("fastppo::selective_statistics", mutates_args=())
def _statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
    backend: str,
) -> list[Tensor]:
    """logits [N, V], targets [N] -> logprobs, entropy, row_max, log_sum [N]; zeros where the target is negative.

    With ref_logits [N, V] also kl, kl_center, ref_row_max, ref_log_sum.
    """
    transform = LogitTransform(temperature, logit_scale, softcap)
    if backend == "triton":
        return triton_kernels.selective.statistics(logits, ref_logits, targets, *transform)
    out = reference.upcast(logits.new_zeros(0)).new_zeros(4 if ref_logits is None else 8, targets.numel())
    if ref_logits is None and _in_cpp(logits, backend):
        rows = (targets >= 0).nonzero().squeeze(-1)
        numbers = cpu.transform_numbers(transform)
        extension.load().selective_statistics(
            logits.detach(), numbers, rows, targets, out, torch.get_num_threads(), cpu.isa
        )
        return [x.clone() for x in out]
    for rows, z, ref_z in _blocks(logits, ref_logits, targets, transform, budget):
        out[2, rows], out[3, rows] = _log_softmax_(z)
        log_p, p = z, z.exp()
        out[0, rows] = log_p.gather(1, targets[rows].unsqueeze(1)).squeeze(1).clamp(max=0.0)
        out[1, rows] = -reference.expectation(p, log_p)
        if ref_z is not None:
            out[6, rows], out[7, rows] = _log_softmax_(ref_z)
            kl = reference.expectation(p, log_p - ref_z)
            out[4, rows], out[5, rows] = kl.clamp(min=0.0), kl
    return [x.clone() for x in out]


@_statistics.register_fake
def _(logits, ref_logits, targets, *_options):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return [logits.new_empty(targets.shape, dtype=dtype) for _ in range(4 if ref_logits is None else 8)]


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    transform: LogitTransform,
    budget: int,
    backend: str,
) -> None:
    """∂logits into `out`, which may be the logits themselves."""
    if backend == "triton":
        triton_kernels.selective.vjp_into(out, logits, ref_logits, targets, saved, *upstream, *transform)
        return
    d_kl = upstream[3]
    if d_kl is None and _in_cpp(logits, backend):
        rows = (targets >= 0).nonzero().squeeze(-1)
        scalars = cpu.row_scalars(rows, saved[:4], upstream)
        numbers = cpu.transform_numbers(transform)
        extension.load().selective_gradients(
            logits.detach(), numbers, rows, targets, scalars, out, torch.get_num_threads(), cpu.isa
        )
        out[targets < 0] = 0.0
        return
    zero = torch.zeros_like(saved[0])
    d_logprobs, d_entropy, d_logsumexp = (zero if g is None else g for g in upstream[:3])
    entropy, row_max, log_sum = saved[1:4]
    a = d_logsumexp - d_logprobs - d_entropy * entropy
    for rows, z, ref_z in _blocks(logits, None if d_kl is None else ref_logits, targets, transform, budget):
        capped = z.clone() if transform.softcap is not None else z
        log_p = z.sub_(row_max[rows].unsqueeze(1)).sub_(log_sum[rows].unsqueeze(1))
        p = log_p.exp()
        dz = a[rows].unsqueeze(1) * p
        if upstream[1] is not None:
            dz -= d_entropy[rows].unsqueeze(1) * (p * log_p.masked_fill(p == 0, 0.0))
        if ref_z is not None:
            _log_softmax_(ref_z)
            difference = (log_p - ref_z).sub_(saved[5][rows].unsqueeze(1))
            dz += d_kl[rows].unsqueeze(1) * (p * difference.masked_fill_(p == 0, 0.0))
        dz.scatter_add_(1, targets[rows].unsqueeze(1), d_logprobs[rows].unsqueeze(1))
        out[rows] = transform.backward_(dz, capped).to(out.dtype)
    out[targets < 0] = 0.0


@torch.library.custom_op("fastppo::selective_vjp", mutates_args=())
def _vjp(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
    backend: str,
) -> Tensor:
    out = torch.empty_like(logits)
    transform = LogitTransform(temperature, logit_scale, softcap)
    upstream = [d_logprobs, d_entropy, d_logsumexp, d_kl]
    _write_gradient(out, logits, ref_logits, targets, saved, upstream, transform, budget, backend)
    return out


@_vjp.register_fake
def _(logits, *_args):
    return torch.empty_like(logits)


@torch.library.custom_op("fastppo::selective_vjp_", mutates_args=("logits",))
def _vjp_(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
    backend: str,
) -> None:
    transform = LogitTransform(temperature, logit_scale, softcap)
    upstream = [d_logprobs, d_entropy, d_logsumexp, d_kl]
    _write_gradient(logits, logits, ref_logits, targets, saved, upstream, transform, budget, backend)


@_vjp_.register_fake
def _(logits, *_args):
    return None


def _in_cpp(logits: Tensor, backend: str) -> bool:
    """The extension reads whole rows, and no float64."""
    return backend == "cpu" and logits.dtype != torch.float64 and (logits.shape[1] == 1 or logits.stride(1) == 1)


def _blocks(
    logits: Tensor, ref_logits: Tensor | None, targets: Tensor, transform: LogitTransform, budget: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(row indices, transformed logits [R, V] in float32, the reference's) for the rows with a target, R at a time."""
    rows = (targets >= 0).nonzero().squeeze(-1)
    # Four float32 buffers [R, V] are alive at the widest point of the backward, six with a reference.
    block = max(1, budget // ((16 if ref_logits is None else 24) * logits.shape[1]))
    for start in range(0, rows.numel(), block):
        index = rows[start : start + block]
        z, ref_z = (None if x is None else transform.apply_(reference.upcast(x[index])) for x in (logits, ref_logits))
        yield index, z, ref_z


def _log_softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [R, V] becomes log p, in place; returns row_max and log_sum [R].

    A logit far below its row's maximum counts as VERY_NEGATIVE below, so that no −inf meets another.
    """
    row_max = z.amax(1)
    z.sub_(row_max.unsqueeze(1)).clamp_(min=VERY_NEGATIVE)
    log_sum = z.exp().sum(1).log()
    z.sub_(log_sum.unsqueeze(1))
    return row_max, log_sum
