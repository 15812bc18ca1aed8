"""How far a policy has moved from an earlier one, exactly: over the whole vocabulary, at the sampled states."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import Head, Learner
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.second_order.vectors import Vector
from fastppo.ops.linear_kl import linear_kl


@torch.no_grad()
def snapshot(learner: Learner, experience: Experience, parameters: Vector | None = None) -> tuple[Tensor, Head]:
    """The states [B, T, D] of the policy, by its own or other parameters, and its head (not copied)."""
    outputs = [learner.policy.hidden(batch, parameters) for batch in learner.micro_batches(experience)]
    return torch.cat([hidden for hidden, _ in outputs]), outputs[0][1]


def kl_from(
    source_hidden: Tensor,
    source: Head,
    hidden: Tensor,
    head: Head,
    *,
    mask: Tensor,
    temperature: float,
    backend: str | None,
) -> Tensor:
    """KL(source ‖ π) [b, T] in nats, 0 on padding, of a policy π (hidden [b, T, D], head), which gets the gradient."""
    return linear_kl(
        hidden,
        head.weight,
        source_hidden,
        source.weight,
        kind="forward",
        mask=mask,
        bias=head.bias,
        ref_bias=source.bias,
        temperature=temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        backend=backend,
    )
