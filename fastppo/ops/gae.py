"""Generalized advantage estimation over padded or packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engines.dispatch import ENGINES, select
from fastppo.ops import reference
from fastppo.ops.checks import NonFiniteValue, check_mask, check_shape, checked, first_true, looks_at_values


class GAEOutput(NamedTuple):
    """What `gae` returns: float32 (float64 for float64), shape of `rewards`, detached, 0 where masked.

    Attributes:
        advantages: A_t, whitened on request.
        returns: A_t + V_t, the value function's target.
    """

    advantages: Tensor
    returns: Tensor


@checked
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
    backend: str | None = None,
) -> GAEOutput:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438):

        delta_t = r_t + gamma V_{t+1} − V_t        A_t = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t

    No gradient flows: advantages and returns are constants of PPO's loss, and come back detached.

    Args:
        rewards: [B, T], or packed [N] together with `cu_seqlens`. float32, bfloat16, float16 or float64; any strides.
        values: V of the state in which each token was chosen; shape of `rewards`.
        gamma: discount, in [0, 1].
        lam: decay of the estimator, in [0, 1]: 0 is the one-step error, 1 the discounted return less the value.
        mask: bool (or 0/1), shape of `rewards`, True for a real token. Padding may stand anywhere and hold anything,
            NaN included: t + 1 is the next real token.
        dones: bool (or 0/1), shape of `rewards`, True where an episode ends: nothing flows back from beyond it.
        bootstrap: [B], or [S] for packed sequences: the value of the state after a row's last real token. 0 if not
            given; ignored where that token is done.
        cu_seqlens: [S + 1] int32 or int64: sequence s is the tokens cu_seqlens[s] … cu_seqlens[s + 1] − 1.
        whiten: also give the advantages mean 0 and variance 1 over all real tokens, as `fastppo.whiten` does, with the
            mean and variance gathered while they are computed where the backend can. The returns stay as they are.
        backend: `triton`, `cpu` or `reference`; see `fastppo.engines.dispatch`.

    Raises:
        TypeError: an argument that is no tensor, or has another dtype than it should.
        ValueError: another shape or device; gamma or lam out of range; on CPU tensors, cu_seqlens that do not cut N
            tokens into sequences, a reward, value or used bootstrap of a real token that is not finite, or advantages
            that overflow. On a GPU these values are checked with FASTPPO_CHECK=1, since that waits for the device.
    """
    shape = tuple(rewards.shape)
    check_shape("values", values, shape, "one for each reward")
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"rewards: expected [B, T], or packed [N] together with cu_seqlens, got {shape}")
        sequences = shape[0]
    else:
        if len(shape) != 1:
            raise ValueError(f"rewards: expected packed [N] to go with cu_seqlens, got {shape}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens: expected [S + 1], got {tuple(cu_seqlens.shape)}")
        sequences = cu_seqlens.numel() - 1
        if sequences == 0 and shape[0]:
            raise ValueError(f"cu_seqlens: expected to run from 0 to {shape[0]} (tokens in rewards), got no sequence")
    if mask is not None:
        mask = check_mask(mask, rewards)
    if dones is not None:
        dones = check_mask(dones, rewards, "dones", real=mask)
    if bootstrap is not None:
        check_shape("bootstrap", bootstrap, (sequences,), "one for each sequence")

    rewards, values = rewards.detach(), values.detach()
    if bootstrap is not None:
        bootstrap = bootstrap.detach()
        if bootstrap.dtype == torch.float64:
            bootstrap = bootstrap.to(_output_dtype(rewards, values))
    return GAEOutput(*_gae(rewards, values, mask, dones, bootstrap, cu_seqlens, gamma, lam, whiten, backend))


# One opaque operator: torch.compile need not look into the extension, its absence, or the reference's loop over time.
@torch.library.custom_op("fastppo::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    dtype = _output_dtype(rewards, values)
    chosen = select("gae", rewards.device, dtype, backend)
    if cu_seqlens is not None and looks_at_values(cu_seqlens):
        _check_cu_seqlens(cu_seqlens, rewards.numel())
    if rewards.numel() == 0:
        return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)
    arguments = (rewards, values, mask, dones, bootstrap, cu_seqlens, gamma, lam, whiten)
    engine = _reference if chosen == "reference" else ENGINES[chosen].gae
    advantages, returns, finite = engine(*arguments)
    if finite is None:
        finite = not looks_at_values(rewards) or bool(torch.isfinite(advantages).all())
    if not finite:
        raise NonFiniteValue(_what_is_not_finite(rewards, values, mask, bootstrap))
    return advantages, returns


@_gae.register_fake
def _(rewards, values, *_arguments):
    dtype = _output_dtype(rewards, values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _output_dtype(rewards: Tensor, values: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32


def _reference(rewards, values, mask, dones, bootstrap, cu_seqlens, gamma, lam, whiten) -> tuple[Tensor, Tensor, None]:
    """The loop over time; packed sequences are padded on the right for it, and packed again."""
    dtype = _output_dtype(rewards, values)
    rewards, values, bootstrap = (None if x is None else x.to(dtype) for x in (rewards, values, bootstrap))
    if cu_seqlens is None:
        advantages, returns = reference.gae(rewards, values, gamma, lam, mask, dones, bootstrap)
    else:
        lengths = cu_seqlens.diff()
        inside = torch.arange(int(lengths.max()), device=rewards.device) < lengths[:, None]  # [S, T]

        def pad(packed: Tensor | None) -> Tensor | None:
            return None if packed is None else packed.new_zeros(inside.shape).masked_scatter(inside, packed)

        real = inside if mask is None else pad(mask)
        out = reference.gae(pad(rewards), pad(values), gamma, lam, real, pad(dones), bootstrap)
        advantages, returns = (x[inside] for x in out)
    if whiten:
        mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
        advantages = reference.whiten(advantages, mask)
    return advantages, returns, None


def _check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        raise ValueError(f"cu_seqlens: expected to run from 0 to {tokens} (tokens in rewards), got {first} to {last}")
    if (cu_seqlens.diff() < 0).any():
        raise ValueError("cu_seqlens: expected non-decreasing offsets")


def _what_is_not_finite(rewards: Tensor, values: Tensor, mask: Tensor | None, bootstrap: Tensor | None) -> str:
    for name, tensor in (("rewards", rewards), ("values", values), ("bootstrap", bootstrap)):
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor)
        if mask is not None and name != "bootstrap":
            bad &= mask
        if (where := first_true(bad)) is not None:
            return f"{name}: expected finite values at real tokens, got {tensor[where].item()} at {where}"
    return f"rewards, values: too great, the advantages overflow {_output_dtype(rewards, values)}"
