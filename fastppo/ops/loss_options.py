"""The options of the PPO loss, shared by `linear_ppo_loss` and `ppo_loss` and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engines import triton_kernels
from fastppo.engines.engine import Upstream, regroup
from fastppo.ops import reference
from fastppo.ops.checks import check_mask, check_per_token, first_true, looks_at_values
from fastppo.ops.clipped_loss_gradient import clipped_loss_gradient
from fastppo.ops.once_differentiable import once_differentiable


class LossOptions(NamedTuple):
    clip_low: float
    clip_high: float
    dual_clip: float | None
    ratio_level: str
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    loss_agg: str

    SCHEMA = (
        "float clip_low, float clip_high, float? dual_clip, str ratio_level, float kl_coef, str kl_estimator, "
        "float entropy_coef, str loss_agg"
    )

    def upstream(self, gradients: list[Tensor]) -> Upstream:
        """Of the gradients that the Triton kernels give of a loss with these options."""
        d_logprobs, *rest = gradients
        d_entropy = rest.pop(0) if self.entropy_coef != 0.0 else None
        return Upstream(d_logprobs, d_entropy, None, rest[0] if rest else None)

    def check(self, *, has_ref_logprobs: bool, has_ref_model: bool, dims: int) -> None:
        """ValueError naming the option that does not go with what else was given."""
        if self.kl_coef != 0.0 and self.kl_estimator == "exact" and not has_ref_model:
            raise ValueError(
                "kl_estimator: 'exact' needs the reference's whole distribution (ref_hidden and ref_weight, or "
                "ref_logits), which was not given"
            )
        if self.kl_coef != 0.0 and self.kl_estimator != "exact" and not has_ref_logprobs:
            raise ValueError(f"ref_logprobs: needed for kl_coef={self.kl_coef} with kl_estimator={self.kl_estimator!r}")
        if dims < 2 and (self.ratio_level != "token" or self.loss_agg != "token-mean"):
            raise ValueError(
                f"targets: expected [batch, time] for ratio_level={self.ratio_level!r} and loss_agg={self.loss_agg!r}, "
                f"got {dims} dimension(s), which do not say where a sequence ends"
            )


class SampledTokens(NamedTuple):
    """What the loss knows of the sampled tokens, [..., T]: checked, detached, 0 on padding."""

    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None = None

    SCHEMA = "Tensor mask, Tensor old_logprobs, Tensor advantages, Tensor? ref_logprobs, Tensor? importance_weights"

    @classmethod
    def open(
        cls,
        mask: Tensor | None,
        old_logprobs: Tensor,
        advantages: Tensor,
        ref_logprobs: Tensor | None,
        importance_weights: Tensor | None,
        *,
        like: Tensor,
        dtype: torch.dtype,
        real: Tensor | None = None,
    ) -> SampledTokens:
        """Check everything against `like` [..., T]; `dtype` is that of the model's statistics.

        Where `real` [..., T] bool is False a token counts as padding too.
        """
        mask = check_mask(mask, like, real=real)
        if importance_weights is not None:
            importance_weights = check_per_token("importance_weights", importance_weights, mask, dtype)
            if looks_at_values(importance_weights) and (where := first_true(importance_weights < 0)) is not None:
                found = importance_weights[where].item()
                raise ValueError(f"importance_weights: expected numbers of at least 0, got {found} at {where}")
        return cls(
            mask,
            check_per_token("old_logprobs", old_logprobs, mask, dtype),
            check_per_token("advantages", advantages, mask, dtype),
            None if ref_logprobs is None else check_per_token("ref_logprobs", ref_logprobs, mask, dtype),
            importance_weights,
        )

    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, exact_kl: Tensor | None, options: LossOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped loss of these tokens.

        The KL is that of `kl_estimator`. Where it is only reported (kl_coef 0) and what it needs was not given, what
        was given stands in.
        """
        kl = exact_kl
        if self.ref_logprobs is not None and (exact_kl is None or options.kl_estimator != "exact"):
            estimator = "k3" if options.kl_estimator == "exact" else options.kl_estimator
            kl = reference.sampled_kl(logprobs, self.ref_logprobs, estimator)
        rest = options._asdict()
        rest.pop("kl_estimator")
        return reference.clipped_loss(
            logprobs,
            self.old_logprobs,
            self.advantages,
            self.mask,
            entropy=entropy,
            kl=kl,
            importance_weights=self.importance_weights,
            **rest,
        )

    def evaluate(
        self, saved: Sequence[Tensor], options: LossOptions, backend: str, *, with_gradients: bool = True
    ) -> tuple[Tensor, Tensor, Upstream]:
        """The loss, its metrics' values, and its gradients a row, from an engine's statistics of the rows [N]."""
        logprobs, entropy, exact_kl = saved[0], saved[1], saved[4] if len(saved) > 4 else None
        if backend == "triton":
            loss, values, *gradients = _fused_loss(logprobs, entropy, exact_kl, *self, *options)
            return loss, values, options.upstream(gradients)
        shaped = (None if x is None else x.view(self.mask.shape) for x in (logprobs, entropy, exact_kl))
        loss, metrics = self.loss(*shaped, options)
        gradients = self.row_gradients(logprobs, options) if with_gradients else Upstream(None, None, None, None)
        return loss, torch.stack(list(metrics.values())), gradients

    def fused_loss(
        self, logprobs: Tensor, entropy: Tensor, exact_kl: Tensor | None, options: LossOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` by the Triton kernels, for autograd."""
        loss, values = _FusedLoss.apply(logprobs, entropy, exact_kl, self, options)
        names = reference.metric_names(has_kl=exact_kl is not None or self.ref_logprobs is not None)
        return loss, dict(zip(names, values, strict=True))

    def row_gradients(self, logprobs: Tensor, options: LossOptions) -> Upstream:
        """The loss's gradient with respect to each statistic of each token as a row [N]; logprobs [N]."""
        gradients = clipped_loss_gradient(
            logprobs.view(self.mask.shape),
            self.old_logprobs,
            self.advantages,
            self.mask,
            ref_logprobs=self.ref_logprobs,
            importance_weights=self.importance_weights,
            **options._asdict(),
        )
        return Upstream(*(None if g is None else g.reshape(-1) for g in gradients))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs: Tensor, entropy: Tensor, kl: Tensor | None, tokens: SampledTokens, options: LossOptions):
        loss, values, *gradients = _fused_loss(logprobs, entropy, kl, *tokens, *options)
        ctx.save_for_backward(*gradients)
        ctx.options = options
        ctx.set_materialize_grads(False)  # of the metrics
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor | None, _):
        if d_loss is None:
            return (None,) * 5
        d_logprobs, d_entropy, _, d_kl = ctx.options.upstream([g * d_loss for g in ctx.saved_tensors])
        return d_logprobs, d_entropy, d_kl, None, None


@torch.library.custom_op(
    "fastppo::clipped_loss",
    mutates_args=(),
    schema=f"(Tensor logprobs, Tensor? entropy, Tensor? kl, {SampledTokens.SCHEMA}, {LossOptions.SCHEMA}) -> Tensor[]",
)
def _fused_loss(*arguments) -> list[Tensor]:
    """The loss, its metrics' values, and its gradients that `LossOptions.upstream` names, by the Triton kernels."""
    return [x for x in triton_kernels.clipped_loss.clipped_loss(*arguments) if x is not None]


@_fused_loss.register_fake
def _(logprobs, entropy, kl, *arguments):
    tokens, options = regroup(arguments, SampledTokens, LossOptions)
    metrics = 7 + (entropy is not None) + (kl is not None or tokens.ref_logprobs is not None)
    present = 1 + (options.entropy_coef != 0.0) + (options.kl_coef != 0.0 and options.kl_estimator == "exact")
    return [logprobs.new_empty(()), logprobs.new_empty(metrics), *(torch.empty_like(logprobs) for _ in range(present))]
