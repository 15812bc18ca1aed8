"""The public operators with `backend="triton"` at the edges: see tests/edge_cases.py, which tests/ops runs as well."""

from __future__ import annotations

import math

import edge_cases
import pytest
import torch
from fastppo_kernels import loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are on the CPU, for the interpreter")
LOSSES = [{}, {"entropy_coef": 0.1, "kl_coef": 0.3, "kl_estimator": "k3"}]


@pytest.mark.parametrize("name", edge_cases.operators("triton"))
def test_what_is_left_out_changes_nothing(name):
    edge_cases.what_is_left_out_changes_nothing(*edge_cases.operators("triton")[name], garbage=(math.nan,))


def test_rows_without_a_gradient_give_none():
    edge_cases.rows_without_a_gradient_give_none("triton")


def test_a_ruled_out_target_has_no_probability():
    edge_cases.a_ruled_out_target_has_no_probability("triton")


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_ruled_out_target_in_the_loss(options, whole_rows, monkeypatch):
    choose = loss.choose_tiling
    monkeypatch.setattr(loss, "choose_tiling", lambda *x, **y: choose(*x, **y)._replace(whole=whole_rows, rows=7))
    edge_cases.a_ruled_out_target_in_the_loss("triton", **options)


def test_a_ruled_out_target_in_the_loss_with_an_exact_divergence():
    edge_cases.a_ruled_out_target_in_the_loss("triton", kl_coef=0.3, kl_estimator="exact")


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_a_ruled_out_token_in_a_divergence(kind):
    edge_cases.a_ruled_out_token_in_a_divergence("triton", kind)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_far_log_ratios(estimator):
    edge_cases.far_log_ratios("triton", estimator)


def test_dtypes_may_differ():
    edge_cases.dtypes_may_differ("triton", torch.float32, torch.float64)


def test_results_stay_in_range():
    edge_cases.results_stay_in_range("triton", rows=2, vocab=150)
