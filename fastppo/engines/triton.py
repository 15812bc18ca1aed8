"""The Triton kernels (kernels/fastppo_kernels); the interface is that of `fastppo.engines.engine`.

Which rows contribute is decided on the device, and the host never asks: a step runs ahead of the device, and a CUDA
graph can capture it. The kernels' package knows nothing of this one, so arguments are passed flat.
"""

from __future__ import annotations

from torch import Tensor

from fastppo.engines import triton_kernels
from fastppo.engines.engine import Gradients, Head, Needs, Options, Problem, TerminalLoss, Upstream


def linear_statistics(problem: Problem) -> list[Tensor]:
    return list(triton_kernels.linear.statistics(*problem.flat()[:-1]))  # all but the backend


def linear_vjp(problem: Problem, saved: list[Tensor], upstream: Upstream, needs: Needs) -> Gradients:
    model, options = problem.flat()[:8], problem.options.flat()[:-1]
    return triton_kernels.linear.vjp(*model, saved, *upstream, *options, *needs)


def linear_loss(problem: Problem, loss: TerminalLoss, needs: Needs) -> tuple[list[Tensor], Gradients]:
    """By the tiling that the cost model prefers.

    Whole rows (6NDV) where they fit the budget and are expected to be faster; else tiles of the vocabulary (8NDV), as
    for float16, very flat distributions, and every loss with a reference model. Where one ratio stands for a sequence
    its rows stay together, so a sequence that does not fit the budget goes by tiles of the vocabulary too.
    """
    policy, targets, reference, _, (transform, compute_dtype, budget, _) = problem
    if reference is None and targets.numel():
        tiling = triton_kernels.loss.choose_tiling(
            *policy[:2], loss.rows_together, *transform, compute_dtype, budget, with_entropy=loss.has_entropy
        )
        if tiling.whole:

            def row_scalars(saved: Tensor, span: slice) -> list[Tensor | None]:
                return [None if g is None else g[span] for g in loss.row_gradients(saved)[:2]]

            saved, *gradients = triton_kernels.loss.loss_by_rows(
                *policy, targets, row_scalars, *transform, compute_dtype, tiling.rows, budget, *needs
            )
            return list(saved), tuple(gradients)
    saved = linear_statistics(problem)
    return saved, linear_vjp(problem, saved, loss.row_gradients(saved), needs)


def fisher_vector_product(policy: Head, direction: Head, row_weights: Tensor, options: Options) -> Head:
    return Head(*triton_kernels.fisher.fisher_vector_product(*policy, *direction, row_weights, *options.flat()[:-1]))


def selective_statistics(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, options: Options) -> list[Tensor]:
    return triton_kernels.selective.statistics(logits, ref_logits, targets, *options.transform)


def selective_vjp(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    upstream: Upstream,
    options: Options,
) -> None:
    triton_kernels.selective.vjp_into(out, logits, ref_logits, targets, saved, *upstream, *options.transform)


def gae(*arguments) -> tuple[Tensor, Tensor, None]:
    *tensors_and_factors, whiten = arguments
    return *triton_kernels.gae.gae(*tensors_and_factors, whiten=whiten), None
