"""The PPO loss from hidden states, down to the scalar, with its gradients computed in the forward.

    pass 1   hidden, weight          ->  log-prob, entropy (and exact KL) of every real token            2NDV
    scalars  old, advantages, ...    ->  the loss, and ∂loss/∂(log-prob, entropy, KL): a few numbers a row
    pass 2   tiles recomputed        ->  ∂z in place  ->  ∂weight tile, ∂hidden                          6NDV

An engine may take whole rows instead, all three steps for a chunk of them, and compute the logits once, 6NDV in all:
see `fastppo.engines.triton`.

Rows whose scalars are all zero (clipped tokens with no entropy or KL term, zero advantages) are left out of pass 2.
Scratch memory is `scratch_bytes()` whatever N and V are, and O(ND); the gradient itself is the only [V, D] tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.engines import triton_kernels
from fastppo.engines.budget import scratch_bytes
from fastppo.engines.dispatch import ENGINES
from fastppo.engines.engine import (
    Head,
    Needs,
    Options,
    Problem,
    TerminalLoss,
    Upstream,
    empty_gradients,
    empty_statistics,
    regroup,
)
from fastppo.ops import reference
from fastppo.ops.checks import check_shape, checked, looks_at_values
from fastppo.ops.head import (
    IGNORED,
    needed_gradients,
    open_head,
    open_options,
    open_reference,
    open_slices,
    open_targets,
)
from fastppo.ops.linear_statistics import linear_gradients, linear_statistics
from fastppo.ops.loss_options import LossOptions, SampledTokens
from fastppo.ops.once_differentiable import once_differentiable
from fastppo.ops.outputs import PPOLossOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fastppo.ops.vocabulary_parallel import Slices


@checked
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
    entropy_coef: float = 0.0,
    loss_agg: str = "token-mean",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> PPOLossOutput:
    """PPO's clipped loss with entropy bonus and KL penalty, without materializing the logits.

        loss = Σ_n w_n (−i min(r A, clip(r, 1 − clip_low, 1 + clip_high) A) + kl_coef · KL − entropy_coef · H)

    Schulman et al., 2017 (arXiv:1707.06347); dual clip from Ye et al., 2020 (arXiv:1912.09729); sequence ratios from
    Zheng et al., 2025 (arXiv:2507.18071).

    Args:
        hidden: [..., T, D] float32, bfloat16 or float16; the state that predicts the target, so already shifted by one.
        weight: [V, D], the lm_head; bias: [V].
        targets: [..., T] int64 or int32: the sampled tokens. −100 counts as masked. A token that the policy now rules
            out (a logit of −∞) has a ratio of 0 and no gradient; k1 is −∞ there, k2 and k3 are +∞, and the loss with
            them.
        old_logprobs: [..., T]: log-probabilities under the policy that sampled the tokens (not the reference).
        advantages: [..., T], a constant of the loss.
        mask: [..., T] bool, True for a sampled token; in every argument padding may hold anything. It costs
            nothing, but for backend="triton", where it takes part in two of the three products as zeros: the host then
            need not wait to learn how many tokens there are.
        importance_weights: [..., T] of at least 0, a constant of the loss: i, which weighs a token's surrogate, not its
            KL and entropy; 1 without. The metrics that count tokens count those of weight 0 too.
        clip_low, clip_high, dual_clip: the ratio's clip range, and the bound on −r A / |A| where A < 0.
        ratio_level: token, sequence (product over the sequence) or sequence-geometric (its geometric mean).
        ref_logprobs: [..., T]: log-probabilities under the reference, for kl_estimator k1, k2, k3.
        ref_hidden, ref_weight, ref_bias: [..., T, D'], [V, D'], [V]: the reference model, for kl_estimator exact.
        kl_coef: weight of the KL to the reference. A KL is reported in the metrics whenever a reference is given.
        entropy_coef: weight of the entropy bonus.
        loss_agg: token-mean, seq-mean-token-mean, seq-mean-token-sum or seq-mean-token-sum-norm. A mean over sequences
            counts those with a token; Liger divides by the number of all sequences.
        temperature, logit_scale, softcap: transform(x) = softcap · tanh(logit_scale · x / softcap) / temperature.
        group: the ranks that hold the vocabulary's rows between them; see `linear_logprob`. ref_weight is then a slice
            of the same rows.
        backend: None chooses by device; see `fastppo doctor`.

    Returns:
        PPOLossOutput(loss, logprobs, entropy, metrics). `loss.backward()` gives hidden.grad, weight.grad, bias.grad,
        once: they are moved, not copied. The other fields are detached. With no real token the loss is 0 and the
        gradients are zeros.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that don't go together, a target outside the vocabulary, a NaN
            advantage, an option out of range.
    """
    loss_options = LossOptions(
        clip_low, clip_high, dual_clip, ratio_level, kl_coef, kl_estimator, entropy_coef, loss_agg
    )
    has_ref_model = ref_hidden is not None and ref_weight is not None
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden, ref_weight: give both or neither")
    if ref_bias is not None and not has_ref_model:
        raise ValueError("ref_bias: only together with ref_hidden and ref_weight")
    head = open_head(hidden, weight, bias, group=group)
    slices = open_slices(head, group)
    check_shape("targets", targets, tuple(hidden.shape[:-1]), "one for each hidden state")
    loss_options.check(has_ref_logprobs=ref_logprobs is not None, has_ref_model=has_ref_model, dims=targets.dim())
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    real = targets != IGNORED
    constants = (old_logprobs, advantages, ref_logprobs, importance_weights)
    tokens = SampledTokens.open(mask, *constants, like=targets, dtype=dtype, real=real)
    rows = open_targets(torch.where(tokens.mask, targets, IGNORED), hidden, head, IGNORED, slices)
    ref = open_reference(hidden, head.weight, ref_hidden, ref_weight, ref_bias, group) if has_ref_model else None
    options = open_options("linear_ppo_loss", backend, hidden, temperature, logit_scale, softcap, slices)

    if options.backend == "reference":
        return _reference_loss(head, rows, ref, tokens, options, loss_options)
    names = reference.metric_names(has_kl=ref is not None or ref_logprobs is not None)
    loss, logprobs, entropy, metric_values = _LinearPPOLoss.apply(
        *head, rows, ref, tokens, options, loss_options, needed_gradients(head), slices
    )
    return PPOLossOutput(loss, logprobs, entropy, dict(zip(names, metric_values, strict=True)))


def _reference_loss(
    head: Head, rows: Tensor, ref: Head | None, tokens: SampledTokens, options: Options, loss_options: LossOptions
) -> PPOLossOutput:
    """The naive path: full logits, ordinary autograd."""
    shape, valid = tokens.mask.shape, rows != IGNORED
    z = reference.logits(*head, options.transform, valid)
    out = reference.logprob(z, rows, ignore_index=IGNORED, return_entropy=True)
    logprobs, entropy = out.logprobs.view(shape), out.entropy.view(shape)
    kl = None
    if ref is not None:
        ref_z = reference.logits(*ref, options.transform, valid)
        kl = reference.exact_kl(z, ref_z).view(shape)
    loss, metrics = tokens.loss(logprobs, entropy, kl, loss_options)
    return PPOLossOutput(loss, logprobs.detach(), entropy.detach(), metrics)


class _LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets: Tensor, ref: Head | None, tokens: SampledTokens, options: Options,
        loss_options: LossOptions, needs: Needs, slices: Slices | None,
    ):  # fmt: skip
        kl_kind, shape = "" if ref is None else "reverse", tokens.mask.shape
        problem = Problem(Head(hidden, weight, bias), targets, ref, kl_kind, options)
        gradients = ()
        if any(needs) and slices is None:
            out = _terminal_loss(*problem.flat(), *tokens, *loss_options, *needs)
            loss, metrics, logprobs, entropy, *gradients = out
        else:
            saved = linear_statistics(problem, slices)
            logprobs, entropy = saved[:2]
            loss, metrics, upstream = tokens.evaluate(saved, loss_options, options.backend, with_gradients=any(needs))
            if any(needs):
                gradients = linear_gradients(problem, saved, upstream, needs, slices)
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)  # of the outputs that have none
        ctx.needs, ctx.handed_over, ctx.backend = needs, False, options.backend
        outputs = (logprobs.view(shape), entropy.view(shape), metrics)
        ctx.mark_non_differentiable(*outputs)
        return (loss, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 10
        if not torch.compiler.is_compiling():
            if ctx.handed_over:
                raise RuntimeError(
                    "linear_ppo_loss: the first backward took its gradients; compute the loss once more, or add what "
                    "else you need to it before the one backward"
                )
            ctx.handed_over = True
        gradients = zip(ctx.saved_tensors, ctx.needs, strict=True)
        scaled = (_scale(gradient, d_loss, ctx.backend) if needed else None for gradient, needed in gradients)
        return (*scaled, *[None] * 7)


@torch.library.custom_op(
    "fastppo::linear_ppo_loss",
    mutates_args=(),
    schema=f"({Problem.SCHEMA}, {SampledTokens.SCHEMA}, {LossOptions.SCHEMA}, {Needs.SCHEMA}) -> Tensor[]",
)
def _terminal_loss(*arguments) -> list[Tensor]:
    """The loss, its metrics' values, log-probs, entropies, then ∂hidden, ∂weight, ∂bias, empty where not needed."""
    problem, tokens, loss_options, needs = regroup(arguments, Problem, SampledTokens, LossOptions, Needs)
    value = metrics = None

    def row_gradients(saved: Sequence[Tensor]) -> Upstream:
        # An engine that takes rows in parts asks for each: the last time all statistics are there.
        nonlocal value, metrics
        value, metrics, gradients = tokens.evaluate(saved, loss_options, problem.options.backend)
        return gradients

    loss = TerminalLoss(
        row_gradients=row_gradients,
        rows_together=1 if loss_options.ratio_level == "token" else tokens.mask.shape[-1],
        has_entropy=loss_options.entropy_coef != 0.0,
    )
    saved, gradients = ENGINES[problem.options.backend].linear_loss(problem, loss, needs)
    return [value, metrics, saved[0].clone(), saved[1].clone(), *gradients]  # outputs may not share memory


@_terminal_loss.register_fake
def _(*arguments):
    problem, tokens, _, needs = regroup(arguments, Problem, SampledTokens, LossOptions, Needs)
    logprobs, entropy = empty_statistics(problem)[:2]
    has_kl = problem.reference is not None or tokens.ref_logprobs is not None
    metrics = logprobs.new_empty(len(reference.metric_names(has_kl=has_kl)))
    return [logprobs.new_empty(()), metrics, logprobs, entropy, *empty_gradients(problem.policy, needs)]


def _scale(gradient: Tensor, d_loss: Tensor, backend: str) -> Tensor:
    """gradient · d_loss in the gradient's own memory: a second [V, D] tensor may not fit where the first one did.

    The product is taken in d_loss's own precision, at least float32, and rounded once. Rounded to bfloat16 beforehand,
    d_loss = 1/3 would be off by 0.2%; in float16 a gradient scaler's 65,536 would be infinite.
    """
    if torch.compiler.is_compiling():
        return (gradient.to(d_loss.dtype) * d_loss).to(gradient.dtype)
    if looks_at_values(d_loss) and d_loss.item() == 1.0:
        return gradient
    if backend == "triton":
        return triton_kernels.scale.scale_(gradient, d_loss)
    for part in gradient.view(-1).split(max(1, scratch_bytes(gradient.device) // d_loss.element_size())):
        part.copy_(part.to(d_loss.dtype) * d_loss)
    return gradient
