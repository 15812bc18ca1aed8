"""OpenRLHF (github.com/OpenRLHF/OpenRLHF): its log-probabilities, entropy, KL and losses, computed by fastppo.

    import fastppo.integrations.openrlhf as fastppo_openrlhf

    fastppo_openrlhf.patch()       # in every process that trains: see docs/integrations.md

The functions and classes have OpenRLHF's names, parameters and results, and can be used without it. What differs, on
purpose:
- log-probabilities and entropies are float32 whatever the logits are (float64 for float64), at most and at least 0,
  and `temperature` leaves the caller's logits as they were;
- padding gives 0, and whatever stands there, NaN included, reaches no loss; no token at all gives a loss of 0;
- masks are True or False: any other number counts as True.
B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastppo import ppo_loss, reference, selective_logprob, value_loss
from fastppo.integrations.patching import Patch

SUPPORTED = ">=0.11.2,<0.12"


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(label) under softmax(logits / temperature): logits [..., V], labels [...]; 0 where a label is -100."""
    return selective_logprob(logits, labels, temperature=temperature).logprobs


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, [...], of softmax(logits [..., V]); no copy of the logits is made."""
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return selective_logprob(logits, any_target, return_entropy=True).entropy


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """k1, k2 or k3 (Schulman, 2020) between -10 and 10, float32; k3 keeps its digits where the two are close.

    With `unbiased_gradient` the value stays, and the gradient becomes that of k2 times the importance weight
    π / π_old, at most 10 (1 without log_probs_old): that of the KL itself.
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {kl_estimator!r}")
    log_ratio = log_probs.float() - log_probs_base.float()
    zero = torch.zeros_like(log_ratio)
    # A k3 beyond the cap of 10 needs no gradient, and one of e^60 would leave a NaN.
    bounded = log_ratio.clamp(min=-10.0) if kl_estimator == "k3" else log_ratio
    value = reference.sampled_kl(bounded, zero, kl_estimator).clamp(-10.0, 10.0)
    if not unbiased_gradient:
        return value
    straight_through = reference.sampled_kl(log_ratio, zero, "k2")
    if log_probs_old is not None:
        weight = (log_probs.detach().float() - log_probs_old.detach().float()).exp().clamp(max=10.0)
        straight_through = weight * straight_through
    return value.detach() + (straight_through - straight_through.detach())


class PolicyLoss(torch.nn.Module):
    """PPO's clipped loss or GSPO's, with dual clip, and the correction for sampling with another engine.

    The correction (`is_correction_level` token or seq) weighs each token by π_old / π_rollout, where π_rollout is the
    engine that sampled. `is_correction_gating` says what is compared with `is_correction_threshold` = (low, high):
    that ratio, or the binary KL or the total variation of the sampled token between the two; `is_correction_mode`
    whether what lies outside is dropped ("mask") or clamped ("clip").

    Raises:
        ValueError: an option out of its range, or options that don't go together.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError("is_correction_mode: clip needs is_correction_level=token and is_correction_gating=ratio")
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold: expected (0, bound) for is_correction_gating={is_correction_gating}, "
                f"got {tuple(is_correction_threshold)}"
            )
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.policy_loss_type = policy_loss_type
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"  # GSPO is a mean over sequences
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All tensors [B, T]; the last three arguments are those of the whole batch over all ranks.

        Returns:
            (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio): the tokens that the clip struck, k1 between the
            policies now and before, k1 between the sampling engine and the policy, and what the correction filtered;
            the last two None unless policy_loss_type is ppo and the correction is on.
        """
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            raise ValueError(f"rollout_log_probs: needed for is_correction_level={self.is_correction_level!r}")
        mask = _mask(action_mask, log_probs)
        if self.policy_loss_type == "ppo":
            log_ratio = (log_probs - old_log_probs.detach()).clamp(-20.0, 20.0)
        else:
            log_ratio = log_probs - (rollout_log_probs if corrected else old_log_probs).detach()
        options = {
            "mask": mask,
            "clip_low": self.clip_eps_low,
            "clip_high": self.clip_eps_high,
            "dual_clip": self.dual_clip,
            "ratio_level": "token" if self.policy_loss_type == "ppo" else "sequence-geometric",
            "loss_agg": _loss_agg(self.token_level_loss),
        }
        # The log-ratio goes in as log-probabilities with old ones of 0: it is bounded here, more tightly than there.
        zero = torch.zeros_like(log_ratio)
        vllm_kl = is_filter_ratio = None
        if corrected and self.policy_loss_type == "ppo":
            # A weight of at least 0 commutes with min and clip, so it goes into the advantage.
            weight, is_filter_ratio = self._correction(old_log_probs, rollout_log_probs, mask)
            vllm_kl = _masked_mean((rollout_log_probs - old_log_probs).detach(), mask)
            out = ppo_loss(zero, advantages * weight, logprobs=log_ratio, **options)
            # A weight of 0 would hide which tokens the clip struck.
            metrics = ppo_loss(zero, advantages, logprobs=log_ratio.detach(), **options).metrics
        else:
            out = ppo_loss(zero, advantages, logprobs=log_ratio, **options)
            metrics = out.metrics
        loss = out.loss * _share(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        ppo_kl = _masked_mean((old_log_probs - log_probs).detach(), mask)
        return loss, metrics["clip_fraction"], ppo_kl, vllm_kl, is_filter_ratio

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each token [B, T], and the fraction of tokens, or of sequences, that lay outside."""
        log_weight = old - rollout
        by_sequence = self.is_correction_level == "seq"
        if self.is_correction_gating == "ratio":
            statistic = (_sequence_mean(log_weight, mask) if by_sequence else log_weight).exp()
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            if self.is_correction_gating == "binary_kl":
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            else:
                statistic = (p - q).abs()
            statistic = _sequence_mean(statistic, mask) if by_sequence else statistic
        low, high = self.is_correction_threshold
        inside = (statistic >= low) & (statistic <= high)
        if self.is_correction_mode == "clip":
            weight = statistic.clamp(low, high)
        else:
            weight = torch.where(inside, log_weight.exp(), 0.0)
        outside = (~inside).to(weight.dtype)
        return weight, outside.mean() if by_sequence else _masked_mean(outside, mask)


class ValueLoss(torch.nn.Module):
    """½ max((v − R)², (clip(v, v_old ± clip_eps) − R)²), or ½ (v − R)² without `clip_eps`."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """All tensors [B, T]; the last three arguments are those of the whole batch over all ranks."""
        mask = _mask(action_mask, values)
        loss_agg = _loss_agg(self.token_level_loss)
        out = value_loss(
            values, returns, old_values=old_values, mask=mask, cliprange_value=self.clip_eps, loss_agg=loss_agg
        )
        return out.loss * _share(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)


_PATCH = Patch(
    "openrlhf",
    SUPPORTED,
    {
        "openrlhf.models.utils.log_probs_from_logits": log_probs_from_logits,
        "openrlhf.models.utils.compute_entropy": compute_entropy,
        "openrlhf.models.utils.compute_approx_kl": compute_approx_kl,
        "openrlhf.models.loss.PolicyLoss": PolicyLoss,
        "openrlhf.models.loss.ValueLoss": ValueLoss,
    },
)


def patch() -> None:
    """Put the functions and classes of this module in the place of OpenRLHF's, in this process.

    Raises:
        ImportError, RuntimeError: see `fastppo.integrations.patching.Patch.apply`.
    """
    _PATCH.apply()


def unpatch() -> None:
    """Put OpenRLHF's own back (RuntimeError: see `Patch.undo`)."""
    _PATCH.undo()


def patched() -> AbstractContextManager[None]:
    """`patch` for the length of a with-block."""
    return _PATCH.applied()


def _mask(action_mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if action_mask is None else action_mask.bool()


def _loss_agg(token_level_loss: bool) -> str:
    return "token-mean" if token_level_loss else "seq-mean-token-mean"


def _share(
    mask: Tensor,
    token_level_loss: bool,
    dp_size: int,
    batch_num_tokens: float | None,
    global_batch_size: float | None,
) -> Tensor | float:
    """What the mean over the tokens at hand [B, T] is multiplied by to be this rank's share of the whole batch's.

    As in OpenRLHF, `dp_size` counts only where the whole batch's number of tokens or sequences was given.
    """
    total = batch_num_tokens if token_level_loss else global_batch_size
    if total is None:
        return 1.0
    return (mask.sum() if token_level_loss else mask.any(-1).sum()) / total * dp_size


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]; NaN, which lies outside every interval, for a sequence without a token."""
    return x.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
