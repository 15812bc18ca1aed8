"""The operators of fastppo.ops, called with an `LMHead`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastppo.models.head import LMHead
from fastppo.ops.linear_kl import linear_kl


def head_arguments(head: LMHead, temperature: float, backend: str | None) -> dict[str, Any]:
    """How a head makes logits of hidden states: keyword arguments that all operators take."""
    return {
        "weight": head.weight,
        "bias": head.bias,
        "temperature": temperature,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "backend": backend,
    }


def kl_from(
    source_hidden: Tensor,
    source: LMHead,
    hidden: Tensor,
    head: LMHead,
    mask: Tensor,
    temperature: float,
    backend: str | None,
) -> Tensor:
    """KL(source ‖ π) [b, T] over the whole vocabulary, in nats, 0 on padding; differentiable in π = (hidden, head).

    Args:
        source_hidden, hidden: [b, T, D] states of the same tokens under either policy.
        mask: [b, T] bool, True for a sampled token.
    """
    reference = {"ref_hidden": source_hidden, "ref_weight": source.weight, "ref_bias": source.bias}
    return linear_kl(hidden, kind="forward", mask=mask, **reference, **head_arguments(head, temperature, backend))
