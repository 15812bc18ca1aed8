"""selective_logprob on the Triton kernels against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.ops import selective_logprob as ops

TRANSFORMS = [{}, {"logit_scale": 0.3, "temperature": 1.3}, {"softcap": 3.0, "logit_scale": 2.0, "temperature": 0.5}]


def check(device, n, v, transform, masked, *, dtype=torch.float32, inplace=False, zeroed=0.3, tolerance=2e-5):
    logits = (4 * torch.randn(n, v)).to(device, dtype)
    targets = torch.randint(0, v, (n,), device=device)
    targets[torch.rand(n) < masked] = -7
    upstream = torch.randn(3, n, device=device)
    upstream[:, torch.rand(n) < zeroed] = 0
    leaf = logits.clone().requires_grad_()
    out = fastppo.selective_logprob(
        leaf * 1.0, targets, ignore_index=-7, return_entropy=True, inplace_backward=inplace, backend="triton",
        **transform,
    )  # fmt: skip
    sum((g * o).sum() for g, o in zip(upstream, out, strict=True)).backward()

    exact = logits.cpu().double().requires_grad_()
    z = oracle.logits(exact, torch.eye(v, dtype=torch.float64), **transform)
    values, total = torch.zeros(3, n, dtype=torch.float64), exact.sum() * 0
    for row in (targets.cpu() != -7).nonzero().flatten().tolist():
        for k, value in enumerate(oracle.row(z[row], targets[row])):
            values[k, row] = value.detach()
            total = total + upstream[k, row].double().cpu() * value
    total.backward()
    for got, want in zip(out, values, strict=True):
        torch.testing.assert_close(got.detach().double().cpu(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(leaf.grad.double().cpu(), exact.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_and_gradients(device, transform, inplace):
    check(device, 23, 77, transform, 0.2, inplace=inplace)


def test_rows_longer_than_a_block(device):
    check(device, 5, 9001, {}, 0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_logits(device, dtype, tolerance):
    check(device, 17, 301, {}, 0.2, dtype=dtype, tolerance=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 20),
    v=st.integers(1, 70),
    transform=st.sampled_from(TRANSFORMS),
    masked=st.floats(0, 1),
    inplace=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, n, v, transform, masked, inplace, seed):
    torch.manual_seed(seed)
    check(device, n, v, transform, masked, inplace=inplace, tolerance=5e-5)


def test_in_place_means_in_place(device):
    logits = torch.randn(6, 40, device=device)
    targets = torch.randint(0, 40, (6,), device=device)
    leaf = logits.clone().requires_grad_()
    view = leaf * 1.0
    out = fastppo.selective_logprob(view, targets, inplace_backward=True, backend="triton").logprobs
    before = view.detach().clone()
    out.sum().backward()
    assert not torch.equal(view.detach(), before)
    torch.testing.assert_close(view.detach(), leaf.grad)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_changes_nothing(device, offset):
    logits = (torch.randn(8, 50, device=device) * 64).round() / 64
    targets = torch.randint(0, 50, (8,), device=device)
    plain, moved = (
        fastppo.selective_logprob(x, targets, return_entropy=True, backend="triton") for x in (logits, logits + offset)
    )
    torch.testing.assert_close(plain.logprobs, moved.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain.entropy, moved.entropy, atol=1e-4, rtol=1e-4)


def test_masked_columns_and_ignored_rows(device):
    logits = torch.randn(8, 50, device=device)
    logits[:, 5:45] = -torch.inf
    logits[3] = float("nan")
    targets = torch.randint(0, 5, (8,), device=device)
    targets[3] = -100
    leaf = logits.clone().requires_grad_()
    out = fastppo.selective_logprob(leaf, targets, return_entropy=True, backend="triton")
    (out.logprobs + out.entropy).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad[3].abs().max() == 0
    assert leaf.grad[:, 5:45].abs().max() == 0
    assert (out.logprobs <= 0).all()


def test_the_operators_keep_their_contract(device):
    logits, targets = torch.randn(5, 30, device=device), torch.randint(0, 30, (5,), device=device)
    options, checks = (1.0, 1.0, None, 2**20, "triton"), ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._statistics, (logits, targets, *options), test_utils=checks)
    saved = ops._statistics(logits, targets, *options)
    upstream = (torch.randn(5, device=device), None, torch.randn(5, device=device))
    for op in (ops._vjp, ops._vjp_):
        torch.library.opcheck(op, (logits.clone(), targets, saved, *upstream, *options), test_utils=checks)
