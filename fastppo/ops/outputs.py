"""What the operators return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogprobOutput(NamedTuple):
    """Per-token statistics of a model's next-token distribution; fields have the shape of `targets`, float32.

    Attributes:
        logprobs: log p(target), at most 0; −∞ where the target's logit is −∞, 0 where the target is ignored.
        entropy: Σ_v −p_v log p_v in nats, in [0, ln V]; None unless asked for.
        logsumexp: log Σ_v exp z_v of the transformed logits.
    """

    logprobs: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


class PPOLossOutput(NamedTuple):
    """The PPO loss and what it saw.

    Attributes:
        loss: scalar; `loss.backward()` reaches what the loss was computed from.
        logprobs: log p(target) now, shape of `targets`, detached; −∞ where the target's logit is −∞, 0 where masked.
        entropy: nats, shape of `targets`, detached; None if it was not computed.
        metrics: detached 0-dim tensors; see `fastppo.reference.clipped_loss`.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]


class FisherOutput(NamedTuple):
    """A Fisher matrix times a direction, as the vector that reverse mode carries on; every field is detached.

    Attributes:
        hidden: [..., D] in the dtype of `hidden`; 0 where masked.
        weight: [V, D] in the dtype of `weight`; None without a direction for the weight.
        bias: [V] in the dtype of `bias`; None without a direction for the bias.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
