"""Statistics of softmax(transform(hidden weightᵀ + bias)) a row, and their gradients, by the engine of a backend.

forward   hidden [N, D], weight [V, D]  ->  logprobs, entropy, logsumexp, KL to a reference [N]     2NDV (+ 2ND'V)
backward  upstream scalars a row        ->  ∂hidden, ∂weight, ∂bias; logits recomputed              6NDV (+ 2ND'V)

Nothing of size V is saved. Both passes are custom operators, opaque to torch.compile, since which rows are left out
depends on the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.dispatch import ENGINES
from fastppo.engines.engine import (
    NO_HEAD,
    Gradients,
    Head,
    Needs,
    Options,
    Problem,
    Upstream,
    empty_gradients,
    empty_statistics,
    regroup,
)
from fastppo.ops.once_differentiable import once_differentiable
from fastppo.ops.vocabulary_parallel import Slices, all_statistics, summed_over_ranks


class LinearStatistics(torch.autograd.Function):
    """apply(hidden, weight, bias, targets, reference, kl_kind, options, slices) -> logprobs, entropy, logsumexp, KL.

    Each output is [N], with any upstream gradient; KL is None without a reference. The arguments are those of a
    `Problem`; `slices` says how the vocabulary is spread over ranks, if it is.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets: Tensor, reference: Head | None, kl_kind: str, options: Options, slices
    ):
        problem = Problem(Head(hidden, weight, bias), targets, reference, kl_kind, options)
        saved = linear_statistics(problem, slices)
        ctx.save_for_backward(hidden, weight, bias, targets, *(reference or NO_HEAD), *saved)
        ctx.rest = kl_kind, options, slices
        ctx.set_materialize_grads(False)
        logprobs, entropy, row_max, log_sum = saved[:4]
        return logprobs.clone(), entropy.clone(), row_max + log_sum, saved[4].clone() if kl_kind else None

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Tensor | None):
        tensors, (kl_kind, options, slices) = ctx.saved_tensors, ctx.rest
        problem = Problem.of(*tensors[:7], kl_kind, *options.flat())
        needs = Needs(*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and problem.policy.bias is not None)
        gradients = linear_gradients(problem, list(tensors[7:]), Upstream(*upstream), needs, slices)
        gradients = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        return (*gradients, None, None, None, None, None)


def linear_statistics(problem: Problem, slices: Slices | None) -> list[Tensor]:
    """What `fastppo.engines.engine` calls statistics, of the whole vocabulary."""
    saved = _statistics(*problem.flat())
    return saved if slices is None else all_statistics(saved, problem.targets, problem.kl_kind, slices)


def linear_gradients(
    problem: Problem, saved: list[Tensor], upstream: Upstream, needs: Needs, slices: Slices | None
) -> Gradients:
    """∂hidden, and ∂weight and ∂bias of the rank's slice; empty where not needed."""
    hidden = problem.policy.hidden
    if slices is None:
        return _vjp(*problem.flat(), *upstream, *needs, saved)
    # The shares of ∂hidden are added up in float32: rounding each of them first would bias training.
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    problem = problem._replace(policy=problem.policy._replace(hidden=wide))
    d_hidden, d_weight, d_bias = _vjp(*problem.flat(), *upstream, *needs, saved)
    return summed_over_ranks(d_hidden, slices).to(hidden.dtype), d_weight, d_bias


@torch.library.custom_op("fastppo::linear_statistics", mutates_args=(), schema=f"({Problem.SCHEMA}) -> Tensor[]")
def _statistics(*arguments) -> list[Tensor]:
    problem = Problem.of(*arguments)
    out = ENGINES[problem.options.backend].linear_statistics(problem)
    return [x.clone() for x in out]  # a custom operator's outputs may not share memory


@_statistics.register_fake
def _(*arguments):
    return empty_statistics(Problem.of(*arguments))


@torch.library.custom_op(
    "fastppo::linear_vjp",
    mutates_args=(),
    schema=f"({Problem.SCHEMA}, {Upstream.SCHEMA}, {Needs.SCHEMA}, Tensor[] saved) -> (Tensor, Tensor, Tensor)",
)
def _vjp(*arguments) -> Gradients:
    problem, upstream, needs = regroup(arguments, Problem, Upstream, Needs)
    return ENGINES[problem.options.backend].linear_vjp(problem, arguments[-1], upstream, needs)


@_vjp.register_fake
def _(*arguments):
    problem, _, needs = regroup(arguments, Problem, Upstream, Needs)
    return empty_gradients(problem.policy, needs)
