"""linear_logprob, linear_kl and linear_ppo_loss against the float64 oracle: values, gradients, extremes, bad input."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastppo
from fastppo.engines import extension

BUILT = pytest.mark.skipif(extension.load() is None, reason=extension.why_missing() or "")
BACKENDS = ["reference", "chunked", pytest.param("cpu", marks=BUILT)]
TINY_BUDGET = 2**14  # forces several blocks of rows and many vocabulary tiles at test sizes


def random_head(n, d, v, *, dtype=torch.float32, bias=False, scale=1.0, generator=None):
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    b = torch.randn(v, generator=generator, dtype=torch.float64) if bias else None
    return [None if x is None else x.to(dtype) for x in (hidden, weight, b)]


def leaves(*tensors, dtype=None):
    return [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def assert_within_naive(fused, naive, exact, slack):
    """|fused − float64| ≤ |naive − float64| up to a slack, in units of the exact result's size."""
    scale = exact.abs().max().clamp(min=1e-6)
    error, allowed = (fused.double() - exact).abs().max(), (naive.double() - exact).abs().max()
    assert error <= 1.5 * allowed + slack * scale, f"error {error:.3g}, naive {allowed:.3g}, scale {scale:.3g}"


TRANSFORMS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.3, "temperature": 1.3},
    {"softcap": 5.0},
    {"softcap": 3.0, "logit_scale": 2.0, "temperature": 0.5},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("budget", [TINY_BUDGET, 2**25])
def test_linear_logprob_matches_the_oracle(backend, bias, transform, budget):
    hidden, weight, b = random_head(37, 19, 203, bias=bias, scale=3.0)
    targets = torch.randint(0, 203, (37,))
    targets[::5] = -100
    upstream = torch.randn(3, 37)

    h, w, bb = leaves(hidden, weight, b)
    with fastppo.scratch_budget(budget):
        out = fastppo.linear_logprob(h, w, targets, bias=bb, return_entropy=True, backend=backend, **transform)
        sum((g * o).sum() for g, o in zip(upstream, out, strict=True)).backward()

    h64, w64, b64 = leaves(hidden, weight, b, dtype=torch.float64)
    z = oracle.logits(h64, w64, b64, **transform)
    expected = [torch.zeros(37, dtype=torch.float64) for _ in range(3)]
    total = 0
    for n in (targets != -100).nonzero().flatten().tolist():
        for k, value in enumerate(oracle.row(z[n], targets[n])):
            expected[k][n] = value.detach()
            total = total + upstream[k, n].double() * value
    total.backward()
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    for got, want in ((h, h64), (w, w64), (bb, b64)):
        if got is not None:
            torch.testing.assert_close(got.grad.double(), want.grad, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [TINY_BUDGET, 2**25])
def test_low_precision_stays_within_the_naive_error(dtype, budget):
    hidden, weight, b = random_head(61, 48, 517, dtype=dtype, bias=True)
    targets = torch.randint(0, 517, (61,))
    upstream = torch.randn(2, 61)
    results = {}
    for name, as_dtype in (("chunked", dtype), ("reference", dtype), ("exact", torch.float64)):
        h, w, bb = leaves(hidden, weight, b, dtype=as_dtype)
        with fastppo.scratch_budget(budget):
            backend = "reference" if name == "exact" else name
            out = fastppo.linear_logprob(h, w, targets, bias=bb, return_entropy=True, backend=backend)
        (upstream[0] * out.logprobs + upstream[1] * out.entropy).sum().backward()
        results[name] = (out.logprobs.detach(), out.entropy.detach(), h.grad, w.grad, bb.grad)
    for fused, naive, exact in zip(*results.values(), strict=True):
        assert_within_naive(fused, naive, exact, slack=0.01 if dtype == torch.bfloat16 else 0.002)


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
def test_any_shape_agrees_with_float64(n, d, v, bias, transform, masked, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, b = random_head(n, d, v, bias=bias, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < masked] = -100
    upstream = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    grads = []
    for backend in ("reference", "chunked"):
        h, w, bb = leaves(hidden, weight, b)
        with fastppo.scratch_budget(budget):
            out = fastppo.linear_logprob(h, w, targets, bias=bb, return_entropy=True, backend=backend, **transform)
            (upstream[:, 0] * out.logprobs + upstream[:, 1] * out.entropy).sum().backward()
        grads.append([*out, h.grad, w.grad, *([] if bb is None else [bb.grad])])
    for a, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, c, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear_kl_matches_the_oracle(kind, backend, transform):
    hidden, weight, b = random_head(21, 13, 111, bias=True, scale=2.0)
    ref_hidden, ref_weight, ref_b = random_head(21, 7, 111, bias=True, scale=2.0)
    mask = torch.rand(21) < 0.8
    upstream = torch.randn(21)
    h, w, bb = leaves(hidden, weight, b)
    with fastppo.scratch_budget(TINY_BUDGET):
        kl = fastppo.linear_kl(
            h, w, ref_hidden, ref_weight, kind=kind, mask=mask, bias=bb, ref_bias=ref_b, backend=backend, **transform
        )
        (upstream * kl).sum().backward()
    h64, w64, b64 = leaves(hidden, weight, b, dtype=torch.float64)
    z = oracle.logits(h64, w64, b64, **transform)
    ref_z = oracle.logits(ref_hidden.double(), ref_weight.double(), ref_b.double(), **transform)
    expected, total = torch.zeros(21, dtype=torch.float64), 0
    for n in mask.nonzero().flatten().tolist():
        value = oracle.divergence(z[n], ref_z[n], kind)
        expected[n] = value.detach()
        total = total + upstream[n].double() * value
    total.backward()
    torch.testing.assert_close(kl.double(), expected, atol=2e-5, rtol=2e-5)
    for got, want in ((h, h64), (w, w64), (bb, b64)):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=5e-5, rtol=5e-5)
    assert (kl >= 0).all()


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_kl_of_a_model_with_itself_is_zero_and_its_gradient_too(kind):
    hidden, weight, _ = random_head(9, 11, 77)
    h, w = leaves(hidden, weight)
    kl = fastppo.linear_kl(h, w, hidden, weight, kind=kind)
    kl.sum().backward()
    assert kl.abs().max() < 1e-5
    assert h.grad.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 2**25])
def test_kl_counts_the_whole_distance_to_a_model_that_all_but_excludes_tokens(kind, backend, budget):
    """Log-probabilities down to −1e6 where the other model still has mass; in the last tiles and in the first."""
    hidden, weight, b = random_head(9, 13, 211, bias=True)
    ref_b = b - torch.where(torch.rand(211) < 0.3, torch.rand(211) * 1e6, 0.0)
    ref_b[:40] -= 3e4
    policy_b = b.clone()
    policy_b[-40:] -= 3e4
    upstream = torch.randn(9)
    for own, other in ((policy_b, ref_b), (policy_b.flip(0), ref_b.flip(0))):
        h, w, bb = leaves(hidden, weight, own)
        with fastppo.scratch_budget(budget):
            kl = fastppo.linear_kl(h, w, hidden, weight, kind=kind, bias=bb, ref_bias=other, backend=backend)
            (upstream * kl).sum().backward()
        h64, w64, b64 = leaves(hidden, weight, own, dtype=torch.float64)
        z = oracle.logits(h64, w64, b64)
        ref_z = oracle.logits(hidden.double(), weight.double(), other.double())
        expected = torch.stack([oracle.divergence(z[n], ref_z[n], kind) for n in range(9)])
        (upstream * expected).sum().backward()
        assert expected.min() > 100
        torch.testing.assert_close(kl.double(), expected.detach(), atol=1e-4, rtol=1e-4)
        for got, want in ((h, h64), (w, w64), (bb, b64)):
            scale = want.grad.abs().max()
            torch.testing.assert_close(got.grad.double() / scale, want.grad / scale, atol=1e-4, rtol=1e-4)


PPO_CASES = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "entropy_coef": 0.02},
    {"dual_clip": 1.5, "kl_coef": 0.1, "kl_estimator": "k1", "loss_agg": "seq-mean-token-mean"},
    {"kl_coef": 0.2, "kl_estimator": "k2", "loss_agg": "seq-mean-token-sum"},
    {"kl_coef": 0.2, "kl_estimator": "k3", "loss_agg": "seq-mean-token-sum-norm", "entropy_coef": -0.03},
    {"kl_coef": 0.3, "kl_estimator": "exact", "entropy_coef": 0.01},
    {"ratio_level": "sequence", "loss_agg": "seq-mean-token-mean", "clip_low": 0.5, "clip_high": 0.6},
    {"ratio_level": "sequence", "dual_clip": 1.3, "entropy_coef": 0.01},
    {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean", "clip_low": 0.02, "clip_high": 0.03},
]


def ppo_inputs(b=4, t=7, d=11, v=97, seed=None):
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    hidden, weight, bias = random_head(b * t, d, v, bias=True, generator=generator)
    ref_hidden, ref_weight, _ = random_head(b * t, 5, v, generator=generator)
    targets = torch.randint(0, v, (b, t), generator=generator)
    z = oracle.logits(hidden.double(), weight.double(), bias.double())
    now = torch.log_softmax(z, -1).gather(1, targets.view(-1, 1)).view(b, t)
    old = (now + 0.3 * torch.randn(b, t, generator=generator, dtype=torch.float64)).float()
    ref = (now + 0.3 * torch.randn(b, t, generator=generator, dtype=torch.float64)).float()
    advantages = torch.randn(b, t, generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.7
    mask[1] = False  # a sequence without a token
    importance_weights = (2.5 * torch.rand(b, t, generator=generator) - 0.5).clamp(min=0)
    return {
        "hidden": hidden.view(b, t, d), "weight": weight, "bias": bias, "targets": targets, "old": old, "ref": ref,
        "advantages": advantages, "mask": mask, "ref_hidden": ref_hidden.view(b, t, 5), "ref_weight": ref_weight,
        "importance_weights": importance_weights,
    }  # fmt: skip


def oracle_ppo(x, case):
    """The oracle's loss and gradients (hidden, weight, bias)."""
    b, t = x["targets"].shape
    h, w, bias = leaves(x["hidden"], x["weight"], x["bias"], dtype=torch.float64)
    z = oracle.logits(h.view(b * t, -1), w, bias)
    ref_z = oracle.logits(x["ref_hidden"].double().view(b * t, -1), x["ref_weight"].double())
    rows = [oracle.row(z[n], x["targets"].flatten()[n]) for n in range(b * t)]
    kls = [oracle.divergence(z[n], ref_z[n], "reverse") for n in range(b * t)]

    def grid(flat):
        return [[flat[i * t + j] for j in range(t)] for i in range(b)]

    loss = oracle.ppo(
        grid([r[0] for r in rows]), grid([r[1] for r in rows]), x["old"].double(), x["advantages"].double(),
        x["mask"].tolist(), ref=x["ref"].double(), exact_kl=grid(kls), **case,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), (h.grad, w.grad, bias.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PPO_CASES, ids=str)
def test_linear_ppo_loss_matches_the_oracle(backend, case):
    x = ppo_inputs()
    want, want_grads = oracle_ppo(x, case)
    h, w, bias = leaves(x["hidden"], x["weight"], x["bias"])
    kwargs = dict(case)
    if case.get("kl_estimator") == "exact":
        kwargs |= {"ref_hidden": x["ref_hidden"], "ref_weight": x["ref_weight"]}
    elif "kl_coef" in case:
        kwargs |= {"ref_logprobs": x["ref"]}
    nan = float("nan")
    with fastppo.scratch_budget(TINY_BUDGET):
        out = fastppo.linear_ppo_loss(
            h.masked_fill(~x["mask"].unsqueeze(-1), nan),  # padding may hold anything
            w,
            x["targets"],
            x["old"].masked_fill(~x["mask"], nan),
            x["advantages"].masked_fill(~x["mask"], nan),
            mask=x["mask"],
            bias=bias,
            backend=backend,
            **kwargs,
        )
        (3.0 * out.loss).backward()
    torch.testing.assert_close(out.loss.detach().double(), want, atol=2e-5, rtol=2e-5)
    for got, expected in zip((h.grad, w.grad, bias.grad), want_grads, strict=True):
        torch.testing.assert_close(got.double(), 3.0 * expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PPO_CASES, ids=str)
def test_ppo_loss_from_logits_and_from_logprobs_is_the_same_loss(case, backend):
    x = ppo_inputs()
    want, (want_h, _, _) = oracle_ppo(x, case)
    exact = case.get("kl_estimator") == "exact"
    for inplace in (False, True):
        (h,) = leaves(x["hidden"])
        logits = torch.nn.functional.linear(h, x["weight"], x["bias"])
        kwargs = dict(case)
        if exact:
            kwargs["ref_logits"] = torch.nn.functional.linear(x["ref_hidden"], x["ref_weight"])
        elif "kl_coef" in case:
            kwargs["ref_logprobs"] = x["ref"]
        with fastppo.scratch_budget(TINY_BUDGET):
            out = fastppo.ppo_loss(
                x["old"],
                x["advantages"],
                logits=logits,
                targets=x["targets"],
                mask=x["mask"],
                inplace_backward=inplace,
                backend=backend,
                **kwargs,
            )
            out.loss.backward()
        torch.testing.assert_close(out.loss.detach().double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(h.grad.double(), want_h, atol=5e-5, rtol=5e-5)
    if not exact:
        (h,) = leaves(x["hidden"])
        lp = fastppo.linear_logprob(h, x["weight"], x["targets"], bias=x["bias"], return_entropy=True)
        out = fastppo.ppo_loss(
            x["old"], x["advantages"], logprobs=lp.logprobs, entropy=lp.entropy, mask=x["mask"], **kwargs
        )
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach().double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(h.grad.double(), want_h, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_logprob_matches_the_oracle(transform, inplace, backend):
    x = torch.randn(3, 5, 67) * 4
    targets = torch.randint(0, 67, (3, 5))
    targets[0, 2] = -7
    upstream = torch.randn(3, 15)
    (leaf,) = leaves(x)
    with fastppo.scratch_budget(2000):
        out = fastppo.selective_logprob(
            leaf * 1.0,
            targets,
            ignore_index=-7,
            return_entropy=True,
            inplace_backward=inplace,
            backend=backend,
            **transform,
        )
        sum((g.view(3, 5) * o).sum() for g, o in zip(upstream, out, strict=True)).backward()
    (leaf64,) = leaves(x, dtype=torch.float64)
    z = oracle.logits(leaf64.view(15, 67), torch.eye(67, dtype=torch.float64), **transform)
    total = 0
    for n in range(15):
        if targets.flatten()[n] != -7:
            for k, value in enumerate(oracle.row(z[n], targets.flatten()[n])):
                torch.testing.assert_close(out[k].flatten()[n].double(), value.detach(), atol=2e-5, rtol=2e-5)
                total = total + upstream[k, n].double() * value
        else:
            assert all(o.flatten()[n] == 0 for o in out)
    total.backward()
    torch.testing.assert_close(leaf.grad.double(), leaf64.grad, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [PPO_CASES[2], PPO_CASES[5], PPO_CASES[7], PPO_CASES[8]], ids=str)
def test_importance_weights_weigh_the_surrogate(case, backend):
    """From hidden states, logits and log-probabilities, against the oracle; and each metric but one is as without."""
    x = ppo_inputs(seed=1)
    weights = {"importance_weights": x["importance_weights"]}
    want, want_grads = oracle_ppo(x, case | {"importance_weights": x["importance_weights"].double()})
    assert (weights["importance_weights"] == 0).any()
    garbage = {"importance_weights": x["importance_weights"].masked_fill(~x["mask"], -math.inf)}
    rollout = (x["targets"], x["old"], x["advantages"])
    ref = {"ref_hidden": x["ref_hidden"], "ref_weight": x["ref_weight"], "ref_logprobs": x["ref"]}
    options = {"mask": x["mask"], "backend": backend, **case}
    h, w, bias = leaves(x["hidden"], x["weight"], x["bias"])
    out = fastppo.linear_ppo_loss(h, w, *rollout, bias=bias, **ref, **options, **garbage)
    out.loss.backward()
    (logit_h,) = leaves(x["hidden"])
    logits = torch.nn.functional.linear(logit_h, x["weight"], x["bias"])
    ref = {"ref_logits": torch.nn.functional.linear(x["ref_hidden"], x["ref_weight"]), "ref_logprobs": x["ref"]}
    from_logits = fastppo.ppo_loss(*rollout[1:], logits=logits, targets=x["targets"], **ref, **options, **garbage)
    from_logits.loss.backward()
    for loss in (out.loss, from_logits.loss):
        torch.testing.assert_close(loss.detach().double(), want, atol=2e-5, rtol=2e-5)
    for got, expected in zip((h.grad, w.grad, bias.grad, logit_h.grad), (*want_grads, want_grads[0]), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=5e-5, rtol=5e-5)
    if case.get("kl_estimator") != "exact":
        given = {"logprobs": out.logprobs, "entropy": out.entropy, "ref_logprobs": x["ref"]}
        loss = fastppo.ppo_loss(*rollout[1:], **given, **options, **weights).loss
        torch.testing.assert_close(loss.double(), want, atol=2e-5, rtol=2e-5)
    plain = fastppo.ppo_loss(*rollout[1:], logits=logits, targets=x["targets"], **ref, **options).metrics
    assert plain.pop("policy_loss") != from_logits.metrics["policy_loss"]
    assert plain["clip_fraction"] + plain["dual_clip_fraction"] > 0
    for name, value in plain.items():
        torch.testing.assert_close(from_logits.metrics[name], value, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_are_what_they_say(backend):
    x = ppo_inputs()
    out = fastppo.linear_ppo_loss(
        x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"], mask=x["mask"], bias=x["bias"],
        ref_logprobs=x["ref"], kl_estimator="k3", dual_clip=1.2, backend=backend,
    )  # fmt: skip
    m = x["mask"]
    z = oracle.logits(x["hidden"].double().view(28, -1), x["weight"].double(), x["bias"].double())
    log_p = torch.log_softmax(z, -1)
    now = log_p.gather(1, x["targets"].view(-1, 1)).view(4, 7)
    ratio = (now - x["old"].double()).exp()
    a = x["advantages"]
    d = now - x["ref"].double()
    expected = {
        "approx_kl": (ratio - 1 - ratio.log())[m].mean(),
        "clip_fraction": (((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0)))[m].double().mean(),
        "dual_clip_fraction": ((ratio > 1.2) & (a < 0))[m].double().mean(),
        "ratio_mean": ratio[m].mean(),
        "ratio_min": ratio[m].min(),
        "ratio_max": ratio[m].max(),
        "entropy": -(log_p.exp() * log_p).sum(-1).view(4, 7)[m].mean(),
        "kl": ((-d).exp() - 1 + d)[m].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name].double(), value, atol=1e-5, rtol=1e-5, msg=name)
    assert not any(v.requires_grad for v in out.metrics.values())
    torch.testing.assert_close(out.logprobs[m].double(), now[m], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_all_masked_give_zeros_that_backpropagate(backend):
    hidden, weight, _ = random_head(6, 5, 31)
    for n, mask in ((0, None), (6, torch.zeros(6, dtype=torch.bool))):
        h, w = leaves(hidden[:n], weight)
        targets = torch.randint(0, 31, (n,))
        out = fastppo.linear_ppo_loss(
            h, w, targets, torch.zeros(n), torch.ones(n), mask=mask, entropy_coef=0.1, backend=backend
        )
        out.loss.backward()
        assert out.loss == 0
        assert torch.equal(h.grad, torch.zeros_like(h))
        assert torch.equal(w.grad, torch.zeros_like(w))
        h, w = leaves(hidden[:n], weight)
        lp = fastppo.linear_logprob(h, w, targets if mask is None else torch.full((n,), -100), backend=backend)
        lp.logprobs.sum().backward()
        assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing(offset):
    hidden, weight, _ = random_head(8, 6, 50)
    hidden, weight = (hidden * 64).round() / 64, (weight * 64).round() / 64  # logits exact in float32 even at ±1e4
    bias = torch.zeros(50)
    targets = torch.randint(0, 50, (8,))
    results = []
    for shift in (0.0, offset):
        h, w = leaves(hidden, weight)
        out = fastppo.linear_logprob(h, w, targets, bias=bias + shift, return_entropy=True)
        (out.logprobs + out.entropy).sum().backward()
        results.append((out.logprobs, out.entropy, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_never_positive_and_entropy_stays_in_range(scale, dtype):
    hidden, weight, _ = random_head(64, 8, 129, scale=scale, dtype=dtype)
    weight[1] = weight[0]  # identical columns
    out = fastppo.linear_logprob(hidden, weight, torch.randint(0, 129, (64,)), return_entropy=True)
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(129)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary_columns_get_no_probability_and_no_nan(backend):
    hidden, weight, _ = random_head(10, 6, 40)
    bias = torch.zeros(40)
    bias[7:33] = -torch.inf
    targets = torch.randint(0, 7, (10,))
    h, w = leaves(hidden, weight)
    with fastppo.scratch_budget(TINY_BUDGET):
        out = fastppo.linear_logprob(h, w, targets, bias=bias, return_entropy=True, backend=backend)
        (out.logprobs + out.entropy).sum().backward()
    keep = [*range(7), *range(33, 40)]
    want = torch.log_softmax(hidden.double() @ weight.double()[keep].T, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(out.logprobs.double(), want, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(w.grad).all()
    assert w.grad[7:33].abs().max() == 0
    kl = fastppo.linear_kl(h, w, hidden * 1.1, weight, bias=bias, ref_bias=bias, backend=backend)
    assert torch.isfinite(kl).all()


def test_one_column_vocabulary():
    hidden, weight, _ = random_head(5, 4, 1)
    h, w = leaves(hidden, weight)
    out = fastppo.linear_logprob(h, w, torch.zeros(5, dtype=torch.long), return_entropy=True)
    (out.logprobs + out.entropy).sum().backward()
    assert torch.equal(out.logprobs, torch.zeros(5))
    assert torch.equal(out.entropy, torch.zeros(5))
    assert h.grad.abs().max() == 0


def test_clipped_rows_are_left_out_of_the_second_pass(monkeypatch):
    """A row whose scalars are all zero costs nothing and gets an exact zero."""
    hidden, weight, _ = random_head(40, 6, 33)
    targets = torch.randint(0, 33, (40,))
    now = fastppo.linear_logprob(hidden, weight, targets).logprobs
    old = now.clone()
    old[:30] -= 1.0  # ratio e: clipped wherever the advantage is positive
    h, w = leaves(hidden, weight)
    seen = []
    from fastppo.engines.chunked.linear import LogitGradient

    original = LogitGradient.tile
    monkeypatch.setattr(
        LogitGradient, "tile", lambda self, *a: seen.append(len(self.policy.hidden)) or original(self, *a)
    )
    fastppo.linear_ppo_loss(h, w, targets, old, torch.ones(40), backend="chunked").loss.backward()
    assert seen == [10]
    assert torch.equal(h.grad[:30], torch.zeros(30, 6))
    assert h.grad[30:].abs().sum() > 0


def test_non_contiguous_inputs_and_int32_targets():
    hidden, weight, _ = random_head(3 * 8, 10, 50)
    hidden = hidden.view(3, 8, 10)
    view, targets = hidden[:, 2:-1], torch.randint(0, 50, (3, 5))
    w = weight.T.contiguous().T
    a = fastppo.linear_logprob(view, w, targets.int()).logprobs
    b = fastppo.linear_logprob(view.contiguous(), weight, targets).logprobs
    torch.testing.assert_close(a, b)
    assert a.shape == (3, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_inputs_have_the_gradients_of_contiguous_ones(backend):
    """Also for a loss that is scaled, which is done in the gradients' own memory."""
    x = ppo_inputs()
    gradients = []
    for transposed in ((), ("hidden",), ("weight",)):
        h, w = (
            x[name].flatten(0, -2).T.contiguous().T if name in transposed else x[name].flatten(0, -2)
            for name in ("hidden", "weight")
        )
        h, w = leaves(h, w)
        rows = (x[name].flatten() for name in ("targets", "old", "advantages"))
        out = fastppo.linear_ppo_loss(h, w, *rows, mask=x["mask"].flatten(), backend=backend)
        (3.0 * out.loss).backward()
        gradients.append((h.grad, w.grad))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_autocast_computes_in_low_precision_and_returns_full_precision_gradients():
    hidden, weight, _ = random_head(33, 24, 301)
    targets = torch.randint(0, 301, (33,))
    h, w = leaves(hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        low = fastppo.linear_logprob(h, w, targets)
    low.logprobs.sum().backward()
    exact = fastppo.linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)
    torch.testing.assert_close(low.logprobs, exact.logprobs)
    assert h.grad.dtype == w.grad.dtype == torch.float32


def test_gradients_accumulate_and_scale_like_any_loss():
    x = ppo_inputs()
    h, w = leaves(x["hidden"], x["weight"])

    def loss():
        return fastppo.linear_ppo_loss(h, w, x["targets"], x["old"], x["advantages"], mask=x["mask"]).loss

    loss().backward()
    once = w.grad.clone()
    (0.5 * loss()).backward()
    torch.testing.assert_close(w.grad, 1.5 * once)


HALVES = (torch.bfloat16, torch.float16)  # a compiler writes the others' arithmetic as it stands


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [(dtype, None) for dtype in (*HALVES, torch.float32, torch.float64)]
    + [(dtype, "aot_eager") for dtype in HALVES]
    + [pytest.param(dtype, "inductor", marks=pytest.mark.slow) for dtype in HALVES],
)
def test_the_losss_own_gradient_multiplies_without_being_rounded(dtype, compiler):
    """In bfloat16 1/3 was off by 0.2%, and a gradient scaler's 65,536 was infinite in float16."""
    x = ppo_inputs()
    arguments = (x["targets"], x["old"].to(torch.promote_types(dtype, torch.float32)), x["advantages"])

    def loss(h, w, factor):
        return factor * fastppo.linear_ppo_loss(h, w, *arguments, backend="chunked").loss

    torch.compiler.reset()
    called = loss if compiler is None else torch.compile(loss, fullgraph=True, backend=compiler)
    plain = leaves(x["hidden"], x["weight"], dtype=dtype)
    by = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    called(*plain, by).backward()
    for factor in (1 / 3, 65536.0, 1.0, 0.0, -2.5):
        scaled = leaves(x["hidden"], x["weight"], dtype=dtype)
        value = called(*scaled, torch.full_like(by, factor))
        with fastppo.scratch_budget(2**10):  # several parts of the gradient
            value.backward()
        for one, other in zip(plain, scaled, strict=True):
            exact = one.grad.double() * factor
            finite = torch.isfinite(other.grad)
            assert torch.equal(finite, exact.to(dtype).isfinite())  # infinite only where the product itself is
            error = (other.grad.double() - exact)[finite].abs()
            relative = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(by.dtype).eps
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert (error <= relative * exact[finite].abs() + smallest).all()


def test_a_gradient_of_one_is_handed_over_untouched():
    x = ppo_inputs()
    h, w = leaves(x["hidden"], x["weight"])
    loss = fastppo.linear_ppo_loss(h, w, x["targets"], x["old"], x["advantages"], mask=x["mask"]).loss
    with Recorder() as seen:
        loss.backward()
    assert not [name for name in seen.operators if "mul" in name or "copy" in name]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    x = ppo_inputs()
    h, w = leaves(x["hidden"], x["weight"])
    {"hidden": h, "weight": w}[frozen].requires_grad_(False)
    fastppo.linear_ppo_loss(h, w, x["targets"], x["old"], x["advantages"]).loss.backward()
    assert (h.grad is None) == (frozen == "hidden")
    assert (w.grad is None) == (frozen == "weight")


class Recorder(TorchDispatchMode):
    """The operators that are called, and the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.operators, self.shapes = [], []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.operators.append(str(operator))
        self.shapes += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


def every_loss(h, w, x, backend):
    """The operators with a gradient on one model's head, values only."""
    ref = (x["ref_hidden"], x["ref_weight"])
    return (
        fastppo.linear_ppo_loss(
            h,
            w,
            x["targets"],
            x["old"],
            x["advantages"],
            entropy_coef=0.1,
            mask=x["mask"],
            backend=backend,
            importance_weights=x["importance_weights"],
        ).loss,
        fastppo.linear_logprob(h, w, x["targets"], return_entropy=True, backend=backend).entropy,
        fastppo.linear_kl(h, w, *ref, mask=x["mask"], backend=backend),
        fastppo.ppo_loss(x["old"], x["advantages"], logits=h @ w.T, targets=x["targets"], backend=backend).loss,
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_without_grad_mode_no_gradient_is_computed_or_allocated(mode, backend):
    """Also where the weight is a parameter, which requires gradients in any mode."""
    x = ppo_inputs()
    h, w = x["hidden"].requires_grad_(), torch.nn.Parameter(x["weight"])
    want = every_loss(h, w, x, backend)
    with mode(), Recorder() as seen:
        got = every_loss(h, w, x, backend)
    assert any("statistics" in name for name in seen.operators)
    assert not [name for name in seen.operators if "vjp" in name or "gradient" in name or "keeping" in name]
    assert w.shape not in seen.shapes
    for a, b in zip(got, want, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiled_loss_without_grad_mode_computes_no_gradient(mode):
    x = ppo_inputs()
    h, w, names = x["hidden"].requires_grad_(), torch.nn.Parameter(x["weight"]), []

    def record(graph, inputs):
        for module in graph.modules():
            names.extend(str(node.target) for node in module.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda h, w: every_loss(h, w, x, "chunked"), fullgraph=True, backend=record)
    with mode():
        got = compiled(h, w)
    assert any("statistics" in name for name in names)
    assert not [name for name in names if "vjp" in name]
    for a, b in zip(got, every_loss(h, w, x, "chunked"), strict=True):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_compiles_without_graph_breaks(entropy_coef):
    x = ppo_inputs()

    def loss(h, w):
        lp = fastppo.linear_logprob(h, w, x["targets"], return_entropy=True)
        out = fastppo.linear_ppo_loss(
            h, w, x["targets"], x["old"], x["advantages"], mask=x["mask"], entropy_coef=entropy_coef
        )
        return out.loss + lp.logprobs.mean() + 0.1 * lp.entropy.mean()

    eager, compiled = leaves(x["hidden"], x["weight"]), leaves(x["hidden"], x["weight"])
    a = loss(*eager)
    a.backward()
    b = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled)
    b.backward()
    torch.testing.assert_close(a, b)
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_activation_checkpointing():
    x = ppo_inputs()
    h, w = leaves(x["hidden"], x["weight"])
    h2, w2 = leaves(x["hidden"], x["weight"])

    def loss(h, w):
        return fastppo.linear_ppo_loss(h, w, x["targets"], x["old"], x["advantages"]).loss

    loss(h, w).backward()
    torch.utils.checkpoint.checkpoint(loss, h2, w2, use_reentrant=False).backward()
    torch.testing.assert_close(h.grad, h2.grad)
    torch.testing.assert_close(w.grad, w2.grad)


def test_same_bits_every_time():
    x = ppo_inputs()
    grads = []
    for _ in range(2):
        h, w = leaves(x["hidden"], x["weight"])
        fastppo.linear_ppo_loss(h, w, x["targets"], x["old"], x["advantages"], entropy_coef=0.1).loss.backward()
        grads.append((h.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


BAD = [
    ({"weight": torch.zeros(97, 12)}, ValueError, "weight"),
    ({"weight": torch.zeros(97, 11, dtype=torch.bfloat16)}, TypeError, "weight"),
    ({"hidden": torch.zeros(4, 7, 11, dtype=torch.int64)}, TypeError, "hidden"),
    ({"targets": torch.full((4, 7), 97)}, ValueError, "targets"),
    ({"targets": torch.full((4, 7), -2)}, ValueError, "targets"),
    ({"targets": torch.zeros(4, 6, dtype=torch.long)}, ValueError, "targets"),
    ({"targets": torch.zeros(4, 7)}, TypeError, "targets"),
    ({"advantages": torch.full((4, 7), float("nan"))}, ValueError, "advantages"),
    ({"old_logprobs": torch.full((4, 7), float("inf"))}, ValueError, "old_logprobs"),
    ({"old_logprobs": torch.zeros(4, 8)}, ValueError, "old_logprobs"),
    (
        {"importance_weights": torch.full((4, 7), -0.5)},
        ValueError,
        "importance_weights: expected numbers of at least 0",
    ),
    ({"mask": torch.ones(4, 8, dtype=torch.bool)}, ValueError, "mask"),
    ({"bias": torch.zeros(96)}, ValueError, "bias"),
    ({"kl_coef": 0.1}, ValueError, "ref_logprobs"),
    ({"kl_coef": 0.1, "kl_estimator": "exact"}, ValueError, "kl_estimator"),
    ({"ref_hidden": torch.zeros(4, 7, 3)}, ValueError, "ref_weight"),
    ({"kl_estimator": "k4"}, ValueError, "kl_estimator"),
    ({"loss_agg": "mean"}, ValueError, "loss_agg"),
    ({"ratio_level": "word"}, ValueError, "ratio_level"),
    ({"clip_low": -0.1}, ValueError, "clip_low"),
    ({"dual_clip": 0.5}, ValueError, "dual_clip"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"entropy_coef": float("nan")}, ValueError, "entropy_coef"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"backend": "triton"}, ValueError, "backend"),
]


@pytest.mark.parametrize(("change", "error", "names"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_named(change, error, names):
    arguments = {
        "hidden": torch.zeros(4, 7, 11),
        "weight": torch.zeros(97, 11),
        "targets": torch.zeros(4, 7, dtype=torch.long),
        "old_logprobs": torch.zeros(4, 7),
        "advantages": torch.zeros(4, 7),
    } | change
    with pytest.raises(error, match=names):
        fastppo.linear_ppo_loss(**arguments)


def test_sequence_losses_need_sequences():
    with pytest.raises(ValueError, match="batch, time"):
        fastppo.linear_ppo_loss(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long), torch.zeros(3), torch.zeros(3),
            ratio_level="sequence",
        )  # fmt: skip


def test_environment_chooses_the_backend(monkeypatch):
    from fastppo.engines.dispatch import select

    cpu = torch.device("cpu")
    monkeypatch.setenv("FASTPPO_BACKEND", "reference")
    assert select("linear_logprob", cpu, torch.float32) == "reference"
    assert select("linear_logprob", cpu, torch.float32, "chunked") == "chunked"
    monkeypatch.setenv("FASTPPO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTPPO_BACKEND"):
        select("linear_logprob", cpu, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_estimator_decides_which_kl_the_loss_has(backend):
    """With both kinds of reference given, value and gradient are those of `kl_estimator`, on every backend."""
    x = ppo_inputs()
    both = {"ref_logprobs": x["ref"], "ref_hidden": x["ref_hidden"], "ref_weight": x["ref_weight"]}
    for estimator in ("k3", "exact"):
        case = {"kl_coef": 0.5, "kl_estimator": estimator}
        want, want_grads = oracle_ppo(x, case)
        h, w, bias = leaves(x["hidden"], x["weight"], x["bias"])
        out = fastppo.linear_ppo_loss(
            h,
            w,
            x["targets"],
            x["old"],
            x["advantages"],
            mask=x["mask"],
            bias=bias,
            backend=backend,
            **both,
            **case,
        )
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach().double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(h.grad.double(), want_grads[0], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rollouts_go_with_float32_models(backend):
    x = ppo_inputs()
    h, w = leaves(x["hidden"], x["weight"])
    out = fastppo.linear_ppo_loss(
        h, w, x["targets"], x["old"].double(), x["advantages"].double(), mask=x["mask"],
        ref_logprobs=x["ref"].double(), kl_coef=0.1, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.dtype == h.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_is_a_constant(backend):
    hidden, weight, bias = random_head(6, 5, 31, bias=True)
    ref = leaves(hidden * 1.2, weight, bias)
    h, w, b = leaves(hidden, weight, bias)
    fastppo.linear_kl(h, w, ref[0], ref[1], bias=b, ref_bias=ref[2], backend=backend).sum().backward()
    assert all(leaf.grad is None for leaf in ref)
    assert h.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_small_divergences_keep_their_digits(backend):
    """As accurate as the naive path, also where the models all but agree."""
    hidden, weight, _ = random_head(200, 16, 501, scale=2.0)
    for distance in (1e-1, 1e-2, 1e-3):
        other = hidden + distance * torch.randn_like(hidden)
        args = (hidden, weight, other, weight)
        exact = fastppo.linear_kl(*(x.double() for x in args), backend="reference")
        naive, fused = (fastppo.linear_kl(*args, backend=b).double() - exact for b in ("reference", backend))
        assert fused.square().mean() <= 1.5**2 * naive.square().mean()


def test_a_target_outside_the_vocabulary_never_passes_for_a_probability():
    hidden, weight, _ = random_head(3, 4, 11)
    compiled = torch.compile(lambda t: fastppo.linear_logprob(hidden, weight, t).logprobs, backend="eager")
    assert compiled(torch.tensor([1, 99, 2])).isnan().tolist() == [False, True, False]


def test_the_gradients_are_handed_over_once():
    x = ppo_inputs()
    h, w = leaves(x["hidden"], x["weight"])
    loss = fastppo.linear_ppo_loss(h, w, x["targets"], x["old"], x["advantages"]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward took its gradients"):
        loss.backward()
