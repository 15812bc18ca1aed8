"""Tokens that are left out, ruled out or far out, mixed dtypes and ranges: the same on every backend."""

from __future__ import annotations

import edge_cases
import pytest
import torch

from fastppo.engines import extension

BUILT = pytest.mark.skipif(extension.load() is None, reason=extension.why_missing() or "")
BACKENDS = ["reference", "chunked", pytest.param("cpu", marks=BUILT)]
LOSSES = [
    {},
    {"entropy_coef": 0.1},
    *({"kl_coef": 0.3, "kl_estimator": estimator, "entropy_coef": 0.1} for estimator in ("k1", "k2", "k3", "exact")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_out_changes_nothing(backend):
    for operator, arguments in edge_cases.operators(backend).values():
        edge_cases.what_is_left_out_changes_nothing(operator, arguments)


@pytest.mark.parametrize("backend", BACKENDS[1:])  # the reference's gradient is 0 · NaN
def test_rows_without_a_gradient_give_none(backend):
    edge_cases.rows_without_a_gradient_give_none(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ruled_out_target_has_no_probability(backend):
    edge_cases.a_ruled_out_target_has_no_probability(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_ruled_out_target_in_the_loss(backend, options):
    edge_cases.a_ruled_out_target_in_the_loss(backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_a_ruled_out_token_in_a_divergence(backend, kind):
    edge_cases.a_ruled_out_token_in_a_divergence(backend, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_far_log_ratios(backend, estimator):
    edge_cases.far_log_ratios(backend, estimator)


DTYPES = [
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "other"), DTYPES)
def test_dtypes_may_differ(backend, dtype, other):
    edge_cases.dtypes_may_differ(backend, dtype, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_stay_in_range(backend):
    edge_cases.results_stay_in_range(backend)
