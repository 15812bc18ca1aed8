"""Statistics and gradients from logits that are already there: the two kernels behind `selective_logprob`."""

from __future__ import annotations

from torch import Tensor

from fastppo_kernels.selective_gradient import selective_gradient
from fastppo_kernels.selective_statistics import selective_statistics
from fastppo_kernels.tile import transform_factors


def statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """logits [N, V], targets [N] int64 -> logprobs, entropy, row_max, log_sum [N] float32; zeros where target < 0.

    With ref_logits [N, V] also kl(p ‖ q), kl_center, ref_row_max, ref_log_sum.
    """
    factors = transform_factors(temperature, logit_scale, softcap)
    return list(selective_statistics(_rows(logits), _rows(ref_logits), targets.contiguous(), **factors).unbind(0))


def vjp_into(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """∂logits into out [N, V], last dimension contiguous, which may be the logits themselves.

    Args:
        saved: what `statistics` returned for the same arguments.
        d_logprobs, d_entropy, d_logsumexp, d_kl: upstream scalars [N], or None where that term is absent.
    """
    upstream = tuple(None if g is None else g.float().contiguous() for g in (d_logprobs, d_entropy, d_logsumexp, d_kl))
    factors = transform_factors(temperature, logit_scale, softcap)
    reference = None if d_kl is None else _rows(ref_logits)
    selective_gradient(_rows(logits), reference, targets.contiguous(), saved, upstream, out, **factors)


def _rows(logits: Tensor | None) -> Tensor | None:
    return logits if logits is None or logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
