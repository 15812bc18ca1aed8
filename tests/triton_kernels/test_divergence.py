"""Exact divergences between two models from their hidden states, against the float64 oracle, a row at a time."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from compilations import compilations
from fastppo_kernels.combine import combine_divergence
from fastppo_kernels.divergence import launch_divergence
from fastppo_kernels.launch import interpreted_dtype
from fastppo_kernels.operands import Projection
from fastppo_kernels.rows import compact_rows, gather_rows, target_logits
from fastppo_kernels.tile import transform_factors
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = ["reverse", "forward"]
TRANSFORMS = [
    {},
    {"logit_scale": 0.3, "temperature": 1.3},
    {"softcap": 3.0, "logit_scale": -2.0, "temperature": 0.5},
]
NAMES = ("logprobs", "entropy", "row_max", "log_sum", "kl", "kl_center", "ref_row_max", "ref_log_sum")


def random_model(n, d, v, device, *, bias=False, scale=2.0):
    """hidden, weight, bias."""
    model = [scale * torch.randn(n, d), torch.randn(v, d) / math.sqrt(d), torch.randn(v) if bias else None]
    return [None if x is None else x.to(device) for x in model]


def random_targets(n, v, device, masked=0.2):
    targets = torch.randint(v, (n,), device=device)
    targets[torch.rand(n) < masked] = -100
    return targets


def divergence(policy, reference, targets, kind, width=None, **transform):
    """The eight results by name, [N] each, NaN where a row was not named."""
    factors = transform_factors(**{"temperature": 1.0, "logit_scale": 1.0, "softcap": None, **transform})
    rows, count = compact_rows(targets)
    dtype = interpreted_dtype(policy[0].dtype)
    models = [
        Projection.make(gather_rows(h, rows, count, dtype), w, b, 2**25, width) for h, w, b in (policy, reference)
    ]
    partial = launch_divergence(*models, count, kind=kind, transform=factors)
    taken = target_logits(*models[0][:3], targets, rows, count, **factors)
    vocab = policy[1].shape[0]
    out = torch.full((8, targets.numel()), torch.nan, device=targets.device)
    combine_divergence(partial, taken, targets, rows, count, out, vocab, kind)
    return dict(zip(NAMES, out.unbind(0), strict=True))


def check(policy, reference, targets, kind, width=None, tolerance=3e-5, **transform):
    got = divergence(policy, reference, targets, kind, width, **transform)
    z, ref_z = (
        oracle.logits(*(None if x is None else x.double() for x in m), **transform) for m in (policy, reference)
    )
    for n, target in enumerate(targets.tolist()):
        if target < 0:
            assert all(x[n].isnan() for x in got.values())
            continue
        logprob, entropy, lse = oracle.row(z[n], target)
        want = {"logprobs": logprob, "entropy": entropy, "row_max": z[n].max(), "ref_row_max": ref_z[n].max()}
        want["kl"] = want["kl_center"] = oracle.divergence(z[n], ref_z[n], kind)
        want["log_sum"], want["ref_log_sum"] = lse - z[n].max(), oracle.row(ref_z[n])[2] - ref_z[n].max()
        for name, value in want.items():
            torch.testing.assert_close(
                got[name][n].double(), value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert 0 <= got["entropy"][n] <= math.log(z.shape[1])
        assert got["kl"][n] >= 0
        assert got["logprobs"][n] <= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_result(device, kind, transform):
    """Several row blocks and column tiles, other hidden sizes, masked rows, a bias of the one model."""
    policy, reference = random_model(71, 19, 203, device, bias=True), random_model(71, 33, 203, device)
    check(policy, reference, random_targets(71, 203, device), kind, **transform)
    check(reference, policy, random_targets(71, 203, device), kind, **transform)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 96),
    ref_d=st.integers(1, 96),
    v=st.integers(1, 150),
    bias=st.booleans(),
    kind=st.sampled_from(KINDS),
    transform=st.sampled_from(TRANSFORMS),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, n, d, ref_d, v, bias, kind, transform, masked, seed):
    torch.manual_seed(seed)
    policy, reference = (random_model(n, size, v, device, bias=bias) for size in (d, ref_d))
    check(policy, reference, random_targets(n, v, device, masked), kind, **transform)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_the_vocabulary(device, kind):
    """More tiles than are merged at once; a transposed and a half-precision weight are copied a slice at a time."""
    policy, reference = random_model(37, 16, 1037, device, bias=True), random_model(37, 8, 1037, device, bias=True)
    targets = random_targets(37, 1037, device)
    check(policy, reference, targets, kind, width=512)
    policy[1], reference[1] = policy[1].T.contiguous().T, reference[1].half()
    check(policy, reference, targets, kind, width=512)
    check(policy, reference, targets, kind)


def test_unequal_slices_are_refused(device):
    model, targets = random_model(3, 8, 90, device), random_targets(3, 90, device, 0)
    rows, count = compact_rows(targets)
    hidden = gather_rows(model[0], rows, count, torch.float32)
    heads = [Projection.make(hidden, *model[1:], 2**25, width) for width in (64, 60)]
    with pytest.raises(ValueError, match="span 0:64"):
        launch_divergence(*heads, count, kind="reverse", transform=transform_factors(1.0, 1.0, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_model_is_at_no_distance_from_itself(device, kind, offset):
    model = random_model(40, 24, 203, device, bias=True)
    other = [model[0], model[1], model[2] + offset]  # the same distribution, up to the rounding of its logits
    targets = random_targets(40, 203, device, 0)
    got = divergence(model, other, targets, kind)["kl"]
    # A sum of 203 exponentials is rounded at each of the 8 levels of its tree, by half an epsilon of itself at most.
    # The compiler may order or contract the two sums differently: the logarithm of their quotient is within 8 epsilon.
    assert got.max() <= (8 * torch.finfo(torch.float32).eps if offset == 0 else 2e-3)
    assert got.min() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_divergence_is_not_lost(device, kind):
    """Near 1e-6, far below the rounding of the entropy and the cross entropy whose difference it is."""
    policy = random_model(40, 24, 203, device, scale=4.0)
    reference = [policy[0] + 3e-4 * torch.randn_like(policy[0]), policy[1], None]
    targets = random_targets(40, 203, device, 0)
    got = divergence(policy, reference, targets, kind)["kl_center"].double()
    z, ref_z = (oracle.logits(m[0].double(), m[1].double()) for m in (policy, reference))
    want = torch.stack([oracle.divergence(a, b, kind) for a, b in zip(z, ref_z, strict=True)])
    assert want.max() < 1e-6
    assert (got - want).abs().max() < 4e-7


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_ruled_out(device, kind):
    """Logits of −∞ in both models, over whole tiles: the divergence of the rest. In one alone: finite, if huge."""
    policy, reference = (random_model(40, 24, 150, device, bias=True) for _ in range(2))
    alive = torch.ones(150, dtype=torch.bool, device=device)
    alive[:70], alive[100:103] = False, False
    policy[2][~alive] = reference[2][~alive] = -torch.inf
    targets = torch.full((40,), 90, device=device)
    got = divergence(policy, reference, targets, kind)
    fewer = [[m[0], m[1][alive], m[2][alive]] for m in (policy, reference)]
    want = divergence(*fewer, torch.full((40,), 20, device=device), kind)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    excluded = policy if kind == "forward" else reference
    for tokens in (slice(75, 80), slice(70, 130)):  # a part of a tile, all of one
        excluded[2][tokens] = -torch.inf
        got = divergence(policy, reference, targets, kind)
        assert all(x.isfinite().all() for name, x in got.items() if name != "logprobs")
        assert got["kl"].min() > 1e10


@pytest.mark.parametrize("kind", KINDS)
def test_a_far_token_counts_by_its_whole_distance(device, kind):
    policy, reference = (random_model(20, 24, 100, device, bias=True) for _ in range(2))
    (policy if kind == "forward" else reference)[2][::3] -= 5000.0
    check(policy, reference, random_targets(20, 100, device), kind)


def test_a_target_beyond_the_vocabulary_has_no_probability(device):
    policy, reference = (random_model(5, 8, 50, device) for _ in range(2))
    targets = torch.tensor([3, 50, 49, 70, 0], device=device)
    got = divergence(policy, reference, targets, "reverse")
    assert got["logprobs"].isnan().tolist() == [False, True, False, True, False]
    assert got["kl"].isfinite().all()


def test_one_compilation_serves_any_number_of_rows():
    def run(n):
        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, dtype=dtype, device="meta")

        rows, count = compact_rows(meta(n, dtype=torch.int64))
        heads = [
            Projection.make(gather_rows(meta(n, d), rows, count, torch.bfloat16), meta(5057, d), meta(5057), 2**22)
            for d in (896, 576)
        ]
        partial = launch_divergence(*heads, count, kind="reverse", transform=transform_factors(1.0, 1.0, None))
        taken, out = meta(n, dtype=torch.float32), meta(8, n, dtype=torch.float32)
        combine_divergence(partial, taken, meta(n, dtype=torch.int64), rows, count, out, 5057, "reverse")

    found = compilations(run, (16, 17, 1, 48, 1000, 4096))
    assert {name: len(found[name]) for name in ("divergence_kernel", "combine_divergence_kernel")} == {
        "divergence_kernel": 1,
        "combine_divergence_kernel": 1,
    }
