"""Exact divergence between two models over the whole vocabulary, from their hidden states.

forward   two products a tile, online sums of both softmaxes and of one's logits under the other     2NDV + 2ND'V
backward  both recomputed; gradients reach the first model only                                      6NDV + 2ND'V
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.ops import reference
from fastppo.ops.checks import check_mask, checked
from fastppo.ops.head import IGNORED, open_head, open_options, open_reference, open_slices
from fastppo.ops.linear_statistics import LinearStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@checked
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

    A token with a logit of −∞ counts as if its log-probability was −1e20: where the other model gives it mass, the
    divergence is huge, but finite.

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
    return LinearStatistics.apply(*head, targets, ref, kind, options, slices)[3].view(shape)
