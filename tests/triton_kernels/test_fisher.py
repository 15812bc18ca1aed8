"""fisher_vector_product of the Triton kernels against the dense product in float64, by automatic differentiation."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from compilations import compilations
from fastppo_kernels.fisher import fisher_vector_product
from fastppo_kernels.products import power_of_two_scale
from fastppo_kernels.products import product as matrix_product
from hypothesis import given, settings
from hypothesis import strategies as st

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


def product(problem, row_weights, budget=ONE_TILE, compute_dtype=None, **transform):
    """Hidden's, weight's and bias's product, by default computed in hidden's dtype."""
    transform = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None, **transform}
    compute_dtype = compute_dtype or problem[0].dtype
    return fisher_vector_product(*problem, row_weights, **transform, compute_dtype=compute_dtype, budget=budget)


def dense_product(problem, row_weights, **transform):
    """Jᵀ diag(w) (diag(p) − p pᵀ) J v of real rows, empty for what is constant."""
    real = row_weights != 0
    hidden, weight, bias, d_hidden, d_weight, d_bias = (None if x is None else x.double() for x in problem)
    present = {"hidden": (hidden[real], d_hidden[real])}
    if d_weight is not None:
        present["weight"] = (weight, d_weight)
    if d_bias is not None:
        present["bias"] = (bias, d_bias)
    constant = {"hidden": hidden, "weight": weight, "bias": bias}

    def logits(*moving):
        return oracle.logits(**{**constant, **dict(zip(present, moving, strict=True))}, **transform)

    point, direction = zip(*present.values(), strict=True)
    z, dz = torch.func.jvp(logits, point, direction)
    p = torch.softmax(z, -1)
    g = row_weights[real].double()[:, None] * p * (dz - (p * dz).sum(-1, keepdim=True))
    found = dict(zip(present, torch.func.vjp(logits, *point)[1](g), strict=True))
    out_hidden = torch.zeros_like(hidden)
    out_hidden[real] = found["hidden"]
    empty = hidden.new_zeros(0)
    return out_hidden, found.get("weight", empty), found.get("bias", empty)


def check(problem, row_weights, budget=ONE_TILE, tolerance=3e-5, compute_dtype=None, **transform):
    got = product(problem, row_weights, budget, compute_dtype, **transform)
    exact = dense_product(problem, row_weights, **transform)
    for name, x, want in zip(("hidden", "weight", "bias"), got, exact, strict=True):
        assert x.shape == want.shape, name
        scale = max(want.abs().max().item(), 1e-12) if want.numel() else 1.0
        torch.testing.assert_close(x.double(), want, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


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


@pytest.mark.parametrize(
    ("budget", "rows", "dim", "vocab"),
    [(SEVERAL_TILES, 40, 8, 600), (SEVERAL_BLOCKS, 150, 8, 70), (2**18, 261, 5, 1100)],
)
def test_any_budget_gives_the_same(device, budget, rows, dim, vocab):
    """Several slices of the vocabulary, several blocks of rows, both; a slice of several tiles each."""
    row_weights = torch.rand(rows, device=device) / rows
    row_weights[rows // 2 :: 3] = 0
    check(random_problem(rows, dim, vocab, device, bias=True), row_weights, budget)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(0, 50),
    d=st.integers(1, 96),
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


def test_no_row_that_counts_gives_zeros(device):
    out = product(random_problem(33, 8, 70, device, bias=True), torch.zeros(33, device=device))
    assert [x.shape for x in out] == [(33, 8), (70, 8), (70,)]
    assert all(not x.any() for x in out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_storage_and_small_weights(device, dtype):
    """g of a mean over many tokens is below float16's smallest number; a power of two lifts it."""
    problem = random_problem(61, 48, 307, device, bias=True, dtype=dtype)
    check(problem, 1e-4 * torch.rand(61, device=device), tolerance=0.02)


def test_float16_products(device, monkeypatch):
    """In the interpreter too, where products are in float32 unless told otherwise: g itself would be 0 in float16."""
    monkeypatch.setattr("fastppo_kernels.fisher.interpreted_dtype", lambda dtype: dtype)
    problem = random_problem(61, 37, 600, device, bias=True)
    row_weights = 1e-7 * torch.rand(61, device=device)
    row_weights[5:30] = 0
    check(problem, row_weights, SEVERAL_TILES, tolerance=0.01, compute_dtype=torch.float16)


def misaligned(x):
    """The same values, one element into a buffer."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def transposed(x):
    return x.T.contiguous().T


@pytest.mark.parametrize("budget", [ONE_TILE, SEVERAL_TILES])
@pytest.mark.parametrize("lay", [transposed, misaligned, torch.Tensor.half])
def test_weights_however_they_lie(device, lay, budget):
    """A float16 weight beside float32 hidden states stands for any other dtype than the products'."""
    hidden, weight, bias, d_hidden, d_weight, d_bias = random_problem(40, 24, 600, device, bias=True)
    row_weights = torch.rand(40, device=device)
    row_weights[7] = 0
    tolerance = 1e-3 if lay is torch.Tensor.half else 3e-5  # the result is in the weight's dtype
    check([hidden, lay(weight), bias, d_hidden, d_weight, d_bias], row_weights, budget, tolerance)
    check([hidden, weight, bias, d_hidden, lay(d_weight), d_bias], row_weights, budget)
    check([hidden, lay(weight), bias, transposed(d_hidden), None, None], row_weights, budget)
    check([transposed(hidden), weight, misaligned(bias), d_hidden, None, d_bias], row_weights, budget)


def test_padding_of_any_content(device):
    problem = random_problem(40, 24, 90, device)
    row_weights = torch.rand(40, device=device)
    row_weights[7] = 0
    want = product(problem, row_weights)
    problem[0][7], problem[3][7] = torch.nan, torch.inf
    for got, clean in zip(product(problem, row_weights), want, strict=True):
        assert torch.equal(got, clean)


def test_tokens_that_are_ruled_out(device):
    """Logits of −∞, over whole tiles: they have no probability, and no share in any product."""
    problem = random_problem(40, 24, 150, device, bias=True)
    alive = torch.ones(150, dtype=torch.bool, device=device)
    alive[:70], alive[100:103] = False, False
    problem[2][~alive] = -torch.inf
    row_weights = torch.rand(40, device=device)
    got = product(problem, row_weights)
    fewer = [x if x.shape[0] == 40 else x[alive] for x in problem]
    want = dense_product(fewer, row_weights)
    torch.testing.assert_close(got[0].double(), want[0], atol=3e-5 * want[0].abs().max().item(), rtol=0)
    for x, y in zip(got[1:], want[1:], strict=True):
        assert not x[~alive].any()
        torch.testing.assert_close(x[alive].double(), y, atol=3e-5 * y.abs().max().item(), rtol=0)


def test_a_common_offset_of_the_logits_changes_nothing(device):
    problem = random_problem(40, 24, 150, device, bias=True)
    row_weights = torch.rand(40, device=device)
    want = dense_product(problem, row_weights)
    problem[2] += 1000.0
    for x, y in zip(product(problem, row_weights), want, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-3 * y.abs().max().item(), rtol=0)


def test_one_compilation_serves_any_number_of_rows():
    def run(n):
        def meta(*shape):
            return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

        weights = torch.empty(n, device="meta")
        fisher_vector_product(
            meta(n, 896), meta(5056, 896), meta(5056), meta(n, 896), meta(5056, 896), meta(5056), weights,
            1.0, 1.0, None, torch.bfloat16, 2**22,
        )  # fmt: skip

    found = compilations(run, (16, 17, 1, 48, 1000, 4096))
    for kernel in ("fisher_statistics_kernel", "fisher_gradient_kernel", "combine_fisher_kernel"):
        assert len(found[kernel]) == 1, kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matrix_products_are_summed_in_float32(device, dtype):
    a, b = torch.randn(33, 70, device=device).to(dtype), torch.randn(70, 21, device=device).to(dtype)
    before = torch.randn(33, 21, device=device)
    want, out = a.double() @ b.double(), before.clone()
    matrix_product(out, a, b, accumulate=True)
    torch.testing.assert_close(out.double(), before.double() + want, atol=1e-4, rtol=0)
    matrix_product(out.fill_(torch.nan), a, b, accumulate=False)
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=0)
    own = torch.full_like(out, torch.nan, dtype=dtype)
    matrix_product(own, a, b, accumulate=False)
    torch.testing.assert_close(own.double(), want, atol=1e-4 if dtype == torch.float32 else 0.03, rtol=0)


def test_the_scale_of_float16_is_a_power_of_two(device):
    x = torch.tensor([0.0, -3e-5, 1e-6], device=device)
    assert power_of_two_scale([x, None], 1.0).tolist() == [2.0**16]
    assert power_of_two_scale([x, 5 * x.new_ones(2)], 1.0).tolist() == [0.25]
    for other in (0.0, torch.inf, torch.nan):
        assert power_of_two_scale([x.new_full((3,), other)], 1.0).tolist() == [1.0]
    tiny = power_of_two_scale([x.new_full((3,), 1e-42)], 1.0)
    assert tiny.isfinite().all()
    assert (1 / tiny).item() > 0


def test_opcheck(device):
    operator = torch.ops.fastppo.fisher_vector_product
    problem = random_problem(9, 8, 50, device, bias=True)
    tail = (torch.rand(9, device=device), 1.0, 1.0, 2.0, torch.float32, ONE_TILE, "triton")
    hidden, weight, _, d_hidden, _, _ = problem
    torch.library.opcheck(operator, (*problem, *tail))
    torch.library.opcheck(operator, (hidden, weight, None, d_hidden, None, None, *tail))


def test_biases_of_any_strides(device):
    problem = random_problem(9, 16, 50, device, bias=True)
    for place in (2, 5):
        problem[place] = torch.stack([problem[place], torch.full_like(problem[place], torch.nan)], 1)[:, 0]
    check(problem, torch.rand(9, device=device))
