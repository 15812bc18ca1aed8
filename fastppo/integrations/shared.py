"""The parts that verl's and OpenRLHF's functions have in common.

B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppo import ppo_loss, selective_logprob
from fastppo.ops.checks import ARGUMENTS, FLAGS, check_shape, tensor_of

_tensor = tensor_of(FLAGS, "a floating, integer or bool dtype")


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats, [...], of softmax(logits [..., V]); no copy of the logits is made."""
    ARGUMENTS["logits"]("logits", logits)
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return selective_logprob(logits, any_target, return_entropy=True).entropy


@contextlib.contextmanager
def callers_names(**names: str) -> Iterator[None]:
    """Errors of fastppo's operators by the names that the caller wrote: ``@callers_names(clip_low="clip_eps_low")``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        ours, colon, rest = str(error).partition(": ")
        if not colon or ours not in names:
            raise
        raise type(error)(f"{names[ours]}: {rest}") from None


def check_alike(optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """Tensors of the first one's shape, which PyTorch would broadcast; those in `optional` may be None."""
    (first, pattern), *_ = tensors.items()
    given = {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    for name, tensor in (tensors | given).items():
        _tensor(name, tensor)
        check_shape(name, tensor, pattern.shape, f"that of {first}")


def weighted_ppo_loss(
    log_ratio: Tensor, advantages: Tensor, weights: Tensor | None, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fastppo.ppo_loss` of log π / π_old [B, T], each token weighed by `weights` [B, T] ≥ 0; returns loss and metrics.

    The ratio is passed as log-probabilities with old ones of 0, since the libraries clamp it more tightly than
    `ppo_loss`.
    """
    old = torch.zeros_like(log_ratio)
    out = ppo_loss(old, advantages, logprobs=log_ratio, importance_weights=weights, **options)
    return out.loss, out.metrics


def replace_gradient(value: Tensor, source: Tensor) -> Tensor:
    """`value` with the gradient of `source`."""
    return value.detach() + (source - source.detach())


def batch_share(
    mask: Tensor,
    loss_agg: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor | float:
    """The factor that turns a loss aggregated over this rank's tokens into its part of the whole batch's loss.

    Args:
        mask: [B, T] bool. Sequences without a token do not count.
        loss_agg: the aggregation; token-sum expects a loss aggregated by token-mean.
        dp_size: number of ranks, whose gradients will be averaged.
        batch_num_tokens, global_batch_size: of the whole batch over all ranks; without them the loss stays local.
        loss_scale_factor: divides seq-mean-token-sum-norm instead of T.
    """
    by_token = loss_agg in ("token-mean", "token-sum")
    name, total = ("batch_num_tokens", batch_num_tokens) if by_token else ("global_batch_size", global_batch_size)
    total = 1 if loss_agg == "token-sum" else total
    if total is None and dp_size > 1:
        raise ValueError(f"{name}: needed when dp_size > 1")
    share = 1.0
    if total is not None:  # 0 where no rank has a token
        share = (mask.sum() if by_token else mask.any(-1).sum()) / torch.as_tensor(total).clamp(min=1) * dp_size
    if loss_agg == "seq-mean-token-sum-norm" and loss_scale_factor is not None:
        if not loss_scale_factor > 0:
            raise ValueError(f"loss_scale_factor: expected a number above 0, got {loss_scale_factor}")
        share = share * (mask.shape[-1] / loss_scale_factor)
    return share
