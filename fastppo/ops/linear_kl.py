"""Exact divergence between two models over the whole vocabulary, from their hidden states.

forward   two products a tile, online sums of both softmaxes and of one's logits under the other     2NDV + 2ND'V
backward  both recomputed; gradients reach the first model only                                      6NDV + 2ND'V
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import reference
from fastppo.ops.checks import check_mask
from fastppo.ops.head import IGNORED, Head, Options, open_head, open_options, open_slices
from fastppo.ops.linear_logprob import backward_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KINDS = ("reverse", "forward")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    kind: str = "reverse",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Per-token divergence [...] between p (hidden, weight) and q (ref_hidden, ref_weight), never negative, in nats.

    Args:
        hidden: [..., D], weight: [V, D], bias: [V]: the model that is trained.
        ref_hidden: [..., D'], ref_weight: [V, D'], ref_bias: [V]: the reference, held constant; D' may differ from D.
        kind: reverse is KL(p ‖ q) = Σ p (log p − log q); forward is KL(q ‖ p).
        mask: [...] bool, True for a real token; the others give 0 and cost nothing.
        temperature, logit_scale, softcap: of both models' logits.
        group: as in `linear_logprob`; both weights are then slices of the same rows.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or vocabularies that don't go together.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    head = open_head(hidden, weight, bias, group=group)
    ref = open_reference(hidden, head.weight, ref_hidden, ref_weight, ref_bias, group)
    shape = hidden.shape[:-1]
    mask = check_mask(mask, hidden.detach()[..., 0]).reshape(-1)
    slices = open_slices(head, group)
    options = open_options("linear_kl", backend, hidden, temperature, logit_scale, softcap, slices)
    if options.backend == "reference":
        z, ref_z = (reference.logits(*model, options.transform, mask) for model in (head, ref))
        divergence = reference.exact_kl(z, ref_z, kind)
        return divergence.masked_fill(~mask, 0.0).view(shape)
    targets = torch.where(mask, 0, IGNORED)
    return _LinearKL.apply(*head, targets, *ref, kind, options).view(shape)


def open_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    group: ProcessGroup | None = None,
) -> Head:
    """Check the reference model's head against the policy's."""
    ref = open_head(
        ref_hidden.detach(), ref_weight.detach(), ref_bias, prefix="ref_", device=hidden.device, group=group
    )
    ref = ref._replace(bias=None if ref.bias is None else ref.bias.detach())
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected {tuple(hidden.shape[:-1])} tokens like hidden, got {tuple(ref_hidden.shape[:-1])}"
        )
    if ref.weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected the same vocabulary as weight ({weight.shape[0]}), got {ref.weight.shape[0]}"
        )
    return ref


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kind: str, options: Options):
        head, ref = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
        saved = options.engine.statistics(*head, targets, *ref, kind, *options.flat())
        ctx.save_for_backward(*head, targets, *ref, *saved)
        ctx.kind, ctx.options = kind, options
        return saved[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kl):
        head, (targets, *rest) = Head(*ctx.saved_tensors[:3]), ctx.saved_tensors[3:]
        ref, saved = Head(*rest[:3]), list(rest[3:])
        gradients = backward_rows(ctx, head, targets, ref, ctx.kind, saved, (None, None, None, d_kl))
        return (*gradients, None, None, None, None, None, None)
