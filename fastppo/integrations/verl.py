"""verl (github.com/volcengine/verl): its log-probabilities, entropy and PPO functions, computed by fastppo.

    import fastppo.integrations.verl as fastppo_verl

    fastppo_verl.patch()       # in every process that trains: see docs/integrations.md

The functions have verl's names, parameters and results, and can be called without verl. What differs, on purpose:
- log-probabilities and entropies are float32 whatever the logits are (float64 for float64), at most and at least 0;
- padding gives 0, and whatever stands there, NaN included, reaches no result; no token at all gives a loss of 0;
- masks are True or False: any other number counts as True.
B sequences, T response tokens, N tokens of a packed batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastppo import gae, linear_logprob, ppo_loss, reference, selective_logprob, value_loss, whiten
from fastppo.integrations.patching import Patch, between
from fastppo.integrations.versions import require

SUPPORTED = ">=0.8,<0.10"

_KL_ESTIMATORS = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log p(label) from logits [..., V] and labels [...], or 0 where a label is -100.

    With `inplace_backward` the backward may write over logits that are contiguous and were computed. Where something
    else saved them for its own backward, PyTorch stops with an error: pass False there, as verl does for entropy.
    """
    inplace = inplace_backward and logits.is_contiguous() and not logits.is_leaf
    return selective_logprob(logits, labels, inplace_backward=inplace).logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats, [...], of softmax(logits [..., V]); no copy of the logits is made."""
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return selective_logprob(logits, any_target, return_entropy=True).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits`; its memory is bounded anyway, so `chunk_size` has nothing to set."""
    return entropy_from_logits(logits)


class FusedLinearForPPO(torch.nn.Module):
    """Log-probability and entropy from hidden states and the lm_head, without logits.

    `chunk_size` and `impl_backend` are taken for verl's sake; FASTPPO_BACKEND chooses how it is computed.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend: expected 'torch' or 'liger', got {impl_backend!r}")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [..., D], vocab_weights [V, D], input_ids [...] -> log_probs, entropy [...], float32."""
        out = linear_logprob(hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True)
        return out.logprobs, out.entropy


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
    if reduction.lower() not in reductions:
        raise ValueError(f"reduction: expected none, sum or mean, got {reduction!r}")
    out = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, return_entropy=True
    )
    return reductions[reduction.lower()](out.logprobs), out.entropy


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
        config: verl's ActorConfig, or any mapping with attributes of that name: clip_ratio, clip_ratio_low,
            clip_ratio_high, clip_ratio_c, global_batch_info.
        rollout_is_weights: [B, T] importance weights, at least 0, of the policy that trains over the one that sampled.

    Returns:
        The loss, and actor/pg_clipfrac, actor/ppo_kl (k1, nats a token) and actor/pg_clipfrac_lower.
    """
    if config is None:
        raise ValueError("config: expected verl's ActorConfig, got None")
    mask = response_mask.bool()
    # verl bounds the log-ratio to ±20. Handed over in the place of log-probabilities, with old ones of 0.
    log_ratio = (log_prob - old_log_prob.detach()).clamp(-20.0, 20.0)
    low, high = config.get("clip_ratio_low"), config.get("clip_ratio_high")
    options = {
        "mask": mask,
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
        "dual_clip": config.get("clip_ratio_c", 3.0),
        "loss_agg": _local_mode(loss_agg_mode),
    }
    zero = torch.zeros_like(log_ratio)
    # A weight of at least 0 commutes with min and clip, so it goes into the advantage.
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    out = ppo_loss(zero, weighted, logprobs=log_ratio, **options)
    metrics = out.metrics
    if rollout_is_weights is not None:  # a weight of 0 would hide which tokens the clip struck
        metrics = ppo_loss(zero, advantages, logprobs=log_ratio.detach(), **options).metrics
    loss = out.loss * _share(mask, loss_agg_mode, **(config.get("global_batch_info") or {}))
    return loss, {
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
    """The clipped value loss of vpreds [B, T] around the rollout's values, and the fraction that the clip struck."""
    mask = response_mask.bool()
    share = _share(mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    out = value_loss(
        vpreds,
        returns,
        old_values=values,
        mask=mask,
        cliprange_value=cliprange_value,
        loss_agg=_local_mode(loss_agg_mode),
    )
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

    With the whole batch's number of tokens or sequences, it is this rank's share of the whole batch's loss, times
    `dp_size` because the gradients of the ranks will be averaged. `loss_scale_factor` divides seq-mean-token-sum-norm
    in the place of T.
    """
    mask = loss_mask.bool()
    weights = reference.aggregation_weights(mask, _local_mode(loss_agg_mode), reference.upcast(loss_mat).dtype)
    share = _share(mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    return (weights * loss_mat.masked_fill(~mask, 0.0)).sum() * share


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Estimate of KL(π ‖ π_ref) a token: kl = k1, abs, mse = k2, low_var_kl = k3 (Schulman, 2020), k3 at most 10.

    A "+" after the name keeps the value and takes the gradient of k2, which is unbiased. k3 keeps its digits where the
    two log-probabilities are close.
    """
    kind = kl_penalty.removesuffix("+")
    log_ratio = logprob - ref_logprob
    if kind == "abs":
        value = log_ratio.abs()
    elif kind not in _KL_ESTIMATORS:
        raise NotImplementedError(f"kl_penalty: expected abs, {', '.join(_KL_ESTIMATORS)}, got {kl_penalty!r}")
    else:
        estimator = _KL_ESTIMATORS[kind]
        bounded = log_ratio.clamp(-20.0, 20.0) if estimator == "k3" else log_ratio
        value = reference.sampled_kl(bounded, torch.zeros_like(bounded), estimator)
        value = value.clamp(max=10.0) if estimator == "k3" else value
    if not kl_penalty.endswith("+"):
        return value
    straight_through = reference.sampled_kl(log_ratio, torch.zeros_like(log_ratio), "k2")
    return value.detach() + (straight_through - straight_through.detach())


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, both [B, T]; tokens outside the mask are passed over and give 0."""
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=mask)
    return whiten(advantages, mask=mask), returns


def fastppo_gae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    **_others: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_gae_advantage_return` as a registered estimator, for a trainer that hands it values, gamma and lam.

    Raises:
        ValueError: without them. verl's own trainer gives them to adv_estimator=gae only.
    """
    if values is None or gamma is None or lam is None:
        raise ValueError(
            "values, gamma, lam: not given. verl's trainer hands them to algorithm.adv_estimator=gae alone: choose "
            "that, and fastppo.integrations.verl.patch() computes it"
        )
    return compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam)


_PATCH = Patch(
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


def register() -> None:
    """Enter policy loss "fastppo" and advantage estimator "fastppo_gae" into verl's registries; again does no harm.

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


def patch() -> None:
    """`register`, and put the other functions of this module in the place of verl's, in this process.

    Raises:
        ImportError, RuntimeError: see `register` and `fastppo.integrations.patching.Patch.apply`.
    """
    _PATCH.apply()
    try:
        register()
    except BaseException:
        _PATCH.undo()
        raise


def unpatch() -> None:
    """Put verl's own functions back; the registered names stay (RuntimeError: see `Patch.undo`)."""
    _PATCH.undo()


def patched() -> AbstractContextManager[None]:
    """`patch` for the length of a with-block."""
    return between(patch, unpatch)


def _local_mode(loss_agg_mode: str) -> str:
    """fastppo's name for the aggregation over the tokens at hand; `_share` turns token-mean into token-sum."""
    return "token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode


def _share(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor | float:
    """What the mean over the tokens at hand [B, T] is multiplied by to be this rank's share of the whole batch's."""
    by_token = loss_agg_mode in ("token-mean", "token-sum")
    if loss_agg_mode == "token-sum":
        batch_num_tokens = 1
    total, name = (batch_num_tokens, "batch_num_tokens") if by_token else (global_batch_size, "global_batch_size")
    if total is None:
        if dp_size > 1:
            raise ValueError(f"{name}: needed when dp_size > 1")
        share = 1.0
    else:
        share = (mask.sum() if by_token else mask.any(-1).sum()) / total * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm" and loss_scale_factor is not None:
        share = share * (mask.shape[-1] / loss_scale_factor)
    return share
