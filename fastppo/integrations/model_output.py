"""What a patched model returns. Apart from `patch_model`, so that `fastppo.patch_model` can be named without
transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class CausalLMLogprobs(ModelOutput):
    """What ``model(..., labels=labels, return_logprobs=True)`` returns; 0 where the label is -100.

    The loss comes first, where transformers' own Trainer looks for it in a tuple.
    """

    loss: Tensor | None = None
    """Scalar float32: −log p summed over the labels / their number (or `num_items_in_batch`), plus the aux_loss."""
    logprobs: Tensor | None = None
    """[B, T - 1] float32 log-probabilities of the labels ([B, T] with `shift_labels`)."""
    entropy: Tensor | None = None
    """[B, T - 1] float32 entropy of the whole distribution, in nats, differentiable."""
    label_mask: Tensor | None = None
    """[B, T - 1] bool: where there is a label."""
    aux_loss: Tensor | None = None
    """Scalar: the load-balancing loss of a mixture of experts; None unless its router logits were requested."""
