"""What an engine is: the module of a backend with these functions, found in `fastppo.engines.dispatch.ENGINES`.

    linear_statistics(problem)                                             -> statistics of each row
    linear_vjp(problem, saved, upstream, needs)                            -> ∂hidden, ∂weight, ∂bias
    linear_loss(problem, loss, needs)                                      -> both, for a terminal loss
    fisher_vector_product(policy, direction, row_weights, options)         -> the product, a `Head`
    selective_statistics(logits, ref_logits, targets, options)             -> statistics of each row
    selective_vjp(out, logits, ref_logits, targets, saved, upstream, options)           -> None; ∂logits is in `out`
    gae(rewards, values, mask, dones, bootstrap, cu_seqlens, gamma, lam, whiten)        -> advantages, returns, finite

`saved` is what the statistics returned for the same arguments, `upstream` the loss's gradient with respect to them.
Statistics are logprobs, entropy, row_max, log_sum, and with a reference kl, kl_center, ref_row_max, ref_log_sum: [N]
float32 (float64 for float64), 0 in rows whose target is negative. The logsumexp is row_max + log_sum; kept apart, they
stay exact under a large common offset of the logits. kl_center is the row constant of the divergence's gradient.

Gradients have the dtypes of their arguments, and are empty where `needs` says no. `row_weights` are [N] float32
(float64 for float64); rows of weight 0 are left out. `finite` of `gae` says whether every advantage is finite, or None
where nobody looked.

Each function runs inside a custom operator, which is opaque to torch.compile, without grad mode. The operators in
`fastppo.ops` have checked the arguments. An operator's schema knows neither tuples nor classes: the classes here each
carry their part of a schema, and turn flat arguments into themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engines.transform import LogitTransform

# A logit further below its row's maximum counts as this far below: its exponential is 0, and 0 times it is still 0,
# where 0 · (−inf) would be NaN. No finite logit of use is so low, so that a divergence counts the whole distance to a
# reference that all but excludes a token; from one that gives it no mass at all, it is huge instead of infinite.
VERY_NEGATIVE = -1e20


class Head(NamedTuple):
    """A model's last hidden states as rows and its lm_head, or one tensor for each of them."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


NO_HEAD = Head(None, None, None)


class Options(NamedTuple):
    """How the passes over the vocabulary are computed."""

    transform: LogitTransform
    compute_dtype: torch.dtype  # of the matrix products
    budget: int  # bytes of scratch
    backend: str

    SCHEMA = (
        "float temperature, float logit_scale, float? softcap, ScalarType compute_dtype, SymInt budget, str backend"
    )

    @classmethod
    def of(cls, temperature: float, logit_scale: float, softcap: float | None, *rest) -> Options:
        return cls(LogitTransform(temperature, logit_scale, softcap), *rest)

    def flat(self) -> tuple:
        return (*self.transform, *self[1:])


class Problem(NamedTuple):
    """Whose softmax, at which tokens, and beside which reference."""

    policy: Head
    targets: Tensor  # [N] int64; rows whose target is negative are left out
    reference: Head | None
    kl_kind: str  # reverse or forward; empty without a reference
    options: Options

    SCHEMA = (
        "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? ref_hidden, Tensor? ref_weight, "
        f"Tensor? ref_bias, str kl_kind, {Options.SCHEMA}"
    )

    @classmethod
    def of(cls, hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind: str, *options) -> Problem:
        reference = None if ref_hidden is None else Head(ref_hidden, ref_weight, ref_bias)
        return cls(Head(hidden, weight, bias), targets, reference, kl_kind, Options.of(*options))

    def flat(self) -> tuple:
        return (*self.policy, self.targets, *(self.reference or NO_HEAD), self.kl_kind, *self.options.flat())


class Upstream(NamedTuple):
    """∂loss/∂(statistic) of every row, [N] each; None where the loss has no such term."""

    logprobs: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor | None
    kl: Tensor | None

    SCHEMA = "Tensor? d_logprobs, Tensor? d_entropy, Tensor? d_logsumexp, Tensor? d_kl"


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    SCHEMA = "bool need_hidden, bool need_weight, bool need_bias"


Gradients = tuple[Tensor, Tensor, Tensor]


class TerminalLoss(NamedTuple):
    """A scalar loss of per-row log-probabilities, entropies and divergences."""

    row_gradients: Callable[[Sequence[Tensor]], Upstream]  # statistics -> the loss's gradient with respect to each
    rows_together: int  # consecutive rows whose gradients depend on one another's log-probabilities
    has_entropy: bool


class RowCoefficients(NamedTuple):
    """A row's part in ∂z = p (a + b log p) + c [v = target] + d_kl · (the divergence's own term); [n] each."""

    a: Tensor
    b: Tensor | None
    c: Tensor
    d_kl: Tensor | None

    @classmethod
    def of(cls, entropy: Tensor, upstream: Upstream, rows: Tensor) -> RowCoefficients:
        """Of the rows [n] (indices) of statistics and upstream scalars [N], in the statistics' dtype."""
        entropy = entropy[rows]
        c, d_entropy, d_logsumexp, d_kl = (None if g is None else g[rows].to(entropy.dtype) for g in upstream)
        if c is None:
            c = torch.zeros_like(entropy)
        a = -c if d_logsumexp is None else d_logsumexp - c
        if d_entropy is None:
            return cls(a, None, c, d_kl)
        return cls(a - d_entropy * entropy, -d_entropy, c, d_kl)


def regroup(arguments: tuple, *kinds: type) -> list:
    """An operator's flat arguments as the classes whose schemas they follow, in this order."""
    flat = iter(arguments)
    # `Problem` and `Options` are nested, and have a constructor of their own from flat arguments.
    return [getattr(kind, "of", kind)(*islice(flat, kind.SCHEMA.count(",") + 1)) for kind in kinds]


def empty_statistics(problem: Problem) -> list[Tensor]:
    """What an operator that returns statistics gives while it is only traced."""
    dtype = torch.promote_types(problem.policy.hidden.dtype, torch.float32)
    shape = problem.targets.shape
    return [problem.targets.new_empty(shape, dtype=dtype) for _ in range(4 if problem.reference is None else 8)]


def empty_gradients(policy: Head, needs: Needs) -> Gradients:
    """What an operator that returns gradients gives while it is only traced."""
    some = policy.weight
    return tuple(x.new_empty(x.shape) if needed else some.new_empty(0) for x, needed in zip(policy, needs, strict=True))


def contributing(targets: Tensor, upstream: Upstream) -> Tensor:
    """[N] bool: real rows with an upstream scalar that is not zero; the others have no gradient."""
    present = [g != 0 for g in upstream if g is not None]
    valid = targets >= 0
    return valid & torch.stack(present).any(0) if present else torch.zeros_like(valid)
