"""Per-token log-probability and entropy from logits that are already there, with the backward in place on request.

forward   one read of logits [N, V], a block of rows at a time in float32        ->  logprobs, entropy, logsumexp [N]
backward  one read, one write of ∂logits [N, V] in the logits' own dtype: in their own memory on request
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo import reference
from fastppo.ops import cpu, extension
from fastppo.ops.budget import scratch_bytes
from fastppo.ops.checks import check_floating, check_targets
from fastppo.ops.dispatch import select
from fastppo.ops.head import IGNORED
from fastppo.ops.outputs import LogprobOutput
from fastppo.ops.transform import LogitTransform, check_transform


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
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with V > 0, got {tuple(logits.shape)}")
    check_targets(targets, tuple(logits.shape[:-1]), logits.shape[-1], logits.device, ignore_index)
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("inplace_backward: expected contiguous logits; call .contiguous() on them or leave it off")
    transform = check_transform(temperature, logit_scale, softcap)
    rows = targets.reshape(-1).long()
    rows = rows.masked_fill(rows == ignore_index, IGNORED)
    flat = logits.reshape(-1, logits.shape[-1])
    backend = select("selective_logprob", logits.device, logits.dtype, backend)
    if backend == "reference":
        z = transform.apply(reference.upcast(flat).masked_fill((rows == IGNORED).unsqueeze(1), 0.0))
        out = reference.logprob(z, rows, ignore_index=IGNORED, return_entropy=return_entropy)
        logprobs, entropy, logsumexp = out
    else:
        logprobs, entropy, logsumexp = _SelectiveLogprob.apply(flat, rows, transform, inplace_backward, backend)
    shape = targets.shape
    return LogprobOutput(logprobs.view(shape), entropy.view(shape) if return_entropy else None, logsumexp.view(shape))


class _SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, transform: LogitTransform, inplace_backward: bool, backend: str):
        saved = _statistics(logits, targets, *transform, scratch_bytes(), backend)
        ctx.save_for_backward(logits, targets, *saved)
        ctx.transform, ctx.inplace_backward, ctx.backend = transform, inplace_backward, backend
        ctx.set_materialize_grads(False)
        logprobs, entropy, row_max, log_sum = saved
        return logprobs.clone(), entropy.clone(), row_max + log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy, d_logsumexp):
        logits, targets, *saved = ctx.saved_tensors
        arguments = (targets, saved, d_logprobs, d_entropy, d_logsumexp, *ctx.transform, scratch_bytes(), ctx.backend)
        if ctx.inplace_backward:
            logits = logits.detach()
            _vjp_(logits, *arguments)
            return logits, None, None, None, None
        return _vjp(logits, *arguments), None, None, None, None


@torch.library.custom_op("fastppo::selective_statistics", mutates_args=())
def _statistics(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
    backend: str,
) -> list[Tensor]:
    """logits [N, V], targets [N] -> logprobs, entropy, row_max, log_sum [N]; zeros where the target is negative."""
    transform = LogitTransform(temperature, logit_scale, softcap)
    out = reference.upcast(logits.new_zeros(0)).new_zeros(4, targets.numel())
    if _in_cpp(logits, backend):
        rows = (targets >= 0).nonzero().squeeze(-1)
        numbers = cpu.transform_numbers(transform)
        extension.load().selective_statistics(
            logits.detach(), numbers, rows, targets, out, torch.get_num_threads(), cpu.isa
        )
        return [x.clone() for x in out]
    for rows, z in _blocks(logits, targets, transform, budget):
        row_max = z.amax(1)
        z.sub_(row_max.unsqueeze(1))
        log_sum = z.exp().sum(1).log()
        log_p = z.sub_(log_sum.unsqueeze(1))
        out[0, rows] = log_p.gather(1, targets[rows].unsqueeze(1)).squeeze(1).clamp(max=0.0)
        out[1, rows] = -reference.expectation(log_p.exp(), log_p)
        out[2, rows], out[3, rows] = row_max, log_sum
    return [x.clone() for x in out]


@_statistics.register_fake
def _(logits, targets, *_options):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return [logits.new_empty(targets.shape, dtype=dtype) for _ in range(4)]


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    transform: LogitTransform,
    budget: int,
    backend: str,
) -> None:
    """∂logits into `out`, which may be the logits themselves."""
    if _in_cpp(logits, backend):
        rows = (targets >= 0).nonzero().squeeze(-1)
        scalars = cpu.row_scalars(rows, saved, (*upstream, None))
        numbers = cpu.transform_numbers(transform)
        extension.load().selective_gradients(
            logits.detach(), numbers, rows, targets, scalars, out, torch.get_num_threads(), cpu.isa
        )
        out[targets < 0] = 0.0
        return
    zero = torch.zeros_like(saved[0])
    d_logprobs, d_entropy, d_logsumexp = (zero if g is None else g for g in upstream)
    entropy, row_max, log_sum = saved[1:]
    a = d_logsumexp - d_logprobs - d_entropy * entropy
    for rows, z in _blocks(logits, targets, transform, budget):
        capped = z.clone() if transform.softcap is not None else z
        log_p = z.sub_(row_max[rows].unsqueeze(1)).sub_(log_sum[rows].unsqueeze(1))
        p = log_p.exp()
        dz = a[rows].unsqueeze(1) * p
        if upstream[1] is not None:
            dz -= d_entropy[rows].unsqueeze(1) * (p * log_p.masked_fill(p == 0, 0.0))
        dz.scatter_add_(1, targets[rows].unsqueeze(1), d_logprobs[rows].unsqueeze(1))
        out[rows] = transform.backward_(dz, capped).to(out.dtype)
    out[targets < 0] = 0.0


@torch.library.custom_op("fastppo::selective_vjp", mutates_args=())
def _vjp(
    logits: Tensor,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
    backend: str,
) -> Tensor:
    out = torch.empty_like(logits)
    transform = LogitTransform(temperature, logit_scale, softcap)
    _write_gradient(out, logits, targets, saved, [d_logprobs, d_entropy, d_logsumexp], transform, budget, backend)
    return out


@_vjp.register_fake
def _(logits, *_args):
    return torch.empty_like(logits)


@torch.library.custom_op("fastppo::selective_vjp_", mutates_args=("logits",))
def _vjp_(
    logits: Tensor,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
    backend: str,
) -> None:
    transform = LogitTransform(temperature, logit_scale, softcap)
    _write_gradient(logits, logits, targets, saved, [d_logprobs, d_entropy, d_logsumexp], transform, budget, backend)


@_vjp_.register_fake
def _(logits, *_args):
    return None


def _in_cpp(logits: Tensor, backend: str) -> bool:
    """The extension reads whole rows, and no float64."""
    return backend == "cpu" and logits.dtype != torch.float64 and (logits.shape[1] == 1 or logits.stride(1) == 1)


def _blocks(logits: Tensor, targets: Tensor, transform: LogitTransform, budget: int):
    """(row indices, transformed logits [R, V] in float32) for the rows with a target, R rows at a time."""
    rows = (targets >= 0).nonzero().squeeze(-1)
    # Four float32 buffers [R, V] are alive at the widest point of the backward.
    block = max(1, budget // (16 * logits.shape[1]))
    for start in range(0, rows.numel(), block):
        index = rows[start : start + block]
        yield index, transform.apply_(reference.upcast(logits[index]))
