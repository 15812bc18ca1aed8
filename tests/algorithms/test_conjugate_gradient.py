"""Conjugate gradients against a direct solve, and the line search's decisions."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.algorithms.config import TRPOConfig
from fastppo.algorithms.second_order.conjugate_gradient import conjugate_gradient
from fastppo.algorithms.trpo import TRPO, Trial


def split(vector, sizes):
    parts = vector.split(sizes)
    return {f"p{i}": part.reshape(1, -1) for i, part in enumerate(parts)}


def joined(parts):
    return torch.cat([part.flatten() for part in parts.values()])


def problem(size, condition, dtype=torch.float64):
    """A random symmetric positive definite A with eigenvalues from 1 to `condition`, b, and how they are cut up."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    eigenvalues = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    a = (basis * eigenvalues) @ basis.T
    sizes = [size // 3, 1, size - size // 3 - 1]
    return a.to(dtype), torch.randn(size, dtype=dtype), sizes


def test_it_solves_what_a_direct_solver_solves():
    a, b, sizes = problem(23, 100.0)
    given = split(b, sizes)
    kept = joined(given).clone()
    out = conjugate_gradient(lambda v: split(a @ joined(v), sizes), given, max_iterations=60, relative_tolerance=1e-12)
    torch.testing.assert_close(joined(out.x), torch.linalg.solve(a, b), rtol=1e-9, atol=1e-10)
    assert out.relative_residual <= 1e-12
    assert (b - a @ joined(out.x)).norm() <= 1e-11 * b.norm()
    assert torch.equal(joined(given), kept)


def test_it_ends_after_as_many_steps_as_there_are_different_eigenvalues():
    a = torch.diag(torch.tensor([2.0] * 7 + [5.0] * 4, dtype=torch.float64))
    b = torch.rand(11, dtype=torch.float64) + 0.1
    out = conjugate_gradient(lambda v: {"x": a @ v["x"]}, {"x": b}, max_iterations=11, relative_tolerance=1e-10)
    assert out.iterations == 2


def test_the_stop_is_relative_to_the_right_hand_side():
    a, b, sizes = problem(30, 1e4)
    for scale in (1e-6, 1.0, 1e6):
        out = conjugate_gradient(
            lambda v: split(a @ joined(v), sizes), split(scale * b, sizes), max_iterations=500, relative_tolerance=0.1
        )
        residual = (scale * b - a @ joined(out.x)).norm() / (scale * b).norm()
        assert residual <= 0.1 * (1 + 1e-6)
        assert 0 < out.iterations < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_stay_in_the_precision_of_the_right_hand_side(dtype):
    a, b, sizes = problem(17, 10.0, torch.float32)
    seen = []

    def product(v):
        seen.append({tensor.dtype for tensor in v.values()})
        return split(a @ joined(v).float(), sizes)

    out = conjugate_gradient(product, split(b.to(dtype), sizes), max_iterations=12)
    assert {tensor.dtype for tensor in out.x.values()} == {dtype}
    assert all(dtypes == {dtype} for dtypes in seen)
    error = (joined(out.x).float() - torch.linalg.solve(a, b)).norm() / torch.linalg.solve(a, b).norm()
    assert error < (1e-3 if dtype == torch.float32 else 0.3)


def test_any_iterate_is_a_direction_of_ascent():
    a, b, sizes = problem(25, 1e5)
    for iterations in (1, 2, 5):
        out = conjugate_gradient(lambda v: split(a @ joined(v), sizes), split(b, sizes), max_iterations=iterations)
        assert joined(out.x) @ b > 0


def test_nothing_to_solve():
    out = conjugate_gradient(lambda v: v, {"x": torch.zeros(3)}, max_iterations=5)
    assert out.iterations == 0
    assert torch.equal(out.x["x"], torch.zeros(3))
    singular = conjugate_gradient(lambda v: {"x": 0 * v["x"]}, {"x": torch.ones(3)}, max_iterations=5)
    assert torch.equal(singular.x["x"], torch.zeros(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value):
    with pytest.raises(FloatingPointError, match="right-hand side"):
        conjugate_gradient(lambda v: v, {"x": torch.tensor([1.0, value])}, max_iterations=5)
    with pytest.raises(FloatingPointError, match="product 1"):
        conjugate_gradient(lambda v: {"x": v["x"] * value}, {"x": torch.ones(2)}, max_iterations=5)


def search(trials, **options):
    seen = []

    def evaluate(fraction):
        seen.append(fraction)
        return Trial(*trials[len(seen) - 1])

    config = TRPOConfig(max_kl=0.1, line_search_steps=len(trials), **options)
    return TRPO(config).choose(evaluate, expected_improvement=1.0), seen


def test_the_first_good_fraction_is_taken():
    nan = float("nan")
    found, seen = search(
        [(-1.0, 0.05), (nan, 0.05), (1.0, nan), (1.0, 0.9), (0.5, 0.1), (9.0, 0.0)], line_search_shrink=0.5
    )
    assert seen == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.125 * 0.95 / 3.0])
    assert found == (seen[-1], (0.5, 0.1))
    assert len(seen) == 5


def test_a_step_that_is_only_a_little_too_long_is_only_shortened_a_little():
    found, _ = search([(1.0, 0.1001), (1.0, 0.09)])
    assert found[0] == pytest.approx(0.95, abs=0.001)


def test_too_little_of_what_was_expected_is_not_enough():
    found, _ = search([(0.09, 0.0), (0.05, 0.0)], accept_ratio=0.1, line_search_shrink=0.5)
    assert found[0] == 0.5  # half a step need only bring half as much
    assert search([(0.0, 0.0)], accept_ratio=0.0)[0] == (0.0, (0.0, 0.0))  # no rise at all is never enough


def test_a_search_that_fails_says_so():
    found, seen = search([(-1.0, 0.2)] * 4, line_search_shrink=0.8)
    assert found == (0.0, (0.0, 0.0))
    assert seen == pytest.approx([1.0, 0.8, 0.64, 0.512])
