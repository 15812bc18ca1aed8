"""Per-token log-probability and entropy from logits that are already there, with the backward in place on request.

forward   one read of logits [N, V], a block of rows at a time in float32        ->  logprobs, entropy, logsumexp [N]
          and of a reference model's, where `ppo_loss` wants the exact divergence  ->  KL(p ‖ q) [N]
backward  one read, one write of ∂logits [N, V] in the logits' own dtype: in their own memory on request
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.budget import scratch_bytes
from fastppo.engines.dispatch import ENGINES, select
from fastppo.engines.engine import Options, Upstream, regroup
from fastppo.engines.transform import LogitTransform
from fastppo.ops import reference
from fastppo.ops.checks import check_shape, check_targets, checked
from fastppo.ops.head import IGNORED
from fastppo.ops.once_differentiable import once_differentiable
from fastppo.ops.outputs import LogprobOutput


@checked
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
        LogprobOutput of float32 tensors [...]; all three are differentiable. Ignored rows give zeros; a target with a
        logit of −∞ has a log-probability of −∞, and everything else stays finite.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that don't go together; a target outside the vocabulary.
    """
    logprobs, entropy, logsumexp, _ = selective(
        "selective_logprob",
        logits,
        None,
        targets,
        transform=LogitTransform(temperature, logit_scale, softcap),
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
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with V > 0, got {tuple(logits.shape)}")
    check_targets(targets, tuple(logits.shape[:-1]), logits.shape[-1], ignore_index)
    if ref_logits is not None:
        check_shape("ref_logits", ref_logits, tuple(logits.shape), "like logits")
        ref_logits = ref_logits.detach().reshape(-1, logits.shape[-1])
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("inplace_backward: expected contiguous logits; call .contiguous() on them or leave it off")
    rows = targets.reshape(-1).long()
    if ignore_index != IGNORED:
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
        options = Options(transform, torch.float32, scratch_bytes(logits.device), backend)
        *out, kl = _SelectiveLogprob.apply(flat, ref_logits, rows, options, inplace_backward)
    logprobs, entropy, logsumexp = (x.view(targets.shape) for x in out)
    return logprobs, entropy, logsumexp, None if kl is None else kl.view(targets.shape)


class _SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options, inplace_backward: bool
    ):
        saved = _statistics(logits, ref_logits, targets, *options.flat())
        ctx.save_for_backward(logits, ref_logits, targets, *saved)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.set_materialize_grads(False)
        logprobs, entropy, row_max, log_sum, *divergence = saved
        kl = divergence[0].clone() if divergence else None
        return logprobs.clone(), entropy.clone(), row_max + log_sum, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        logits, ref_logits, targets, *saved = ctx.saved_tensors
        arguments = (ref_logits, targets, *upstream, *ctx.options.flat(), saved)
        if ctx.inplace_backward:
            logits = logits.detach()
            _vjp_(logits, *arguments)
            return logits, None, None, None, None
        return _vjp(logits, *arguments), None, None, None, None


@torch.library.custom_op(
    "fastppo::selective_statistics",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor? ref_logits, Tensor targets, {Options.SCHEMA}) -> Tensor[]",
)
def _statistics(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, *options) -> list[Tensor]:
    options = Options.of(*options)
    out = ENGINES[options.backend].selective_statistics(logits, ref_logits, targets, options)
    return [x.clone() for x in out]  # a custom operator's outputs may not share memory


@_statistics.register_fake
def _(logits, ref_logits, targets, *_options):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return [logits.new_empty(targets.shape, dtype=dtype) for _ in range(4 if ref_logits is None else 8)]


_GRADIENT = f"Tensor? ref_logits, Tensor targets, {Upstream.SCHEMA}, {Options.SCHEMA}, Tensor[] saved"


@torch.library.custom_op("fastppo::selective_vjp", mutates_args=(), schema=f"(Tensor logits, {_GRADIENT}) -> Tensor")
def _vjp(logits: Tensor, *arguments) -> Tensor:
    out = logits.new_empty(logits.shape)  # contiguous, whatever the logits are: engines write it row by row
    _write_gradient(out, logits, *arguments)
    return out


@torch.library.custom_op(
    "fastppo::selective_vjp_", mutates_args=("logits",), schema=f"(Tensor(a!) logits, {_GRADIENT}) -> ()"
)
def _vjp_(logits: Tensor, *arguments) -> None:
    _write_gradient(logits, logits, *arguments)


_vjp.register_fake(lambda logits, *_arguments: logits.new_empty(logits.shape))
_vjp_.register_fake(lambda *_arguments: None)


def _write_gradient(out: Tensor, logits: Tensor, ref_logits: Tensor | None, targets: Tensor, *rest) -> None:
    """∂logits into `out`, which may be the logits themselves."""
    upstream, options = regroup(rest, Upstream, Options)
    ENGINES[options.backend].selective_vjp(out, logits, ref_logits, targets, rest[-1], upstream, options)
