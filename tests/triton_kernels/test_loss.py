"""The loss by chunks of rows, from the exponentials that the statistics store, against the naive path in float64."""

from __future__ import annotations

import math

import pytest
import torch
from fastppo_kernels import configs, launch
from fastppo_kernels import loss as kernels
from fastppo_kernels.rows import compact_rows
from fastppo_kernels.stored_gradient import stored_gradient, write_targets
from fastppo_kernels.tile import transform_factors
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo.ops.linear_ppo_loss  # registers its operator


def inputs(b, t, d, v, device, *, dtype=torch.float32, masked=0.3):
    hidden = torch.randn(b, t, d, device=device).to(dtype)
    weight = (torch.randn(v, d, device=device) / math.sqrt(d)).to(dtype)
    bias = torch.randn(v, device=device).to(dtype)
    targets = torch.randint(0, v, (b, t), device=device)
    old = fastppo.linear_logprob(hidden, weight, targets, bias=bias, backend="reference").logprobs
    old = old + 0.3 * torch.randn(b, t, device=device)
    return (
        hidden,
        weight,
        bias,
        targets,
        old,
        torch.randn(b, t, device=device),
        torch.rand(b, t, device=device) >= masked,
    )


def loss(x, backend, dtype=None, **options):
    """(loss, logprobs, entropy, ∂hidden, ∂weight, ∂bias) in float64."""
    *head, targets, old, advantages, mask = x
    h, w, b = (None if y is None else y.detach().to(dtype or y.dtype).clone().requires_grad_() for y in head)
    out = fastppo.linear_ppo_loss(
        h, w, targets, old.to(dtype or old.dtype), advantages, mask=mask, bias=b, backend=backend, **options
    )
    (2.0 * out.loss).backward()
    gradients = (None if y is None else y.grad for y in (h, w, b))
    return [None if y is None else y.detach().double() for y in (out.loss, out.logprobs, out.entropy, *gradients)]


def assert_close(got, want, tolerance):
    """Relative to the greatest entry: a sequence's ratio can be in the hundreds, and scales every error."""
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
            continue
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, b.abs().max().item()), rtol=tolerance)


OPTIONS = [
    {},
    {"entropy_coef": 0.03, "clip_low": 0.1, "dual_clip": 1.5},
    {"entropy_coef": 0.02, "softcap": 3.0, "logit_scale": 2.0, "temperature": 0.7},
    {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean", "clip_low": 0.02, "clip_high": 0.03},
    {"ratio_level": "sequence", "entropy_coef": 0.01, "loss_agg": "seq-mean-token-sum"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunks", [1, 3])
def test_chunks_of_rows_give_the_exact_loss(device, options, chunks, monkeypatch):
    x = inputs(6, 12, 13, 99, device)
    calls = by_rows(monkeypatch, 72 if chunks == 1 else 20)
    got, want = loss(x, "triton", **options), loss(x, "reference", torch.float64, **options)
    assert calls
    assert_close(got, want, 5e-5)


@settings(max_examples=6, deadline=None)
@given(
    b=st.integers(1, 5),
    t=st.integers(1, 40),
    d=st.integers(1, 40),
    v=st.integers(1, 150),
    masked=st.floats(0, 1),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 2**31),
)
def test_chunks_of_rows_at_any_shape(device, b, t, d, v, masked, options, seed):
    torch.manual_seed(seed)
    x = inputs(b, t, d, v, device, masked=masked)
    with pytest.MonkeyPatch.context() as patch:
        by_rows(patch, max(t, 16))
        got = loss(x, "triton", **options)
    assert_close(got, loss(x, "reference", torch.float64, **options), 1e-4)


def by_rows(patch, rows):
    """Have the loss computed by chunks of at most `rows` rows, whatever the cost model thinks; returns its calls."""
    original, calls = kernels.choose_tiling, []

    def forced(hidden, weight, unit, *arguments, **options):
        calls.append(unit)
        chunk = hidden.shape[0] if rows >= hidden.shape[0] else max(1, rows // unit) * unit
        return original(hidden, weight, unit, *arguments, **options)._replace(whole=True, rows=chunk)

    patch.setattr(kernels, "choose_tiling", forced)
    return calls


@pytest.mark.parametrize("products", ["cublas", "triton"])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.03}], ids=str)
def test_either_kind_of_products(device, options, products, monkeypatch):
    monkeypatch.setattr(configs, "PRODUCTS", products)
    x = inputs(7, 19, 13, 99, device, masked=0.5)
    by_rows(monkeypatch, 100)
    assert_close(loss(x, "triton", **options), loss(x, "reference", torch.float64, **options), 5e-5)


@pytest.mark.parametrize("dim", [576, 896, 4096])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.03}], ids=str)
def test_hidden_sizes_of_real_models(device, dim, options, monkeypatch):
    x = inputs(3, 15, dim, 203, device)
    by_rows(monkeypatch, 45)
    assert_close(loss(x, "triton", **options), loss(x, "reference", torch.float64, **options), 5e-5)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.05}, {"softcap": 20.0, "temperature": 0.8}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_as_close_to_float64_as_the_naive_path(device, options, scale, bias, monkeypatch):
    """By norm, every output and gradient is about as far off as bfloat16 logits and their autograd, or nearer.

    The worst case is a distribution so flat that the naive path's rounded logits cost nothing. Then the naive ∂weight
    has two roundings in it, of ∂z and of itself, and ours three, of E, of α ⊙ hidden and of itself: on average √1.5
    times as much. But E at the targets is nearly the same number in every row, and where that lies just above a power
    of two, its rounding errors are the largest that there are: by norm 2⁻⁸ / √3 each, or 2⁻⁸ for three of them.
    """
    hidden, weight, b, *rest = inputs(4, 33, 72, 515, device, dtype=torch.bfloat16)
    x = (hidden * scale, weight, b if bias else None, *rest)
    by_rows(monkeypatch, 200)
    exact = loss(x, "reference", torch.float64, **options)
    # The bias's gradient is a sum over few rows here, in which the naive path's roundings largely cancel.
    factors = [1.0, 1.0, 1.0, 1.2, 1.25, 1.8]
    roundings = [0.0, 0.0, 0.0, 2.0**-8, 2.0**-8, 2.0**-8]  # of the gradients
    results = zip(loss(x, "triton", **options), naive_loss(x, **options), exact, factors, roundings, strict=True)
    for fused, naive, want, factor, rounding in results:
        if want is not None:
            bound = max(factor * (naive - want).norm() + 1e-6 * want.norm(), rounding * want.norm())
            assert (fused - want).norm() <= bound


def naive_loss(x, **options):
    """As `loss`, with the logits that a bfloat16 lm_head gives: rounded to bfloat16."""
    hidden, weight, b, targets, old, advantages, mask = x
    h, w, b = (None if y is None else y.detach().clone().requires_grad_() for y in (hidden, weight, b))
    logits = torch.nn.functional.linear(h, w, b)
    out = fastppo.ppo_loss(old, advantages, logits=logits, targets=targets, mask=mask, backend="reference", **options)
    (2.0 * out.loss).backward()
    return [None if y is None else y.detach().double() for y in (out.loss, out.logprobs, out.entropy, h.grad, w.grad,
            b if b is None else b.grad)]  # fmt: skip


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize(
    "options", [{"temperature": 30.0}, {"temperature": 1000.0}, {"softcap": 5.0, "temperature": 50.0}], ids=str
)
def test_the_entropy_of_flat_policies_keeps_its_gradient(device, options):
    """log p from a bfloat16 exponential is off by 2⁻⁹, and log p + H is smaller than that here."""
    hidden, weight, _, targets, old, _, mask = inputs(3, 21, 40, 515, device, dtype=torch.bfloat16)
    x = (hidden, weight, None, targets, old, torch.zeros_like(old), mask)  # the entropy alone
    options = {"entropy_coef": 1.0, **options}
    exact = loss(x, "reference", torch.float64, **options)
    with fastppo.scratch_budget(2**28):
        got = loss(x, "triton", **options)
    for fused, want in zip(got[3:5], exact[3:5], strict=True):
        assert (fused - want).norm() <= 5e-3 * want.norm()


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.05}], ids=str)
@pytest.mark.parametrize("budget", [2**25, 2**14])
def test_float32_under_autocast_to_bfloat16(device, options, budget, monkeypatch):
    """Both operands are rounded to bfloat16 once, the weight whole or a slice at a time; gradients are float32."""
    hidden, weight, bias, *rest = inputs(3, 21, 40, 1203, device)
    exact = loss((hidden.bfloat16(), weight.bfloat16(), bias, *rest), "reference", torch.float64, **options)
    by_rows(monkeypatch, 63)
    with torch.autocast(device.type, torch.bfloat16), fastppo.scratch_budget(budget):
        got = loss((hidden, weight, bias, *rest), "triton", **options)
    # The loss is a mean of terms as large as the advantages that may all but cancel: its rounding is theirs.
    sizes = [rest[2].double().abs().max(), *(want.norm() for want in exact[1:])]
    for fused, want, size, tolerance in zip(got, exact, sizes, [1e-6, 1e-6, 1e-6, 3e-3, 3e-3, 3e-3], strict=True):
        assert (fused - want).norm() <= tolerance * size


def test_chips_without_a_copy_engine(device, monkeypatch):
    """There the kernels make their descriptors themselves."""
    monkeypatch.setattr(launch, "has_tma", lambda device: False)
    x = inputs(3, 21, 40, 203, device)
    for products, rows in (("cublas", 63), ("triton", 21)):
        monkeypatch.setattr(configs, "PRODUCTS", products)
        with pytest.MonkeyPatch.context() as patch:
            by_rows(patch, rows)
            got = loss(x, "triton", entropy_coef=0.05)
        assert_close(got, loss(x, "reference", torch.float64, entropy_coef=0.05), 5e-5)
    with fastppo.scratch_budget(2**14):  # slices of the vocabulary
        assert_close(loss(x, "triton"), loss(x, "reference", torch.float64), 5e-5)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.01}], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
def test_targets_far_below_the_rows_maximum(device, options, chunks, monkeypatch):
    """Log-probs of −70, −90 and −500 among ordinary ones: such rows are computed relative to their maximum."""
    hidden, weight, bias, targets, _, advantages, mask = inputs(4, 12, 16, 99, device, masked=0.0)
    bias[5:9] = torch.tensor([-70.0, -90.0, -500.0, -1000.0], device=device)
    targets[0, :4] = torch.arange(5, 9, device=device)
    targets[2, 3] = 7
    now = fastppo.linear_logprob(hidden, weight, targets, bias=bias, backend="reference").logprobs
    assert now.min() < -900
    x = (hidden, weight, bias, targets, now + 0.1 * torch.randn_like(now), advantages, mask)
    by_rows(monkeypatch, 48 if chunks == 1 else 24)
    for without_bias in (False, True):
        if without_bias:
            x = (*fold_bias(*x[:3]), None, *x[3:])
        assert_close(loss(x, "triton", **options), loss(x, "reference", torch.float64, **options), 5e-5)


def fold_bias(hidden, weight, bias):
    """The same logits from one more hidden unit."""
    ones = torch.ones(*hidden.shape[:-1], 1, device=hidden.device)
    return torch.cat([hidden, ones], -1), torch.cat([weight, bias.unsqueeze(1)], 1)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.01}, {"softcap": 5.0}], ids=str)
def test_columns_and_a_target_without_probability(device, options, monkeypatch):
    hidden, weight, bias, targets, *rest = inputs(2, 9, 12, 99, device)
    bias[7:73] = -torch.inf  # whole tiles of columns among them
    if "softcap" in options:
        bias[7:73] = -1e30
    targets = torch.where((targets >= 7) & (targets < 73), 3, targets)
    by_rows(monkeypatch, 18)
    x = (hidden, weight, bias, targets, *rest)
    got = loss(x, "triton", **options)
    assert_close(got, loss(x, "reference", torch.float64, **options), 5e-5)
    targets[0, 0], rest[2][0, 0] = 10, False  # nobody asks for it: the row must not spoil the others
    assert_close(loss(x, "triton", **options), loss(x, "reference", torch.float64, **options), 5e-5)


def test_a_vocabulary_of_one(device, monkeypatch):
    x = inputs(2, 9, 12, 1, device)
    by_rows(monkeypatch, 18)
    for options in ({}, {"entropy_coef": 0.1}):
        _, logprobs, entropy, *gradients = loss(x, "triton", **options)
        assert logprobs.abs().max() < 1e-5
        assert entropy.abs().max() < 1e-5
        assert all(g.abs().max() < 1e-5 for g in gradients)


def test_weights_that_products_cannot_read_as_they_lie(device, monkeypatch):
    """Transposed, misaligned, and float32 under bfloat16 autocast, whole and in slices of the vocabulary."""
    hidden, weight, bias, *rest = inputs(3, 12, 24, 1203, device)
    buffer = torch.zeros(1203 * 24 + 1, device=device)
    buffer[1:] = weight.flatten()
    want = loss((hidden, weight, bias, *rest), "reference", torch.float64, entropy_coef=0.01)
    by_rows(monkeypatch, 36)
    for view in (weight.T.contiguous().T, buffer[1:].view(1203, 24)):
        for budget in (2**25, 1000):
            with fastppo.scratch_budget(budget):
                got = loss((hidden, view, bias, *rest), "triton", entropy_coef=0.01)
            assert_close(got, want, 5e-5)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_rounded_exponentials_cost_no_more_than_a_rounded_gradient(device, storage):
    """The kernels alone, on exponentials in 16 bits: an error of about one rounding of ∂z, and none in the target's."""
    n, v = 21, 150
    z = 4 * torch.randn(n, v, dtype=torch.float64)
    targets = torch.randint(0, v, (n,))
    log_p = torch.log_softmax(z, 1)
    p, lse = log_p.exp(), torch.logsumexp(z, 1)
    entropy = -(p * log_p).sum(1)
    g, e = torch.randn(2, n, dtype=torch.float64)
    at_target = (torch.arange(n), targets)
    shift = z.max(1).values if storage == torch.float16 else z[at_target]
    statistics = torch.stack([log_p[at_target], entropy, shift, lse - shift]).float().to(device)
    rows, count = compact_rows(targets.to(device))
    exponentials = torch.zeros(n, 192)
    exponentials[:, :v] = (z - shift.unsqueeze(1)).exp()
    transform = transform_factors(1.0, 1.0, None)
    for with_entropy in (False, True):
        stored = exponentials.to(device, storage)[:, :v]
        want = -g.unsqueeze(1) * p
        want[at_target] += g
        if with_entropy:
            want -= e.unsqueeze(1) * p * (log_p + entropy.unsqueeze(1))
            d_logprobs, d_entropy = g.float().to(device), e.float().to(device)
            stored_gradient(stored, rows, count, targets.to(device), statistics, d_logprobs, d_entropy, transform)
            dz = stored.double().cpu()
        else:
            d_logprobs = g.float().to(device)
            alpha = write_targets(stored, rows, count, targets.to(device), statistics, d_logprobs, 1.0)
            dz = stored.double().cpu() * alpha.double().cpu().unsqueeze(1)
        size = p * (g.abs() + with_entropy * e.abs() * (1 + entropy)).unsqueeze(1) + want.abs()
        # Exponentials below the normal numbers are multiples of `least`, whatever they are multiplied by afterwards.
        least = torch.finfo(storage).smallest_normal * torch.finfo(storage).eps
        factor = g.abs().unsqueeze(1) + with_entropy * e.abs().unsqueeze(1) * (log_p + entropy.unsqueeze(1)).abs()
        least = least * (1 + factor * (shift - lse).exp().unsqueeze(1))
        assert ((dz - want).abs() <= 2.5 * torch.finfo(storage).eps * size + least + 1e-7).all()


def test_the_operator_keeps_its_contract(device):
    hidden, weight, bias, targets, old, advantages, mask = inputs(2, 9, 6, 40, device)
    rows = targets.masked_fill(~mask, -100).flatten()
    weights = torch.rand(2, 9, device=device)
    ppo = (0.2, 0.2, None, "token", 0.0, "k1", 0.01, "token-mean")
    for budget in (1, 2**25):
        torch.library.opcheck(
            torch.ops.fastppo.linear_ppo_loss,
            (
                hidden.flatten(0, 1), weight, bias, rows, None, None, None, "", 1.0, 1.0, None, torch.float32, budget,
                "triton", mask, old, advantages, None, weights, *ppo, True, True, True,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_same_bits_every_time(device, monkeypatch):
    x = inputs(3, 15, 12, 70, device)
    by_rows(monkeypatch, 16)
    runs = [loss(x, "triton", entropy_coef=0.01) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_real_token_gives_zeros(device, monkeypatch):
    *rest, mask = inputs(2, 5, 6, 30, device)
    by_rows(monkeypatch, 16)
    assert all(y.abs().max() == 0 for y in loss((*rest, torch.zeros_like(mask)), "triton"))
