"""fisher_vector_product on the Triton kernels against the naive path in float64, which tests/test_fisher.py proves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.ops import triton_fisher

TRANSFORMS = [
    {},
    {"logit_scale": 0.3, "temperature": 1.3},
    {"softcap": 3.0, "logit_scale": -2.0, "temperature": 0.5},
]
ONE_TILE, SEVERAL_TILES, SEVERAL_BLOCKS = 2**25, 2**17, 2**10


def random_problem(n, d, v, device, *, bias=False, dtype=torch.float32):
    """hidden, weight, bias and a direction for each."""
    head = [2 * torch.randn(n, d), torch.randn(v, d) / math.sqrt(d), torch.randn(v) if bias else None]
    direction = [torch.randn(n, d), torch.randn(v, d) / math.sqrt(d), torch.randn(v) if bias else None]
    return [None if x is None else x.to(device, dtype) for x in (*head, *direction)]


def product(problem, row_weights, backend, budget=ONE_TILE, **transform):
    hidden, weight, bias, d_hidden, d_weight, d_bias = problem
    with fastppo.scratch_budget(budget):
        return fastppo.fisher_vector_product(
            hidden, weight, d_hidden, d_weight, bias=bias, d_bias=d_bias, row_weights=row_weights, backend=backend,
            **transform,
        )  # fmt: skip


def check(problem, row_weights, budget=ONE_TILE, tolerance=3e-5, **transform):
    out = product(problem, row_weights, "triton", budget, **transform)
    doubles = [None if x is None else x.double() for x in problem]
    exact = product(doubles, row_weights.double(), "reference", **transform)
    for got, want in zip(out, exact, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            scale = max(want.abs().max().item(), 1e-6) if want.numel() else 1.0
            torch.testing.assert_close(got.double(), want, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("moves", ["hidden", "hidden and weight", "all"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_product(device, moves, transform):
    problem = random_problem(67, 19, 203, device, bias=True)
    if moves != "all":
        problem[5] = None
    if moves == "hidden":
        problem[4] = None
    row_weights = torch.rand(67, device=device)
    row_weights[::5] = 0
    check(problem, row_weights, **transform)


@pytest.mark.parametrize(("budget", "rows", "vocab"), [(SEVERAL_TILES, 40, 600), (SEVERAL_BLOCKS, 150, 70)])
def test_any_budget_gives_the_same(device, budget, rows, vocab):
    row_weights = torch.rand(rows, device=device) / rows
    check(random_problem(rows, 8, vocab, device, bias=True), row_weights, budget)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(0, 50),
    d=st.integers(1, 40),
    v=st.integers(1, 150),
    bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, n, d, v, bias, transform, masked, seed):
    torch.manual_seed(seed)
    row_weights = torch.rand(n, device=device)
    row_weights[torch.rand(n) < masked] = 0
    check(random_problem(n, d, v, device, bias=bias), row_weights, **transform)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_storage_and_small_weights(device, dtype):
    """g of a mean over many tokens is below float16's smallest number; a power of two lifts it."""
    problem = random_problem(61, 48, 307, device, bias=True, dtype=dtype)
    check(problem, 1e-4 * torch.rand(61, device=device), tolerance=0.02)


def test_weights_of_any_strides_and_padding_of_any_content(device):
    hidden, weight, _, d_hidden, d_weight, _ = random_problem(40, 24, 90, device)
    row_weights = torch.rand(40, device=device)
    row_weights[7] = 0
    turned = [hidden.T.contiguous().T, weight.T.contiguous().T, None, d_hidden, d_weight.T.contiguous().T, None]
    check(turned, row_weights)
    want = product([hidden, weight, None, d_hidden, d_weight, None], row_weights, "triton")
    hidden[7], d_hidden[7] = torch.nan, torch.inf
    got = product([hidden, weight, None, d_hidden, d_weight, None], row_weights, "triton")
    assert torch.equal(got.hidden, want.hidden)
    assert torch.equal(got.weight, want.weight)


def test_operands_through_tensor_descriptors(device, monkeypatch):
    from fastppo_kernels.configs import GEMM
    from fastppo_kernels.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("the GPU's own configurations use descriptors where the chip has them")
    for kernel in ("fisher_statistics", "fisher_gradient", "fisher_statistics_weight", "fisher_gradient_weight"):
        config = GEMM[kernel]["interpreter", "ieee"]._replace(tma=True)
        monkeypatch.setitem(GEMM[kernel], ("interpreter", "ieee"), config)
    problem = random_problem(50, 20, 75, device, bias=True)
    row_weights = torch.rand(50, device=device)
    row_weights[3:20] = 0
    check(problem, row_weights, softcap=3.0)
    check([*problem[:4], None, None], row_weights)


def test_opcheck(device):
    hidden, weight, bias, d_hidden, d_weight, d_bias = random_problem(9, 8, 50, device, bias=True)
    tail = (torch.rand(9, device=device), 1.0, 1.0, 2.0, torch.float32, ONE_TILE)
    operator = triton_fisher.fisher_vector_product
    torch.library.opcheck(operator, (hidden, weight, bias, d_hidden, d_weight, d_bias, *tail))
    torch.library.opcheck(operator, (hidden, weight, None, d_hidden, None, None, *tail))
