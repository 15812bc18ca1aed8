"""fisher_vector_product against an explicit dense Fisher matrix in float64, and what a Fisher matrix has to be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo

BACKENDS = ["reference", "chunked"]
TINY_BUDGET = 2**14  # forces several blocks of rows and many vocabulary tiles at test sizes
TRANSFORMS = [
    {},
    {"logit_scale": 0.3, "temperature": 1.3},
    {"softcap": 5.0},
    {"softcap": 3.0, "logit_scale": -2.0, "temperature": 0.5},
]


def random_problem(n, d, v, *, dtype=torch.float32, bias=False, generator=None):
    """hidden, weight, bias and a direction for each."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = [2 * randn(n, d), randn(v, d) / math.sqrt(d), randn(v) if bias else None]
    direction = [randn(n, d), randn(v, d) / math.sqrt(d), randn(v) if bias else None]
    return [None if x is None else x.to(dtype) for x in (*head, *direction)]


def dense(problem, row_weights, transform):
    """The product with the explicit matrix Σ w Jᵀ (diag(p) − p pᵀ) J: Jacobians by autograd, a row at a time."""
    hidden, weight, bias, *direction = (None if x is None else x.double() for x in problem)
    n, vocab = hidden.shape[0], weight.shape[0]
    temperature, scale, softcap = (
        transform.get(k, c) for k, c in (("temperature", 1), ("logit_scale", 1), ("softcap", None))
    )

    def logits(h, w, b):
        x = (w @ h + (0 if b is None else b)) * scale
        return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature

    out = [torch.zeros_like(hidden), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)]
    for row in range(n):
        if row_weights[row] == 0:
            continue
        inputs = [hidden[row], weight] + ([] if bias is None else [bias])
        moves = [direction[0][row], direction[1]] + ([] if bias is None else [direction[2]])
        jacobians = torch.autograd.functional.jacobian(lambda h, w, b=None: logits(h, w, b), tuple(inputs))
        p = torch.softmax(logits(hidden[row], weight, bias), 0)
        fisher = torch.diag(p) - torch.outer(p, p)
        dz = sum(j.reshape(vocab, -1) @ m.reshape(-1) for j, m in zip(jacobians, moves, strict=True))
        for k, jacobian in enumerate(jacobians):
            product = row_weights[row].double() * (jacobian.reshape(vocab, -1).T @ (fisher @ dz))
            product = product.view(inputs[k].shape)
            if k == 0:
                out[0][row] = product
            else:
                out[k] += product
    return out


def product(problem, row_weights, backend, transform, budget=TINY_BUDGET):
    hidden, weight, bias, d_hidden, d_weight, d_bias = problem
    with fastppo.scratch_budget(budget):
        return fastppo.fisher_vector_product(
            hidden, weight, d_hidden, d_weight, bias=bias, d_bias=d_bias, row_weights=row_weights, backend=backend,
            **transform,
        )  # fmt: skip


def inner(a, b):
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True) if x is not None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("budget", [TINY_BUDGET, 2**25])
def test_it_is_the_dense_fisher_matrix_times_the_direction(backend, bias, transform, budget):
    problem = random_problem(13, 7, 211, bias=bias)
    row_weights = torch.rand(13)
    row_weights[::4] = 0
    out = product(problem, row_weights, backend, transform, budget)
    for got, want in zip(out, dense(problem, row_weights, transform), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            scale = want.abs().max().item()
            torch.testing.assert_close(got.double(), want, atol=3e-5 * scale, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 23),
    d=st.integers(1, 17),
    v=st.integers(1, 90),
    bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    masked=st.floats(0, 1),
    budget=st.sampled_from([1, 3000, TINY_BUDGET, 2**25]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_the_naive_path_in_float64(n, d, v, bias, transform, masked, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    problem = random_problem(n, d, v, bias=bias, generator=generator, dtype=torch.float64)
    row_weights = torch.rand(n, generator=generator, dtype=torch.float64)
    row_weights[torch.rand(n, generator=generator) < masked] = 0
    outputs = [product(problem, row_weights, backend, transform, budget) for backend in BACKENDS]
    for a, b in zip(*outputs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_it_is_symmetric_and_positive_semidefinite(transform):
    problem, other = random_problem(17, 9, 133, bias=True), random_problem(17, 9, 133, bias=True)
    row_weights = torch.rand(17)
    x, y = problem[3:], other[3:]
    f_x = product(problem, row_weights, "chunked", transform)
    f_y = product([*problem[:3], *y], row_weights, "chunked", transform)
    bound = math.sqrt(inner(x, f_x) * inner(y, f_y))  # Cauchy-Schwarz
    assert abs(inner(y, f_x) - inner(x, f_y)) <= 1e-5 * bound
    assert abs(inner(y, f_x)) <= bound
    assert inner(x, f_x) > 0


def test_directions_that_do_not_change_the_distribution_vanish():
    """The same row added to every weight vector, or number to every bias, moves all logits alike."""
    hidden, weight, bias, *_ = random_problem(11, 5, 77, bias=True)
    shift = torch.randn(1, 5).expand(77, 5).contiguous()
    out = fastppo.fisher_vector_product(
        hidden, weight, torch.zeros_like(hidden), 1e3 * shift, bias=bias, d_bias=torch.full_like(bias, 1e3)
    )
    for field in out:
        assert field.abs().max() < 2e-2  # of directions of size 1e3


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_hessian_of_the_kl(backend):
    """Second derivative of KL(π_old ‖ π) at π = π_old, which is what TRPO asks for (Schulman et al., 2015)."""
    hidden, weight, _, d_hidden, d_weight, _ = random_problem(6, 4, 23, dtype=torch.float64)
    old = torch.log_softmax(hidden @ weight.T, -1)

    def kl(h, w):
        return (old.exp() * (old - torch.log_softmax(h @ w.T, -1))).sum()

    _, want = torch.autograd.functional.hvp(kl, (hidden, weight), (d_hidden, d_weight))
    out = fastppo.fisher_vector_product(hidden, weight, d_hidden, d_weight, backend=backend)
    torch.testing.assert_close(out.hidden, want[0])
    torch.testing.assert_close(out.weight, want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [TINY_BUDGET, 2**25])
def test_low_precision_stays_within_the_naive_error(dtype, budget):
    problem, row_weights = random_problem(61, 48, 517, dtype=dtype, bias=True), torch.rand(61) / 61
    fused, naive = (product(problem, row_weights, backend, {}, budget) for backend in ("chunked", "reference"))
    doubles = [x.double() for x in problem]
    exact = product(doubles, row_weights.double(), "reference", {})
    slack = 0.01 if dtype == torch.bfloat16 else 0.002
    for got, plain, want in zip(fused, naive, exact, strict=True):
        assert got.dtype == dtype
        error, allowed = (x.double().sub(want).abs().max() for x in (got, plain))
        assert error <= 1.5 * allowed + slack * want.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes_masks_and_what_stands_at_padding(backend):
    hidden, weight, bias, d_hidden, d_weight, d_bias = random_problem(12, 6, 41, bias=True)
    mask = torch.rand(3, 4) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    whole = product([hidden, weight, bias, d_hidden, d_weight, d_bias], mask.flatten().float(), backend, {})
    hidden, d_hidden = (x.view(3, 4, 6).masked_fill(~mask.unsqueeze(-1), torch.nan) for x in (hidden, d_hidden))
    out = fastppo.fisher_vector_product(
        hidden, weight, d_hidden, d_weight, bias=bias, d_bias=d_bias, mask=mask, backend=backend
    )
    assert out.hidden.shape == (3, 4, 6)
    torch.testing.assert_close(out.hidden.view(12, 6), whole.hidden)
    torch.testing.assert_close(out.weight, whole.weight)
    torch.testing.assert_close(out.bias, whole.bias)
    assert (out.hidden[~mask] == 0).all()
    frozen = fastppo.fisher_vector_product(hidden, weight, d_hidden, bias=bias, mask=mask, backend=backend)
    still = fastppo.fisher_vector_product(
        hidden, weight, d_hidden, torch.zeros_like(weight), bias=bias, mask=mask, backend=backend
    )
    assert frozen.weight is None
    assert frozen.bias is None
    torch.testing.assert_close(frozen.hidden, still.hidden)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_count_gives_zeros(backend, rows):
    hidden, weight, _, d_hidden, d_weight, _ = random_problem(rows, 6, 41)
    out = fastppo.fisher_vector_product(
        hidden, weight, d_hidden, d_weight, mask=torch.zeros(rows, dtype=torch.bool), backend=backend
    )
    assert out.hidden.shape == (rows, 6)
    assert (out.hidden == 0).all()
    assert (out.weight == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_common_offset_of_the_logits_changes_nothing(backend):
    hidden, weight, bias, *direction = random_problem(9, 6, 83, bias=True, dtype=torch.float64)
    row_weights = torch.rand(9)
    plain = product([hidden, weight, bias, *direction], row_weights.double(), backend, {})
    for offset in (1e4, -1e4):
        # float32 keeps 1e-3 of a logit at 1e4; what is asked is that nothing more is lost.
        rounded = (bias + offset).float().double() - offset
        want = product([hidden, weight, rounded, *direction], row_weights.double(), "reference", {})
        shifted = [x.float() for x in (hidden, weight, bias + offset, *direction)]
        for got, exact, before in zip(product(shifted, row_weights, backend, {}), want, plain, strict=True):
            assert (got.double() - exact).abs().max() <= 5e-3 * before.abs().max()


def test_it_compiles_whole_and_passes_opcheck():
    problem = random_problem(9, 8, 50, bias=True)
    hidden, weight, bias, d_hidden, d_weight, d_bias = problem
    weight = weight.requires_grad_()  # a parameter

    def middle(h, dh, dw):
        out = fastppo.fisher_vector_product(h, weight, dh, dw, bias=bias, d_bias=d_bias)
        return out.hidden * 2, out.weight, out.bias

    compiled = torch.compile(middle, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(hidden, d_hidden, d_weight), middle(hidden, d_hidden, d_weight), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    operator = torch.ops.fastppo.fisher_vector_product
    tail = (torch.rand(9), 1.0, 1.0, 2.0, torch.float32, TINY_BUDGET, "chunked")
    torch.library.opcheck(operator, (hidden, weight.detach(), bias, d_hidden, d_weight, d_bias, *tail))
    torch.library.opcheck(operator, (hidden, weight.detach(), None, d_hidden, None, None, *tail))


def test_inputs_that_require_gradients_are_taken_and_left_alone():
    hidden, weight, _, d_hidden, d_weight, _ = random_problem(5, 4, 20)
    for backend in BACKENDS:
        before = [x.clone() for x in (hidden, weight, d_hidden, d_weight)]
        out = fastppo.fisher_vector_product(
            *(x.requires_grad_() for x in (hidden, weight, d_hidden, d_weight)), backend=backend
        )
        assert not out.hidden.requires_grad
        assert not out.weight.requires_grad
        for x, y in zip((hidden, weight, d_hidden, d_weight), before, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d_hidden": torch.zeros(5, 3)}, ValueError, "d_hidden: expected shape"),
        ({"d_hidden": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "d_hidden: expected torch.float32"),
        ({"d_hidden": None}, TypeError, "d_hidden: expected a torch.Tensor"),
        ({"d_weight": torch.zeros(19, 4)}, ValueError, "d_weight: expected shape"),
        ({"d_bias": torch.zeros(20)}, ValueError, "d_bias: there is no bias"),
        ({"bias": torch.zeros(20), "d_bias": torch.zeros(19)}, ValueError, "d_bias: expected shape"),
        ({"row_weights": torch.full((5,), torch.inf)}, ValueError, "row_weights: expected finite"),
        ({"row_weights": torch.ones(4)}, ValueError, "row_weights: expected shape"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"backend": "cpu"}, ValueError, "fisher_vector_product has no 'cpu'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden": torch.randn(5, 4), "weight": torch.randn(20, 4), "d_hidden": torch.zeros(5, 4)} | change
    with pytest.raises(error, match=message):
        fastppo.fisher_vector_product(**arguments)
