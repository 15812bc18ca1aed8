"""OpenRLHF (github.com/OpenRLHF/OpenRLHF): its log-probabilities, entropy, KL and losses, computed by fastppo.

    import fastppo.integrations.openrlhf as fastppo_openrlhf

    fastppo_openrlhf.patch()       # in every process that trains: see docs/integrations.md

Tested with OpenRLHF 0.11.2. `patch` replaces OpenRLHF's functions and classes (listed in `_PATCH`) in all of its
modules. Ours have the same names, parameters and results, and need no OpenRLHF. Intended differences:
- log-probabilities (at most 0) and entropies (at least 0) are float32 whatever the logits are, float64 for float64;
- `temperature` does not divide the caller's logits in place;
- padding gives 0, and values at padding, NaN included, reach no loss; without any token the loss is 0;
- masks are boolean: any number but 0 counts as True.
B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import reference, selective_logprob, value_loss
from fastppo.integrations.patching import Patch
from fastppo.integrations.shared import batch_share, callers_names, check_alike, replace_gradient, weighted_ppo_loss
from fastppo.integrations.shared import entropy_from_logits as compute_entropy
from fastppo.ops.checks import ARGUMENTS

SUPPORTED = ">=0.11.2,<0.12"


@callers_names(targets="labels")
def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(label) under softmax(logits / temperature): logits [..., V], labels [...]; 0 where a label is -100."""
    return selective_logprob(logits, labels, temperature=temperature).logprobs


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """k1, k2 or k3 (Schulman, 2020) clamped to [-10, 10], float32; k3 stays accurate where the two are close.

    With `unbiased_gradient` the value stays, and the gradient becomes that of k2 times the importance weight
    π / π_old, at most 10 (1 without log_probs_old): the gradient of the KL itself.
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {kl_estimator!r}")
    check_alike({"log_probs_old": log_probs_old}, log_probs=log_probs, log_probs_base=log_probs_base)
    log_ratio = log_probs.float() - log_probs_base.float()
    zero = torch.zeros_like(log_ratio)
    # k3 of e^60 would have a NaN gradient; beyond the cap of 10 it has none.
    bounded = log_ratio.clamp(min=-10.0) if kl_estimator == "k3" else log_ratio
    value = reference.sampled_kl(bounded, zero, kl_estimator).clamp(-10.0, 10.0)
    if not unbiased_gradient:
        return value
    weight = 1.0
    if log_probs_old is not None:
        weight = (log_probs.detach().float() - log_probs_old.detach().float()).exp().clamp(max=10.0)
    return replace_gradient(value, weight * reference.sampled_kl(log_ratio, zero, "k2"))


class PolicyLoss(torch.nn.Module):
    """PPO's clipped loss or GSPO's, with dual clip, and the correction for sampling with another engine.

    The correction (`is_correction_level` token or seq) weighs each token by π_old / π_rollout, where π_rollout is the
    engine that sampled. `is_correction_gating` names the statistic that is compared with `is_correction_threshold` =
    (low, high): that ratio, or the binary KL or the total variation of the sampled token between the two.
    `is_correction_mode` says whether tokens outside are dropped ("mask") or their weight is clamped ("clip").
    `token_level_loss` averages over tokens; otherwise over a sequence, then over the sequences that have a token.

    Raises:
        ValueError: an option is out of its range, or options contradict each other.
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
        if dual_clip is not None:
            ARGUMENTS["dual_clip"]("dual_clip", dual_clip)
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError("is_correction_mode: clip needs is_correction_level=token and is_correction_gating=ratio")
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold: expected (0, bound) for is_correction_gating={is_correction_gating}, "
                f"got {tuple(is_correction_threshold)}"
            )
        if is_correction_level != "off":
            try:
                low, high = is_correction_threshold
                ordered = low <= high
            except (TypeError, ValueError):
                ordered = False
            if not ordered:
                raise ValueError(
                    f"is_correction_threshold: expected (low, high), the low one first, got {is_correction_threshold!r}"
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
            (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio): fraction of clipped tokens, k1 between the old and the
            current policy, k1 between the sampling engine and the old policy, and the fraction that the correction
            filtered; the last two are None unless policy_loss_type is ppo and the correction is on.
        """
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            raise ValueError(f"rollout_log_probs: needed for is_correction_level={self.is_correction_level!r}")
        optional = {"action_mask": action_mask, "rollout_log_probs": rollout_log_probs}
        check_alike(optional, log_probs=log_probs, old_log_probs=old_log_probs)
        mask, loss_agg = _mask(action_mask, log_probs), _loss_agg(self.token_level_loss)
        weights = vllm_kl = is_filter_ratio = None
        if self.policy_loss_type == "gspo":
            log_ratio = log_probs - (rollout_log_probs if corrected else old_log_probs).detach()
        else:
            log_ratio = (log_probs - old_log_probs.detach()).clamp(-20.0, 20.0)
            if corrected:
                weights, is_filter_ratio = self._correction(old_log_probs, rollout_log_probs, mask)
                vllm_kl = _masked_mean((rollout_log_probs - old_log_probs).detach(), mask)
        with callers_names(logprobs="log_probs", clip_low="clip_eps_low", clip_high="clip_eps_high"):
            loss, metrics = weighted_ppo_loss(
                log_ratio,
                advantages,
                weights,
                mask=mask,
                clip_low=self.clip_eps_low,
                clip_high=self.clip_eps_high,
                dual_clip=self.dual_clip,
                ratio_level="token" if self.policy_loss_type == "ppo" else "sequence-geometric",
                loss_agg=loss_agg,
            )
        loss = loss * _share(mask, loss_agg, dp_size, batch_num_tokens, global_batch_size)
        ppo_kl = _masked_mean((old_log_probs - log_probs).detach(), mask)
        return loss, metrics["clip_fraction"], ppo_kl, vllm_kl, is_filter_ratio

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each token [B, T], and the fraction of tokens, or of sequences, outside the threshold."""
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
        check_alike({"action_mask": action_mask}, values=values)
        mask, loss_agg = _mask(action_mask, values), _loss_agg(self.token_level_loss)
        options = {"mask": mask, "cliprange_value": self.clip_eps, "loss_agg": loss_agg}
        with callers_names(cliprange_value="clip_eps"):
            out = value_loss(values, returns, old_values=old_values, **options)
        return out.loss * _share(mask, loss_agg, dp_size, batch_num_tokens, global_batch_size)


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
# `patched` is `patch` for the length of a with-block.
patch, unpatch, patched = _PATCH.apply, _PATCH.undo, _PATCH.applied


def _mask(action_mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if action_mask is None else action_mask.bool()


def _loss_agg(token_level_loss: bool) -> str:
    return "token-mean" if token_level_loss else "seq-mean-token-mean"


def _share(mask: Tensor, loss_agg: str, dp_size: int, tokens: float | None, sequences: float | None) -> Tensor | float:
    total = tokens if loss_agg == "token-mean" else sequences
    return 1.0 if total is None else batch_share(mask, loss_agg, dp_size, tokens, sequences)  # as OpenRLHF does


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]; NaN, which lies outside every interval, for a sequence without a token."""
    return x.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
