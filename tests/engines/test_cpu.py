"""The C++ kernels behind backend="cpu": every instruction set, extremes, tilings, threads and kept logits."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.engines import extension
from fastppo.engines.budget import held_bytes
from fastppo.engines.cpu import linear, products

pytestmark = pytest.mark.skipif(not products.PRODUCTS, reason=extension.why_missing() or products.why_slow() or "")

ISAS = extension.load().instruction_sets() if extension.load() else []


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(products, "isa", request.param)
    return request.param


def vector_math(function, x, isa):
    y = torch.empty_like(x)
    extension.load().vector_math(function, x, y, isa)
    return y


def every_kind_of_float():
    """Bit patterns spread evenly over all 2³², so every exponent and sign, NaN too; and the ends of each binade."""
    bits = np.arange(0, 2**32, 2039, dtype=np.uint64).astype(np.uint32)
    edges = np.arange(0, 2**32, 2**23, dtype=np.uint64)
    edges = np.concatenate([edges, edges + 1, edges + 2**23 - 1]).astype(np.uint32)
    return torch.from_numpy(np.concatenate([bits, edges]).view(np.float32))


@pytest.mark.parametrize("function", ["exp", "tanh"])
def test_elementary_functions_are_within_2_ulp_on_the_whole_range(function, isa):
    x = every_kind_of_float()
    got = vector_math(function, x, isa).double().numpy()
    with np.errstate(all="ignore"):
        want = getattr(np, function)(x.double().numpy())
        rounded = want.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded))
    np.testing.assert_array_equal(got[np.isinf(rounded)], rounded[np.isinf(rounded)])
    finite = np.isfinite(rounded)
    ulp = np.spacing(np.abs(rounded[finite])).astype(np.float64)
    assert np.isfinite(got[finite]).all()
    assert (np.abs(got[finite] - want[finite]) / ulp).max() <= 2.0


def case(n, d, v, dtype=torch.float32, scale=1.0, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator) * scale
    weight = torch.randn(v, d, generator=generator) / math.sqrt(d)
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def outputs_and_gradients(hidden, weight, targets, *, bias=None, backend="cpu", upstream, budget=2**25, **transform):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    b = None if bias is None else bias.clone().requires_grad_()
    with fastppo.scratch_budget(budget):
        out = fastppo.linear_logprob(h, w, targets, bias=b, return_entropy=True, backend=backend, **transform)
        sum((g * o).sum() for g, o in zip(upstream, out, strict=True)).backward()
    return [x.detach() for x in (*out, h.grad, w.grad, *([] if b is None else [b.grad]))]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 150),
    d=st.integers(1, 140),
    v=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 4.0]),
    with_bias=st.booleans(),
    masked=st.floats(0, 1),
    budget=st.sampled_from([1, 2**17, 2**25]),
    level=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_as_good_as_the_naive_path(n, d, v, dtype, softcap, with_bias, masked, budget, level, seed):
    hidden, weight, targets = case(n, d, v, dtype, 2.0, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    targets[torch.rand(n, generator=generator) < masked] = -100
    bias = torch.randn(v, generator=generator).to(dtype) if with_bias else None
    upstream = torch.randn(3, n, generator=generator)
    arguments = {"upstream": upstream, "softcap": softcap, "temperature": 0.8}
    before, products.isa = products.isa, level
    try:
        got = outputs_and_gradients(hidden, weight, targets, bias=bias, budget=budget, **arguments)
    finally:
        products.isa = before
    naive = outputs_and_gradients(hidden, weight, targets, bias=bias, backend="reference", **arguments)
    exact = outputs_and_gradients(
        hidden.double(), weight.double(), targets, bias=None if bias is None else bias.double(), backend="reference",
        **arguments,
    )  # fmt: skip
    slack = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for fused, plain, truth in zip(got, naive, exact, strict=True):
        scale = truth.abs().max().clamp(min=1.0) if truth.numel() else 1.0
        error = (fused.double() - truth).abs().max() if truth.numel() else 0.0
        allowed = (plain.double() - truth).abs().max() if truth.numel() else 0.0
        assert error <= 1.5 * allowed + slack * scale


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_instruction_set_has_every_divergence(kind, softcap, isa):
    hidden, weight, _ = case(70, 33, 150, scale=2.0)
    ref_hidden, ref_weight, _ = case(70, 70, 150, scale=2.0)
    upstream = torch.randn(70)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with fastppo.scratch_budget(2**17):
        kl = fastppo.linear_kl(h, w, ref_hidden, ref_weight, kind=kind, softcap=softcap, backend="cpu")
        (upstream * kl).sum().backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z, ref_z = (
        oracle.logits(h64, w64, softcap=softcap),
        oracle.logits(ref_hidden.double(), ref_weight.double(), softcap=softcap),
    )
    want = torch.stack([oracle.divergence(z[i], ref_z[i], kind) for i in range(70)])
    (upstream.double() * want).sum().backward()
    torch.testing.assert_close(kl.detach().double(), want.detach(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(h.grad.double(), h64.grad, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, atol=5e-5, rtol=5e-5)


def ppo(hidden, weight, targets, old, advantages, *, budget=2**25, backend="cpu", **options):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with fastppo.scratch_budget(budget):
        out = fastppo.linear_ppo_loss(h, w, targets, old, advantages, backend=backend, **options)
    out.loss.backward()
    return out.loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(150, 40), (40, 150)])  # a slot of logits is larger than its ∂W rows, or smaller
@pytest.mark.parametrize("budget", [2**16, 2**19, 2**25])  # none, some, all of the logits are kept
def test_kept_logits_give_the_gradients_of_recomputed_ones(dtype, n, d, budget, isa):
    v = 700
    hidden, weight, targets = case(n, d, v, dtype)
    now = fastppo.linear_logprob(hidden, weight, targets).logprobs
    old = now + 0.2 * torch.randn(n)
    advantages = torch.randn(n)
    advantages[::3] = 0.0
    mask = torch.rand(n) < 0.8
    options = {"entropy_coef": 0.0, "mask": mask}  # rows without a gradient are left out of the second pass
    exact = ppo(hidden.double(), weight.double(), targets, old, advantages, backend="reference", **options)
    naive = ppo(hidden, weight, targets, old, advantages, backend="reference", **options)
    got = ppo(hidden, weight, targets, old, advantages, budget=budget, **options)
    # The loss is a mean of terms as large as the advantages that all but cancel: its rounding is theirs.
    scales = (advantages.abs().max(), exact[1].abs().max(), exact[2].abs().max())
    slack = 1e-5 if dtype == torch.float32 else 4e-3
    for fused, plain, truth, scale in zip(got, naive, exact, scales, strict=True):
        assert (fused.double() - truth).abs().max() <= 1.5 * (plain.double() - truth).abs().max() + slack * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 70])  # rows that are packed where they are, or copied and padded first
@pytest.mark.parametrize("stride", ["wide", "odd", "overlapping", "none"])
def test_rows_may_lie_anywhere(d, dtype, stride, isa):
    """A bfloat16 row may start in the middle of a 32-bit word."""
    hidden, weight = (torch.randn(n, d, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (64, 130))
    targets = torch.arange(64)

    def laid_out(x):
        if stride in ("wide", "odd"):
            memory = torch.zeros(len(x), d + (2 if stride == "wide" else 3), dtype=dtype)
            memory[:, 1 : d + 1] = x
            return memory[:, 1 : d + 1]
        return x.flatten().as_strided(x.shape, (1, 1) if stride == "overlapping" else (0, 1))

    def loss_and_gradients(h, w):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        out = fastppo.linear_logprob(h, w, targets, return_entropy=True, backend="cpu")
        loss = out.logprobs.sum() + out.entropy.sum()
        loss.backward()
        return loss, h.grad, w.grad

    h, w = laid_out(hidden), laid_out(weight)
    slack = 1e-5 if dtype == torch.float32 else 0.0  # float32 rows stay where they are, and BLAS rounds by their layout
    for a, b in zip(loss_and_gradients(h, w), loss_and_gradients(h.contiguous(), w.contiguous()), strict=True):
        assert (a - b).abs().max() <= slack * b.abs().max()


def test_losses_that_take_turns_do_not_read_each_others_kept_logits():
    hidden, weight, targets = case(40, 16, 500, torch.bfloat16)
    old, advantages = torch.full((40,), -8.0), torch.ones(40)
    want = ppo(hidden, weight, targets, old, advantages, budget=2**25)
    for other in (hidden * 3, hidden[:7] * 3):
        ppo(other, weight, targets[: len(other)], old[: len(other)], advantages[: len(other)], budget=2**25)
        got = ppo(hidden, weight, targets, old, advantages, budget=2**25)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_logits_too_far_apart_for_16_bits_are_recomputed(isa):
    hidden, weight, targets = case(40, 64, 2200, torch.bfloat16)
    weight[2000] = hidden[0] * 2000  # row 0 meets a logit beyond 65,504 only in a later tile than the first
    old, advantages = torch.full((40,), -8.0), torch.ones(40)
    got = ppo(hidden, weight, targets, old, advantages, clip_high=1e30, entropy_coef=0.01)
    exact = ppo(
        hidden.double(),
        weight.double(),
        targets,
        old,
        advantages,
        clip_high=1e30,
        entropy_coef=0.01,
        backend="reference",
    )
    assert (hidden[0].double() @ weight[2000].double()) > 70000
    for fused, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(fused.double(), truth, atol=0.02 * truth.abs().max().item(), rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [2**18, 2**21, 2**23])  # narrow tiles; some logits kept; all of them
def test_bits_do_not_depend_on_the_number_of_threads(budget, dtype, isa):
    hidden, weight, targets = case(200, 48, 1900, dtype)
    old, advantages = torch.full((200,), -7.0), torch.randn(200)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 11):
            torch.set_num_threads(threads)
            with fastppo.scratch_budget(budget):
                lp = fastppo.linear_logprob(hidden, weight, targets, return_entropy=True, backend="cpu")
            loss = ppo(hidden, weight, targets, old, advantages, budget=budget, entropy_coef=0.01)
            results.append([lp.logprobs, lp.entropy, *loss])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_scratch_that_waits_for_the_next_call_is_within_the_budget():
    budgets = (2**21, 2**23, 2**22, 2**24, 2**21)
    for budget, n, d in zip(budgets, (150, 500, 40, 300, 90), (40, 200, 64, 30, 100), strict=True):
        hidden, weight, targets = case(n, d, 3000)
        sums = 64 * n  # of every row; not of the budget
        with fastppo.scratch_budget(budget):
            ppo(hidden, weight, targets, torch.full((n,), -8.0), torch.randn(n), budget=budget)
            after_loss = held_bytes()
            fastppo.linear_logprob(hidden, weight, targets, backend="cpu")
            assert 0 < after_loss <= budget + sums
            assert 0 < held_bytes() <= budget + sums


def test_the_end_of_a_larger_budget_frees_what_is_over(monkeypatch):
    monkeypatch.setenv("FASTPPO_SCRATCH_MB", "1")
    hidden, weight, targets = case(400, 256, 5000)
    with fastppo.scratch_budget(2**26):
        fastppo.linear_logprob(hidden, weight, targets, backend="cpu")
        assert held_bytes() > 2**20
    assert held_bytes() == 0


def test_a_call_between_the_passes_changes_nothing(monkeypatch):
    """As of a signal's handler or a finalizer: logits that wait in spare memory stay what they were."""
    hidden, weight, targets = case(300, 16, 3000)
    old, advantages = torch.full((300,), -8.0), torch.randn(300)
    want = ppo(hidden, weight, targets, old, advantages, budget=2**23)

    def interrupted(*arguments):
        monkeypatch.undo()
        with fastppo.scratch_budget(2**16):  # in which there is no room for the spare memory
            fastppo.linear_logprob(hidden, weight, targets, backend="cpu")
        return contributing(*arguments)

    contributing = linear.contributing
    monkeypatch.setattr(linear, "contributing", interrupted)
    got = ppo(hidden, weight, targets, old, advantages, budget=2**23)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype, isa):
    """±1e4, masked columns, identical columns, one column."""
    hidden, weight, targets = case(70, 16, 130, dtype)
    weight[5] = weight[4]
    for bias in (torch.full((130,), 1e4), torch.full((130,), -1e4), torch.linspace(-1e4, 1e4, 130)):
        out = fastppo.linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, backend="cpu")
        z = hidden.double() @ weight.double().T + bias.double()
        want = torch.log_softmax(z, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(out.logprobs.double(), want, atol=4e-3, rtol=1e-6)  # an ulp of 1e4 is 1e-3
        assert (out.logprobs <= 0).all()
        assert ((out.entropy >= 0) & (out.entropy <= math.log(130))).all()
    bias = torch.zeros(130)
    bias[10:] = -torch.inf
    for where in (bias, bias.flip(0)):  # the first tiles, or the last, hold nothing
        keep = torch.isfinite(where)
        inside = keep.nonzero().flatten()[targets % 10]
        got = outputs_and_gradients(hidden, weight, inside, bias=where, upstream=torch.ones(3, 70), budget=1)
        z = (hidden.double() @ weight.double().T)[:, keep]
        want = torch.log_softmax(z, -1).gather(1, (targets % 10).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(got[0].double(), want, atol=1e-5, rtol=1e-5)
        assert all(torch.isfinite(x).all() for x in got)
        assert got[4][~keep].abs().max() == 0
    got = outputs_and_gradients(hidden, weight[:1], torch.zeros_like(targets), upstream=torch.ones(3, 70))
    assert got[0].abs().max() == 0
    assert got[1].abs().max() == 0


def test_nan_in_one_row_stays_in_that_row(isa):
    hidden, weight, targets = case(70, 16, 130)
    hidden[3, 2] = torch.nan
    out = fastppo.linear_logprob(hidden, weight, targets, return_entropy=True, backend="cpu")
    bad = torch.zeros(70, dtype=torch.bool)
    bad[3] = True
    assert torch.equal(out.logprobs.isnan(), bad)
    assert torch.equal(out.entropy.isnan(), bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 67, 5000])
@pytest.mark.parametrize("inplace", [False, True])
def test_selective_logprob(dtype, v, inplace, isa):
    x = (torch.randn(9, v) * 4).to(dtype)
    targets = torch.randint(0, v, (9,))
    targets[4] = -100
    upstream = torch.randn(3, 9)
    grads = {}
    for backend, leaf in (("cpu", x.clone()), ("reference", x.double())):
        leaf.requires_grad_()
        out = fastppo.selective_logprob(
            leaf * 1.0, targets, return_entropy=True, softcap=5.0, inplace_backward=inplace and backend == "cpu",
            backend=backend,
        )  # fmt: skip
        sum((g * o).sum() for g, o in zip(upstream, out, strict=True)).backward()
        grads[backend] = [*(o.detach().double() for o in out), leaf.grad.double()]
    for k, (got, want) in enumerate(zip(*grads.values(), strict=True)):
        tolerance = 2e-5 if k < 3 or dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setattr(products, "isa", "avx10")
    hidden, weight, targets = case(3, 4, 5)
    with pytest.raises(ValueError, match="instruction_sets"):
        fastppo.linear_logprob(hidden, weight, targets, backend="cpu")
