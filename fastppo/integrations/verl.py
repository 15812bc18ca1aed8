"""verl (github.com/volcengine/verl): its log-probabilities, entropy and PPO functions, computed by fastppo.

    import fastppo.integrations.verl as fastppo_verl

    fastppo_verl.patch()       # in every process that trains: see docs/integrations.md

Tested with verl 0.8.0, 0.9.0 and 0.9.1. `patch` calls `register` and replaces verl's functions (listed in `_PATCH`) in
all of its modules. Ours have the names, parameters and results of verl's, and need no verl. Intended differences:
- log-probabilities (at most 0) and entropies (at least 0) are float32 whatever the logits are, float64 for float64;
- padding gives 0, and values at padding, NaN included, reach no result; without any token the loss is 0;
- masks are boolean: any number but 0 counts as True.
B sequences, T response tokens, N tokens of a packed batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastppo import gae, linear_logprob, reference, selective_logprob, value_loss, whiten
from fastppo.integrations.patching import Patch, require
from fastppo.integrations.shared import (
    batch_share,
    callers_names,
    check_alike,
    entropy_from_logits,
    replace_gradient,
    weighted_ppo_loss,
)
from fastppo.ops.checks import ARGUMENTS, shown

SUPPORTED = ">=0.8,<0.10"

_KL_ESTIMATORS = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


@callers_names(targets="labels")
def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log p(label) from logits [..., V] and labels [...]; 0 where a label is -100.

    With `inplace_backward` the backward pass may overwrite logits that are contiguous and not a leaf. If another
    operation saved them for its own backward, PyTorch raises an error: pass False there, as verl does for entropy.
    """
    ARGUMENTS["logits"]("logits", logits)
    inplace = inplace_backward and logits.is_contiguous() and not logits.is_leaf
    return selective_logprob(logits, labels, inplace_backward=inplace).logprobs


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits`, whose memory is bounded already; `chunk_size` has no effect."""
    return entropy_from_logits(logits)


class FusedLinearForPPO(torch.nn.Module):
    """Log-probability and entropy from hidden states and the lm_head, without logits.

    `chunk_size` and `impl_backend` have no effect; FASTPPO_BACKEND selects the backend.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend: expected 'torch' or 'liger', got {impl_backend!r}")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    @callers_names(hidden="hidden_states", weight="vocab_weights", targets="input_ids")
    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [..., D], vocab_weights [V, D], input_ids [...] -> log_probs, entropy [...], float32."""
        out = linear_logprob(hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True)
        return out.logprobs, out.entropy


@callers_names(targets="labels")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability ([N], or reduced over N by "sum" or "mean") and entropy [N] of N tokens.

    Args:
        hidden: [..., D], flattened to [N, D]; labels [...] to [N]; weight [V, D].

    Raises:
        NotImplementedError: a process group of several ranks, that is, a vocabulary split over them.
    """
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        raise NotImplementedError(
            "dist_process_group: fastppo needs the whole vocabulary on each rank; set tensor_model_parallel_size=1, "
            "or call unpatch()"
        )
    reductions = {"none": torch.Tensor.clone, "sum": torch.sum, "mean": torch.mean}
    reduce = reductions.get(str(reduction).lower())
    if reduce is None:
        raise ValueError(f"reduction: expected none, sum or mean, got {shown(reduction)}")
    for name, tensor in (("hidden", hidden), ("targets", labels)):
        ARGUMENTS[name](name, tensor)
    out = linear_logprob(hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature, return_entropy=True)
    return reduce(out.logprobs), out.entropy


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped policy loss with dual clip, verl's "vanilla"; `register` makes it policy_loss.loss_mode=fastppo.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, T].
        loss_agg_mode: see `agg_loss`.
        config: verl's ActorConfig, or any mapping that also has its attributes: clip_ratio, clip_ratio_low,
            clip_ratio_high, clip_ratio_c, global_batch_info.
        rollout_is_weights: [B, T] importance weights π_train / π_rollout, at least 0, of any of verl's rollout
            corrections; what it rejects is missing from response_mask.

    Returns:
        The loss, and actor/pg_clipfrac, actor/ppo_kl (k1, nats a token) and actor/pg_clipfrac_lower.
    """
    if config is None:
        raise ValueError("config: expected verl's ActorConfig, got None")
    optional = {"rollout_is_weights": rollout_is_weights}
    check_alike(optional, log_prob=log_prob, old_log_prob=old_log_prob, response_mask=response_mask)
    mask = response_mask.bool()
    log_ratio = (log_prob - old_log_prob.detach()).clamp(-20.0, 20.0)  # verl's bounds
    low, high = ("clip_ratio" if config.get(name) is None else name for name in ("clip_ratio_low", "clip_ratio_high"))
    names = {"clip_low": low, "clip_high": high, "dual_clip": "clip_ratio_c", "loss_agg": "loss_agg_mode"}
    with callers_names(logprobs="log_prob", importance_weights="rollout_is_weights", **names):
        loss, metrics = weighted_ppo_loss(
            log_ratio,
            advantages,
            rollout_is_weights,
            mask=mask,
            clip_low=config.get(low),
            clip_high=config.get(high),
            dual_clip=config.get("clip_ratio_c", 3.0),
            loss_agg=_local_mode(loss_agg_mode),
        )
    return loss * batch_share(mask, loss_agg_mode, **(config.get("global_batch_info") or {})), {
        "actor/pg_clipfrac": metrics["clip_fraction"].item(),
        "actor/ppo_kl": agg_loss(-log_ratio.detach(), mask, "token-mean").item(),
        "actor/pg_clipfrac_lower": metrics["dual_clip_fraction"].item(),
    }


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped value loss of vpreds [B, T] around the rollout's values, and the fraction of clipped tokens."""
    check_alike(vpreds=vpreds, response_mask=response_mask)
    mask, loss_agg = response_mask.bool(), _local_mode(loss_agg_mode)
    share = batch_share(mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    options = {"mask": mask, "cliprange_value": cliprange_value, "loss_agg": loss_agg}
    with callers_names(values="vpreds", old_values="values", loss_agg="loss_agg_mode"):
        out = value_loss(vpreds, returns, old_values=values, **options)
    return out.loss * share, out.metrics["clip_fraction"]


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """One number from a loss per token [B, T]: token-mean, token-sum, or one of the three seq-mean modes.

    The means over sequences divide by the number of sequences with a token, as verl's do; Liger's divide by all.

    Args:
        dp_size: number of ranks; the result is multiplied by it, since their gradients will be averaged.
        batch_num_tokens, global_batch_size: of the whole batch over all ranks; without them the mean is local.
        loss_scale_factor: divides seq-mean-token-sum-norm instead of T.
    """
    check_alike(loss_mat=loss_mat, loss_mask=loss_mask)
    mask = loss_mask.bool()
    with callers_names(loss_agg="loss_agg_mode"):
        weights = reference.aggregation_weights(mask, _local_mode(loss_agg_mode), reference.upcast(loss_mat).dtype)
    share = batch_share(mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    return (weights * loss_mat.masked_fill(~mask, 0.0)).sum() * share


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Estimate of KL(π ‖ π_ref) a token: kl = k1, abs, mse = k2, low_var_kl = k3 (Schulman, 2020), k3 at most 10.

    A "+" after the name keeps the value and takes the gradient of k2, which is unbiased. k3 stays accurate where the
    two log-probabilities are close.
    """
    check_alike(logprob=logprob, ref_logprob=ref_logprob)
    kind = str(kl_penalty).removesuffix("+")
    log_ratio = logprob - ref_logprob
    zero = torch.zeros_like(log_ratio)
    if kind == "abs":
        value = log_ratio.abs()
    elif kind not in _KL_ESTIMATORS:
        raise NotImplementedError(f"kl_penalty: expected abs, {', '.join(_KL_ESTIMATORS)}, got {shown(kl_penalty)}")
    elif _KL_ESTIMATORS[kind] == "k3":
        value = reference.sampled_kl(log_ratio.clamp(-20.0, 20.0), zero, "k3").clamp(max=10.0)
    else:
        value = reference.sampled_kl(log_ratio, zero, _KL_ESTIMATORS[kind])
    unbiased = kl_penalty.endswith("+")
    return replace_gradient(value, reference.sampled_kl(log_ratio, zero, "k2")) if unbiased else value


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, both [B, T]; tokens outside the mask are skipped and give 0."""
    check_alike(token_level_rewards=token_level_rewards, values=values, response_mask=response_mask)
    mask = response_mask.bool()
    gamma, lam = (x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in (gamma, lam))
    with callers_names(rewards="token_level_rewards"):
        advantages, returns = gae(token_level_rewards, values, gamma=gamma, lam=lam, mask=mask)
    return whiten(advantages, mask=mask), returns


def fastppo_gae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    **_others: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_gae_advantage_return` as a registered estimator, for a trainer that passes values, gamma and lam.

    Raises:
        ValueError: one of them is missing. verl's own trainer passes them to adv_estimator=gae only.
    """
    if values is None or gamma is None or lam is None:
        raise ValueError(
            "values, gamma, lam: not given. verl's trainer passes them to algorithm.adv_estimator=gae only: choose "
            "that, and fastppo.integrations.verl.patch() computes it"
        )
    return compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam)


def register() -> None:
    """Add policy loss "fastppo" and advantage estimator "fastppo_gae" to verl's registries; may be called again.

    Raises:
        ImportError: verl is missing, or its version is outside `SUPPORTED`.
        RuntimeError: another function has one of the names.
    """
    require("verl", SUPPORTED)
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    for registry, enter, name, function in (
        (algos.POLICY_LOSS_REGISTRY, algos.register_policy_loss, "fastppo", compute_policy_loss),
        (algos.ADV_ESTIMATOR_REGISTRY, algos.register_adv_est, "fastppo_gae", fastppo_gae),
    ):
        if registry.get(name, function) is not function:
            raise RuntimeError(f"verl: the name {name!r} is registered already, for {registry[name]}")
        enter(name)(function)


class _Patch(Patch):
    def apply(self) -> None:
        """Replace verl's functions in this process and `register`; raises what `Patch.apply` and `register` raise."""
        super().apply()
        try:
            register()
        except BaseException:
            self.undo()
            raise


_PATCH = _Patch(
    "verl",
    SUPPORTED,
    {
        "verl.utils.torch_functional.logprobs_from_logits": logprobs_from_logits,
        "verl.utils.torch_functional.entropy_from_logits": entropy_from_logits,
        "verl.utils.torch_functional.entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
        "verl.utils.experimental.torch_functional.FusedLinearForPPO": FusedLinearForPPO,
        "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy": linear_cross_entropy,
        "verl.trainer.ppo.core_algos.compute_gae_advantage_return": compute_gae_advantage_return,
        "verl.trainer.ppo.core_algos.compute_value_loss": compute_value_loss,
        "verl.trainer.ppo.core_algos.agg_loss": agg_loss,
        "verl.trainer.ppo.core_algos.kl_penalty": kl_penalty,
    },
)
# The registered names stay after `unpatch`; `patched` is `patch` for the length of a with-block.
patch, unpatch, patched = _PATCH.apply, _PATCH.undo, _PATCH.applied


def _local_mode(loss_agg_mode: str) -> str:
    """fastppo's name for the aggregation over this rank's tokens; `batch_share` turns token-mean into token-sum."""
    return "token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode
