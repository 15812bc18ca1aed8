"""Per-token log-probability and entropy from hidden states, with any upstream gradient.

forward   hidden [N, D], weight [V, D]  ->  logprobs, entropy, logsumexp [N]        2NDV, nothing saved of size V
backward  upstream scalars a row        ->  ∂hidden, ∂weight, ∂bias                 6NDV, logits recomputed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastppo.ops import reference
from fastppo.ops.checks import checked
from fastppo.ops.head import IGNORED, open_head, open_options, open_slices, open_targets
from fastppo.ops.linear_statistics import LinearStatistics
from fastppo.ops.outputs import LogprobOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@checked
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> LogprobOutput:
    """log p(target) under softmax(transform(hidden @ weight.T + bias)), without materializing the logits.

    Args:
        hidden: [..., D] float32, bfloat16 or float16; the state that predicts the target, so already shifted by one.
        weight: [V, D], the lm_head; bias: [V].
        targets: [...] int64 or int32 token ids, or `ignore_index`.
        temperature, logit_scale, softcap: transform(x) = softcap · tanh(logit_scale · x / softcap) / temperature.
        return_entropy: also the entropy of the whole distribution, in nats.
        group: the ranks that hold the vocabulary's rows between them, in rank order; weight (and bias) then are this
            rank's slice, of any size, or a DTensor of Shard(0) over the group, and every rank gives the same tokens.
            ∂hidden is summed over the ranks. Without a group a DTensor weight is gathered, and its gradient averaged
            over the mesh as FSDP2 does.
        backend: None chooses by device; see `fastppo doctor`.

    Returns:
        LogprobOutput of float32 tensors [...]. All three are differentiable with respect to hidden, weight and bias.
        Ignored rows give zeros and cost nothing. A target with a logit of −∞ has a log-probability of −∞; everything
        else, gradients included, stays finite, as with torch.log_softmax.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that don't go together; a target outside the vocabulary.
    """
    head = open_head(hidden, weight, bias, group=group)
    slices = open_slices(head, group)
    rows = open_targets(targets, hidden, head, ignore_index, slices)
    options = open_options("linear_logprob", backend, hidden, temperature, logit_scale, softcap, slices)
    if options.backend == "reference":
        z = reference.logits(*head, options.transform, rows != IGNORED)
        out = reference.logprob(z, rows, ignore_index=IGNORED, return_entropy=return_entropy)
        logprobs, entropy, logsumexp = out
    else:
        logprobs, entropy, logsumexp, _ = LinearStatistics.apply(*head, rows, None, "", options, slices)
    shape = targets.shape
    return LogprobOutput(logprobs.view(shape), entropy.view(shape) if return_entropy else None, logsumexp.view(shape))
