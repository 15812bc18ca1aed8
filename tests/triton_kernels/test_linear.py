"""linear_logprob, linear_kl and linear_ppo_loss on the Triton kernels against the float64 oracle."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from fastppo_kernels import configs, launch, linear, operands
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo

TRANSFORMS = [
    {},
    {"logit_scale": 0.3, "temperature": 1.3},
    {"softcap": 3.0, "logit_scale": 2.0, "temperature": 0.5},
]
ONE_TILE, SEVERAL_TILES, SEVERAL_BLOCKS = 2**25, 2**17, 2**10


def random_head(n, d, v, device, *, dtype=torch.float32, bias=False, scale=1.0):
    hidden = torch.randn(n, d, dtype=torch.float64) * scale
    weight = torch.randn(v, d, dtype=torch.float64) / math.sqrt(d)
    b = torch.randn(v, dtype=torch.float64) if bias else None
    return [None if x is None else x.to(device, dtype) for x in (hidden, weight, b)]


def leaves(*tensors, dtype=None):
    return [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def exact_logprob(hidden, weight, bias, targets, upstream, ignored=-100, **transform):
    """The oracle's (values [3, N], gradients of hidden, weight, bias), on the CPU in float64."""
    h, w, b = leaves(*(None if x is None else x.cpu() for x in (hidden, weight, bias)), dtype=torch.float64)
    z = oracle.logits(h, w, b, **transform)
    values, total = (
        torch.zeros(3, len(targets), dtype=torch.float64),
        sum(x.sum() * 0 for x in (h, w, b) if x is not None),
    )
    for n in (targets.cpu() != ignored).nonzero().flatten().tolist():
        for k, value in enumerate(oracle.row(z[n], targets[n])):
            values[k, n] = value.detach()
            total = total + upstream[k, n].double().cpu() * value
    total.backward()
    return values, [None if x is None else x.grad for x in (h, w, b)]


def check(got, want, tolerance):
    torch.testing.assert_close(got.detach().double().cpu(), want, atol=tolerance, rtol=tolerance)


def check_logprob(hidden, weight, bias, targets, upstream, budget, tolerance=5e-5, **transform):
    h, w, b = leaves(hidden, weight, bias)
    with fastppo.scratch_budget(budget):
        out = fastppo.linear_logprob(h, w, targets, bias=b, return_entropy=True, backend="triton", **transform)
        sum((g * o).sum() for g, o in zip(upstream, out, strict=True)).backward()
    values, gradients = exact_logprob(hidden, weight, bias, targets, upstream, **transform)
    for got, want in zip(out, values, strict=True):
        check(got, want, tolerance)
    for leaf, want in zip((h, w, b), gradients, strict=True):
        if leaf is not None:
            check(leaf.grad, want, tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logprob_values_and_gradients(device, bias, transform):
    hidden, weight, b = random_head(67, 19, 203, device, bias=bias, scale=3.0)
    targets = torch.randint(0, 203, (67,), device=device)
    targets[::5] = -100
    check_logprob(hidden, weight, b, targets, torch.randn(3, 67, device=device), ONE_TILE, **transform)


@pytest.mark.parametrize("budget", [SEVERAL_TILES, SEVERAL_BLOCKS])
def test_any_budget_gives_the_same(device, budget):
    hidden, weight, b = random_head(140, 16, 600, device, bias=True)
    targets = torch.randint(0, 600, (140,), device=device)
    check_logprob(hidden, weight, b, targets, torch.randn(3, 140, device=device), budget)


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(0, 70),
    d=st.integers(1, 40),
    v=st.integers(1, 150),
    bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    masked=st.floats(0, 1),
    zeroed=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, n, d, v, bias, transform, masked, zeroed, seed):
    torch.manual_seed(seed)
    hidden, weight, b = random_head(n, d, v, device, bias=bias)
    targets = torch.randint(0, v, (n,), device=device)
    targets[torch.rand(n) < masked] = -100
    upstream = torch.randn(3, n, device=device)
    upstream[:, torch.rand(n) < zeroed] = 0
    check_logprob(hidden, weight, b, targets, upstream, ONE_TILE, **transform)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_storage_stays_within_the_naive_error(device, dtype):
    hidden, weight, b = random_head(61, 48, 307, device, dtype=dtype, bias=True)
    targets = torch.randint(0, 307, (61,), device=device)
    upstream = torch.randn(3, 61, device=device)
    values, gradients = exact_logprob(hidden, weight, b, targets, upstream)
    errors = {}
    for backend in ("triton", "reference"):
        h, w, bb = leaves(hidden, weight, b)
        out = fastppo.linear_logprob(h, w, targets, bias=bb, return_entropy=True, backend=backend)
        sum((g * o).sum() for g, o in zip(upstream, out, strict=True)).backward()
        got = [*out, h.grad, w.grad, bb.grad]
        errors[backend] = [(x.double().cpu() - y).abs().max() for x, y in zip(got, [*values, *gradients], strict=True)]
    slack = {torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]
    for fused, naive, exact in zip(*errors.values(), [*values, *gradients], strict=True):
        assert fused <= 1.5 * naive + slack * exact.abs().max()


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_products_in_float16_keep_small_gradients(device, size):
    """∂z of a loss averaged over many tokens is below float16's smallest number; a power of two lifts it."""
    hidden, weight, _ = random_head(33, 32, 97, device, dtype=torch.float16)
    targets = torch.randint(0, 97, (33,), device=device)
    upstream = size * torch.randn(3, 33, device=device)
    arguments = (hidden, weight, None, targets, None, None, None, "")
    options = (1.0, 1.0, None, torch.float16, ONE_TILE, "triton")
    saved = torch.ops.fastppo.linear_statistics(*arguments, *options)
    gradients = torch.ops.fastppo.linear_vjp(*arguments, *options, *upstream, None, True, True, False, saved)
    values, want = exact_logprob(hidden, weight, None, targets, upstream)
    check(saved[0], values[0], 1e-5)
    for got, exact in zip(gradients[:2], want, strict=False):
        # A gradient that itself is float16 cannot hold less than 6e-8.
        check(got, exact, max(2e-3 * exact.abs().max().item(), 6e-8))


def test_weight_of_any_strides_and_ragged_hidden(device):
    hidden, weight, _ = random_head(40, 24, 90, device)
    targets = torch.randint(0, 90, (40,), device=device)
    wide = torch.randn(40, 50, device=device)
    wide[:, 3:27] = hidden
    h, w = wide[:, 3:27], weight.T.contiguous().T
    check_logprob(h, w, None, targets, torch.randn(3, 40, device=device), ONE_TILE)
    check_logprob(h.T.contiguous().T, w, None, targets, torch.randn(3, 40, device=device), ONE_TILE)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing(device, offset):
    hidden, weight, _ = random_head(8, 6, 50, device)
    hidden, weight = (hidden * 64).round() / 64, (weight * 64).round() / 64  # logits exact in float32 even at ±1e4
    targets = torch.randint(0, 50, (8,), device=device)
    results = []
    for shift in (0.0, offset):
        h, w = leaves(hidden, weight)
        bias = torch.full((50,), shift, device=device)
        out = fastppo.linear_logprob(h, w, targets, bias=bias, return_entropy=True, backend="triton")
        (out.logprobs + out.entropy).sum().backward()
        results.append((out.logprobs, out.entropy, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_logprobs_are_never_positive_and_entropy_stays_in_range(device, scale):
    hidden, weight, _ = random_head(64, 8, 129, device, scale=scale)
    weight[1] = weight[0]
    targets = torch.randint(0, 129, (64,), device=device)
    out = fastppo.linear_logprob(hidden, weight, targets, return_entropy=True, backend="triton")
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(129)).all()


def test_columns_without_probability_give_no_nan(device):
    hidden, weight, _ = random_head(10, 6, 80, device)
    bias = torch.zeros(80, device=device)
    bias[7:73] = -torch.inf  # a whole tile of columns among them
    targets = torch.randint(0, 7, (10,), device=device)
    h, w = leaves(hidden, weight)
    out = fastppo.linear_logprob(h, w, targets, bias=bias, return_entropy=True, backend="triton")
    (out.logprobs + out.entropy).sum().backward()
    keep = [*range(7), *range(73, 80)]
    z = hidden.double().cpu() @ weight.double().cpu()[keep].T
    check(out.logprobs, torch.log_softmax(z, -1).gather(1, targets.cpu().unsqueeze(1)).squeeze(1), 1e-5)
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(w.grad).all()
    assert w.grad[7:73].abs().max() == 0


def test_nothing_to_do_gives_zeros_that_backpropagate(device):
    hidden, weight, b = random_head(6, 5, 31, device, bias=True)
    for n in (0, 6):
        h, w, bb = leaves(hidden[:n], weight, b)
        targets = torch.full((n,), -100, device=device)
        out = fastppo.linear_logprob(h, w, targets, bias=bb, return_entropy=True, backend="triton")
        (out.logprobs + out.entropy).sum().backward()
        assert all(o.abs().sum() == 0 for o in out)
        assert all(x.grad.abs().sum() == 0 for x in (h, w, bb))


def test_ignored_rows_may_hold_anything(device):
    hidden, weight, _ = random_head(40, 12, 60, device)
    targets = torch.randint(0, 60, (40,), device=device)
    targets[:10] = -100
    hidden[:10] = float("nan")
    h, w = leaves(hidden, weight)
    fastppo.linear_logprob(h, w, targets, backend="triton").logprobs.sum().backward()
    assert torch.equal(h.grad[:10], torch.zeros(10, 12, device=device))
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(device, frozen):
    hidden, weight, _ = random_head(9, 6, 40, device)
    targets = torch.randint(0, 40, (9,), device=device)
    h, w = leaves(hidden, weight)
    both = leaves(hidden, weight)
    fastppo.linear_logprob(*both, targets, backend="triton").logprobs.sum().backward()
    {"hidden": h, "weight": w}[frozen].requires_grad_(False)
    fastppo.linear_logprob(h, w, targets, backend="triton").logprobs.sum().backward()
    for leaf, reference, name in ((h, both[0], "hidden"), (w, both[1], "weight")):
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, reference.grad)


def test_the_operators_keep_their_contract(device):
    hidden, weight, b = random_head(9, 6, 40, device, bias=True)
    targets = torch.randint(0, 40, (9,), device=device)
    arguments = (hidden, weight, b, targets, None, None, None, "")
    problem, checks = (
        (*arguments, 1.0, 1.0, None, torch.float32, ONE_TILE, "triton"),
        ("test_schema", "test_faketensor"),
    )
    operators = torch.ops.fastppo
    torch.library.opcheck(operators.linear_statistics, problem, test_utils=checks)
    saved = operators.linear_statistics(*problem)
    upstream = [torch.randn(9, device=device) for _ in range(3)]
    torch.library.opcheck(operators.linear_vjp, (*problem, *upstream, None, True, True, True, saved), test_utils=checks)


def test_float64_is_refused_by_name_and_served_by_another_backend(device):
    hidden, weight, _ = random_head(4, 3, 7, device, dtype=torch.float64)
    targets = torch.zeros(4, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="float64"):
        fastppo.linear_logprob(hidden, weight, targets, backend="triton")
    assert fastppo.engines.dispatch.select("linear_logprob", torch.device("cpu"), torch.float64) != "triton"


def check_kl(device, kind, n, d, ref_d, v, transform, masked, tolerance=5e-5):
    hidden, weight, b = random_head(n, d, v, device, bias=True, scale=2.0)
    ref_hidden, ref_weight, ref_b = random_head(n, ref_d, v, device, bias=True, scale=2.0)
    mask = torch.rand(n) >= masked
    upstream = torch.randn(n, device=device)
    h, w, bb = leaves(hidden, weight, b)
    kl = fastppo.linear_kl(
        h, w, ref_hidden, ref_weight, kind=kind, mask=mask.to(device), bias=bb, ref_bias=ref_b, backend="triton",
        **transform,
    )  # fmt: skip
    (upstream * kl).sum().backward()
    h64, w64, b64 = leaves(hidden.cpu(), weight.cpu(), b.cpu(), dtype=torch.float64)
    z = oracle.logits(h64, w64, b64, **transform)
    ref_z = oracle.logits(ref_hidden.double().cpu(), ref_weight.double().cpu(), ref_b.double().cpu(), **transform)
    expected, total = torch.zeros(n, dtype=torch.float64), z.sum() * 0
    for row in mask.nonzero().flatten().tolist():
        value = oracle.divergence(z[row], ref_z[row], kind)
        expected[row] = value.detach()
        total = total + upstream[row].double().cpu() * value
    total.backward()
    check(kl, expected, tolerance)
    assert (kl >= 0).all()
    for leaf, want in ((h, h64), (w, w64), (bb, b64)):
        check(leaf.grad, want.grad, tolerance)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kl_between_models_of_different_widths(device, kind, transform):
    check_kl(device, kind, 43, 13, 23, 211, transform, masked=0.2)


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(["reverse", "forward"]),
    n=st.integers(0, 40),
    d=st.integers(1, 20),
    ref_d=st.integers(1, 40),
    v=st.integers(1, 100),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_kl_of_any_shape(device, kind, n, d, ref_d, v, masked, seed):
    torch.manual_seed(seed)
    check_kl(device, kind, n, d, ref_d, v, {}, masked)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_kl_of_a_model_with_itself_is_zero_and_its_gradient_too(device, kind):
    hidden, weight, _ = random_head(9, 11, 77, device)
    h, w = leaves(hidden, weight)
    kl = fastppo.linear_kl(h, w, hidden, weight, kind=kind, backend="triton")
    kl.sum().backward()
    assert kl.abs().max() < 1e-5
    assert h.grad.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_kl_counts_the_whole_distance_to_a_model_that_all_but_excludes_tokens(device, kind):
    hidden, weight, b = random_head(9, 13, 211, device, bias=True)
    own, other = b.clone(), b.clone()
    own[-40:] -= 3e4
    other[:40] -= 1e6 * torch.rand(40, device=device) + 3e4
    for bias, ref_bias in ((own, other), (own.flip(0), other.flip(0))):
        h, w, bb = leaves(hidden, weight, bias)
        kl = fastppo.linear_kl(h, w, hidden, weight, kind=kind, bias=bb, ref_bias=ref_bias, backend="triton")
        kl.sum().backward()
        h64, w64, b64 = leaves(hidden.cpu(), weight.cpu(), bias.cpu(), dtype=torch.float64)
        z = oracle.logits(h64, w64, b64)
        ref_z = oracle.logits(hidden.double().cpu(), weight.double().cpu(), ref_bias.double().cpu())
        expected = torch.stack([oracle.divergence(z[n], ref_z[n], kind) for n in range(9)])
        expected.sum().backward()
        assert expected.min() > 100
        torch.testing.assert_close(kl.double().cpu(), expected.detach(), atol=1e-4, rtol=1e-4)
        for got, want in ((h, h64), (w, w64), (bb, b64)):
            scale = want.grad.abs().max()
            check(got.grad / scale, want.grad / scale, 1e-4)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_kl_where_both_models_exclude_tokens_is_finite(device, kind):
    hidden, weight, _ = random_head(10, 6, 80, device)
    bias = torch.zeros(80, device=device)
    bias[7:73] = -torch.inf
    h, w = leaves(hidden, weight)
    kl = fastppo.linear_kl(h, w, hidden * 1.1, weight, kind=kind, bias=bias, ref_bias=bias, backend="triton")
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(w.grad).all()


PPO_CASES = [
    {"clip_low": 0.1, "clip_high": 0.3, "entropy_coef": 0.02},
    {"kl_coef": 0.2, "kl_estimator": "k3", "loss_agg": "seq-mean-token-sum-norm", "entropy_coef": -0.03},
    {"kl_coef": 0.3, "kl_estimator": "exact", "entropy_coef": 0.01},
    {"ratio_level": "sequence", "dual_clip": 1.3, "loss_agg": "seq-mean-token-mean"},
]


@pytest.mark.parametrize("case", PPO_CASES, ids=str)
def test_ppo_loss(device, case):
    b, t, d, v = 4, 11, 11, 97
    hidden, weight, bias = random_head(b * t, d, v, device, bias=True)
    ref_hidden, ref_weight, _ = random_head(b * t, 5, v, device)
    targets = torch.randint(0, v, (b, t), device=device)
    h64, w64, b64 = leaves(hidden.cpu(), weight.cpu(), bias.cpu(), dtype=torch.float64)
    z = oracle.logits(h64, w64, b64)
    ref_z = oracle.logits(ref_hidden.cpu().double(), ref_weight.cpu().double())
    rows = [oracle.row(z[n], targets.flatten()[n]) for n in range(b * t)]
    now = torch.stack([r[0] for r in rows]).detach().view(b, t)
    old, ref = (now + 0.3 * torch.randn(b, t)).float(), (now + 0.3 * torch.randn(b, t)).float()
    advantages, mask = torch.randn(b, t), torch.rand(b, t) < 0.7
    mask[1] = False
    weights = 2 * torch.rand(b, t) if case.get("kl_estimator") == "exact" or "dual_clip" in case else None

    def grid(flat):
        return [[flat[i * t + j] for j in range(t)] for i in range(b)]

    kls = grid([oracle.divergence(z[n], ref_z[n], "reverse") for n in range(b * t)])
    want = oracle.ppo(
        grid([r[0] for r in rows]), grid([r[1] for r in rows]), old.double(), advantages.double(), mask.tolist(),
        ref=ref.double(), exact_kl=kls, importance_weights=weights, **case,
    )  # fmt: skip
    want.backward()

    kwargs = dict(case)
    if case.get("kl_estimator") == "exact":
        kwargs |= {"ref_hidden": ref_hidden.view(b, t, -1), "ref_weight": ref_weight}
    elif "kl_coef" in case:
        kwargs |= {"ref_logprobs": ref.to(device)}
    h, w, bb = leaves(hidden.view(b, t, d), weight, bias)
    if weights is not None:
        kwargs["importance_weights"] = weights.to(device)
    out = fastppo.linear_ppo_loss(
        h, w, targets, old.to(device), advantages.to(device), mask=mask.to(device), bias=bb, backend="triton", **kwargs
    )
    (3.0 * out.loss).backward()
    check(out.loss, want.detach(), 2e-5)
    for leaf, exact in ((h, h64), (w, w64), (bb, b64)):
        check(leaf.grad.view(exact.shape), 3.0 * exact.grad, 5e-5)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_ppo_loss_of_nothing_is_zero_and_backpropagates(device, shape, ratio_level):
    h, w = (torch.randn(*size, 6, device=device, requires_grad=True) for size in (shape, (33,)))
    nothing = torch.empty(shape, device=device)
    out = fastppo.linear_ppo_loss(h, w, nothing.long(), nothing, nothing, ratio_level=ratio_level, backend="triton")
    out.loss.backward()
    assert out.loss == 0
    assert h.grad.shape == h.shape
    assert w.grad.abs().max() == 0


def test_clipped_rows_get_an_exact_zero(device):
    hidden, weight, _ = random_head(40, 6, 33, device)
    targets = torch.randint(0, 33, (40,), device=device)
    old = fastppo.linear_logprob(hidden, weight, targets, backend="reference").logprobs.clone()
    old[:30] -= 1.0  # ratio e: clipped wherever the advantage is positive
    h, w = leaves(hidden, weight)
    ones = torch.ones(40, device=device)
    fastppo.linear_ppo_loss(h, w, targets, old, ones, backend="triton").loss.backward()
    assert torch.equal(h.grad[:30], torch.zeros(30, 6, device=device))
    assert (h.grad[30:].abs().sum(1) > 0).all()


def test_compiles_without_graph_breaks(device):
    hidden, weight, _ = random_head(12, 6, 40, device)
    targets = torch.randint(0, 40, (12,), device=device)

    def loss(h, w):
        out = fastppo.linear_logprob(h, w, targets, return_entropy=True, backend="triton")
        ppo = fastppo.linear_ppo_loss(h, w, targets, out.logprobs.detach(), out.entropy.detach(), backend="triton")
        return ppo.loss + out.logprobs.mean() + 0.1 * out.entropy.mean()

    eager, compiled = leaves(hidden, weight), leaves(hidden, weight)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_same_bits_every_time(device):
    hidden, weight, b = random_head(70, 20, 90, device, bias=True)
    targets = torch.randint(0, 90, (70,), device=device)
    runs = []
    for _ in range(2):
        h, w, bb = leaves(hidden, weight, b)
        out = fastppo.linear_logprob(h, w, targets, bias=bb, return_entropy=True, backend="triton")
        (out.logprobs + out.entropy).sum().backward()
        runs.append((out.logprobs.detach(), h.grad, w.grad, bb.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bias_of_any_strides(device):
    hidden, weight, _ = random_head(20, 16, 90, device)
    targets = torch.randint(0, 90, (20,), device=device)
    for bias in (torch.randn(90, 2, device=device)[:, 0], torch.randn(1, device=device).expand(90)):
        out = fastppo.linear_logprob(hidden, weight, targets, bias=bias, backend="triton")
        values, _ = exact_logprob(hidden, weight, bias, targets, torch.zeros(3, 20))
        check(out.logprobs, values[0], 1e-5)


def test_a_single_column_of_any_stride(device):
    hidden, _, _ = random_head(5, 16, 3, device)
    weight = torch.randn(16, 1, device=device).t()  # contiguous by PyTorch's rule, one element from row to row
    out = fastppo.linear_logprob(hidden, weight, torch.zeros(5, dtype=torch.long, device=device), backend="triton")
    check(out.logprobs, torch.zeros(5, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("spoilt", ["hidden", "weight"])
def test_a_nan_is_not_hidden(device, spoilt):
    """One in a single row of the weight is in every token's normalizer, and in every gradient."""
    hidden, weight, _ = random_head(7, 16, 90, device)
    (hidden if spoilt == "hidden" else weight)[3, 2] = float("nan")
    targets = torch.arange(10, 17, device=device)
    h, w = leaves(hidden, weight)
    out = fastppo.linear_logprob(h, w, targets, return_entropy=True, backend="triton")
    (out.logprobs + out.entropy).sum().backward()
    rows = slice(3, 4) if spoilt == "hidden" else slice(None)
    assert out.logprobs[rows].isnan().all()
    assert out.entropy[rows].isnan().all()
    assert h.grad[rows].isnan().any(1).all()


@pytest.mark.parametrize("transform", [{"temperature": 1e-3, "logit_scale": 500.0}, {"temperature": 1e6}])
def test_products_in_float16_follow_the_slope_of_the_transform(device, transform, monkeypatch):
    monkeypatch.setattr(linear, "interpreted_dtype", lambda dtype: dtype)
    transform = {"temperature": 1.0, "logit_scale": 1.0, **transform}
    hidden, weight, _ = random_head(33, 32, 97, device, dtype=torch.float16)
    hidden = hidden * (transform["temperature"] / transform["logit_scale"] if transform["temperature"] < 1 else 1)
    targets = torch.randint(0, 97, (33,), device=device)
    upstream = torch.randn(3, 33, device=device)
    arguments = (hidden, weight.float(), None, targets, None, None, None, "")
    options = (*transform.values(), None, torch.float16, ONE_TILE)
    saved = linear.statistics(*arguments, *options)
    gradients = linear.vjp(*arguments, list(saved), *upstream, None, *options, False, True, False)
    _, want = exact_logprob(hidden, weight, None, targets, upstream, **transform)
    check(gradients[1], want[1], 3e-3 * want[1].abs().max().item())


def test_copies_of_a_weight_fit_the_budget(device, monkeypatch):
    """A weight that products cannot read as it lies is copied a slice at a time."""
    hidden, weight, _ = random_head(16, 200, 3000, device)
    targets, upstream = torch.randint(0, 3000, (16,), device=device), torch.randn(3, 16, device=device)
    copied, copy = [], operands.padded_copy
    monkeypatch.setattr(operands, "padded_copy", lambda *x: copied.append(copy(*x)) or copied[-1])
    arguments = (hidden, weight, None, targets, None, None, None, "")
    options = (1.0, 1.0, None, torch.float32, 2**20)
    saved = linear.statistics(*arguments, *options)
    copied.clear()
    linear.vjp(*arguments, list(saved), *upstream, None, *options, True, False, False)
    assert max(x.nbytes for x in copied) <= 2**20


def test_a_softcap_far_above_the_logits_leaves_them_and_one_far_below_hides_them(device):
    hidden, weight, _ = random_head(9, 8, 40, device)
    targets, upstream = torch.randint(0, 40, (9,), device=device), torch.randn(3, 9, device=device)
    for softcap in (1e3, 1e10):
        check_logprob(hidden, weight, None, targets, upstream, ONE_TILE, tolerance=5e-6, softcap=softcap)
    hidden = hidden.requires_grad_()
    for softcap in (1e-3, 1e3):
        out = fastppo.linear_logprob(hidden, 1e7 * weight, targets, softcap=softcap, backend="triton")
        (gradient,) = torch.autograd.grad(out.logprobs.sum(), hidden)
        assert not gradient.any()  # tanh is 1 to the last bit


@pytest.mark.parametrize("products", ["cublas", "triton"])
def test_a_chip_without_tma(device, products, monkeypatch):
    """Descriptors that the kernel makes; tiles are then stored to the end of the rows' padding."""
    monkeypatch.setattr(launch, "has_tma", lambda device: False)
    monkeypatch.setattr(configs, "PRODUCTS", products)
    hidden, weight, b = random_head(40, 16, 77, device, bias=True)
    targets, upstream = torch.randint(0, 77, (40,), device=device), torch.randn(3, 40, device=device)
    for transform in ({}, {"softcap": 3.0, "logit_scale": 2.0}):
        check_logprob(hidden, weight, b, targets, upstream, ONE_TILE, **transform)
