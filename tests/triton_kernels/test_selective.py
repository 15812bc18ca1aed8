"""selective_logprob on the Triton kernels against the float64 oracle."""

from __future__ import annotations

import host_waits
import oracle
import pytest
import torch
from fastppo_kernels import selective as kernels
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.ops import selective_logprob as ops

TRANSFORMS = [{}, {"logit_scale": 0.3, "temperature": 1.3}, {"softcap": 3.0, "logit_scale": 2.0, "temperature": 0.5}]


def check(
    device, n, v, transform, masked, *, dtype=torch.float32, inplace=False, zeroed=0.3, tolerance=2e-5, wrap=lambda x: x
):
    """wrap: lays the logits out in memory in another way."""
    logits = (4 * torch.randn(n, v)).to(device, dtype)
    targets = torch.randint(0, v, (n,), device=device)
    targets[torch.rand(n) < masked] = -7
    upstream = torch.randn(3, n, device=device)
    upstream[:, torch.rand(n) < zeroed] = 0
    leaf = logits.clone().requires_grad_()
    out = fastppo.selective_logprob(
        wrap(leaf * 1.0), targets, ignore_index=-7, return_entropy=True, inplace_backward=inplace, backend="triton",
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


def test_transposed_logits(device):
    check(device, 9, 77, {}, 0.2, wrap=lambda x: x.t().contiguous().t())


def test_rows_longer_than_a_block(device):
    check(device, 5, 9001, {}, 0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_logits(device, dtype, tolerance):
    check(device, 17, 301, {}, 0.2, dtype=dtype, tolerance=tolerance)


def in_a_buffer(stride, offset):
    """A view of the same numbers whose rows are `stride` elements apart, from `offset` on, with NaN between them."""

    def wrap(x):
        buffer = x.new_full((offset + x.shape[0] * stride,), float("nan"))
        view = buffer.as_strided(x.shape, (stride, 1), offset)
        view.copy_(x)
        return view

    return wrap


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a row of a few hundred columns has tiles within it, as one of 50,257 has."""
    for name in ("selective_statistics", "selective_statistics_kl", "selective_gradient"):
        monkeypatch.setitem(kernels.ELEMENTWISE, name, kernels.ELEMENTWISE[name]._replace(block=128))


@pytest.mark.parametrize(("stride", "offset"), [(603, 0), (611, 0), (616, 0), (613, 3), (608, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_at_any_address(device, small_tiles, stride, offset, dtype):
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    check(device, 9, 603, {}, 0.2, dtype=dtype, tolerance=tolerance, wrap=in_a_buffer(stride, offset))
    check(device, 7, 203, {}, 0.2, dtype=dtype, tolerance=tolerance, wrap=in_a_buffer(stride, offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ref_dtype", [torch.float32, torch.float16])
def test_a_reference_and_a_gradient_aligned_otherwise(device, small_tiles, dtype, ref_dtype):
    n, v = 5, 403
    logits, ref_logits = torch.randn(n, v).to(dtype), torch.randn(n, v).to(ref_dtype)
    targets, upstream = torch.randint(0, v, (n,)), torch.randn(4, n)
    exact = logits.double().requires_grad_()
    rows = [oracle.row(exact[i], targets[i]) for i in range(n)]
    kl = torch.stack([oracle.divergence(exact[i], ref_logits[i].double(), "reverse") for i in range(n)])
    values = (*(torch.stack([r[k] for r in rows]) for k in range(3)), kl)
    sum((g.double() * x).sum() for g, x in zip(upstream, values, strict=True)).backward()

    z, ref_z = (in_a_buffer(s, o)(x.to(device)) for s, o, x in ((405, 1, logits), (410, 0, ref_logits)))
    out = in_a_buffer(403, 2)(torch.zeros_like(logits).to(device))
    transform = (1.0, 1.0, None)
    saved = kernels.statistics(z, ref_z, targets.to(device), *transform)
    kernels.vjp_into(out, z, ref_z, targets.to(device), saved, *upstream.to(device), *transform)
    for got, want in zip((saved[0], saved[1], saved[2] + saved[3], saved[4]), values, strict=True):
        torch.testing.assert_close(got.double().cpu(), want.detach(), atol=2e-5, rtol=2e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double().cpu(), exact.grad, atol=tolerance, rtol=tolerance)


def test_a_gradient_in_place_leaves_what_lies_between_rows(device, small_tiles):
    logits, targets = torch.randn(6, 403, device=device), torch.randint(0, 403, (6,), device=device)
    targets[2] = -1
    view = in_a_buffer(407, 1)(logits)
    buffer = view.as_strided((1 + 6 * 407,), (1,), 0)
    saved = kernels.statistics(view, None, targets, 1.0, 1.0, None)
    kernels.vjp_into(view, view, None, targets, saved, torch.ones(6, device=device), None, None, None, 1.0, 1.0, None)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside.as_strided((6, 403), (407, 1), 1).fill_(True)
    assert torch.equal(buffer.isnan(), ~inside)
    want = torch.nn.functional.one_hot(targets.clamp(min=0), 403) - logits.softmax(1)
    torch.testing.assert_close(view, want.masked_fill(targets.unsqueeze(1) < 0, 0.0), atol=1e-5, rtol=1e-5)


def test_rows_beyond_two_to_the_31_elements(device):
    """Only the pages that hold the three rows are ever touched."""
    stride = 2**30 + 3
    try:
        buffer = torch.empty(2 * stride + 203, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    logits, targets = torch.randn(3, 203).half(), torch.randint(0, 203, (3,), device=device)
    view = buffer.as_strided((3, 203), (stride, 1))
    view.copy_(logits)
    ones = torch.ones(3, device=device)
    got, want = (kernels.statistics(x, None, targets, 1.0, 1.0, None) for x in (view, logits.to(device)))
    assert all(map(torch.equal, got, want))
    out = torch.empty(3, 203, dtype=torch.float16, device=device)
    kernels.vjp_into(out, logits.to(device), None, targets, want, ones, ones, None, None, 1.0, 1.0, None)
    kernels.vjp_into(view, view, None, targets, got, ones, ones, None, None, 1.0, 1.0, None)
    assert torch.equal(view, out)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_host_never_waits(device, inplace):
    logits = torch.randn(7, 203, device=device, requires_grad=True)
    targets = torch.randint(0, 203, (7,), device=device)

    def run():
        out = fastppo.selective_logprob(
            logits * 1.0, targets, return_entropy=True, inplace_backward=inplace, backend="triton"
        )
        (out.logprobs + out.entropy).sum().backward()

    if device.type == "cuda":
        run()  # compiles
    with host_waits.no_host_waits(device):
        run()


@settings(max_examples=10, deadline=None)
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
    torch.testing.assert_close(plain.logprobs, moved.logprobs, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(plain.entropy, moved.entropy, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("mask", [-1e9, -1e12, -1e30, torch.finfo(torch.float32).min])
def test_columns_masked_by_a_finite_number(device, mask):
    """Whole lanes of 16 bytes, where products are fused: their maxima are rounded by more than exp2 can take."""
    logits = torch.randn(4, 700, device=device)
    logits[:, 8:656] = mask * (1 + 0.1 * torch.rand(648, device=device)).clamp(max=1 if mask < -1e30 else 2)
    targets = torch.randint(660, 700, (4,), device=device)
    for reference in (None, logits + torch.randn(4, 700, device=device)):
        out = kernels.statistics(logits, reference, targets, 1.0, 1.0, None)
        kept = [None if x is None else torch.cat([x[:, :8], x[:, 656:]], 1) for x in (logits, reference)]
        want = kernels.statistics(*kept, targets - 648, 1.0, 1.0, None)
        for a, b in zip(out, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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
    options, checks = (1.0, 1.0, None, torch.float32, 2**20, "triton"), ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._statistics, (logits, None, targets, *options), test_utils=checks)
    saved = ops._statistics(logits, None, targets, *options)
    upstream = (torch.randn(5, device=device), None, torch.randn(5, device=device))
    for op in (ops._vjp, ops._vjp_):
        torch.library.opcheck(op, (logits.clone(), None, targets, *upstream, None, *options, saved), test_utils=checks)
    torch.library.opcheck(ops._statistics, (logits, logits, targets, *options), test_utils=checks)
    saved = ops._statistics(logits, logits.clone(), targets, *options)
    torch.library.opcheck(
        ops._vjp, (logits, logits.clone(), targets, *upstream, upstream[0], *options, saved), test_utils=checks
    )


PPO_CASES = [
    {"clip_low": 0.1, "clip_high": 0.3, "entropy_coef": 0.02},
    {"kl_coef": 0.2, "kl_estimator": "k3", "loss_agg": "seq-mean-token-sum-norm", "dual_clip": 1.3},
    {"kl_coef": 0.3, "kl_estimator": "exact", "entropy_coef": 0.01, "softcap": 4.0, "temperature": 0.8},
    {"kl_coef": 0.3, "kl_estimator": "exact", "ratio_level": "sequence"},
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", PPO_CASES, ids=str)
def test_ppo_loss_from_logits(device, case, inplace):
    b, t, v = 3, 7, 89
    logits, ref_logits = 3 * torch.randn(b, t, v), 3 * torch.randn(b, t, v)
    targets, mask, advantages = torch.randint(0, v, (b, t)), torch.rand(b, t) < 0.7, torch.randn(b, t)
    transform = {k: case[k] for k in ("softcap", "temperature") if k in case}
    options = {k: x for k, x in case.items() if k not in transform}
    exact = logits.double().requires_grad_()
    identity = torch.eye(v, dtype=torch.float64)
    z, ref_z = (oracle.logits(x.view(b * t, v), identity, **transform) for x in (exact, ref_logits.double()))
    rows = [oracle.row(z[n], targets.flatten()[n]) for n in range(b * t)]
    now = torch.stack([r[0] for r in rows]).detach().view(b, t)
    old, ref = (now + 0.3 * torch.randn(b, t)).float(), (now + 0.3 * torch.randn(b, t)).float()

    def grid(flat):
        return [[flat[i * t + j] for j in range(t)] for i in range(b)]

    kls = grid([oracle.divergence(z[n], ref_z[n], "reverse") for n in range(b * t)])
    want = oracle.ppo(
        grid([r[0] for r in rows]), grid([r[1] for r in rows]), old.double(), advantages.double(), mask.tolist(),
        ref=ref.double(), exact_kl=kls, **options,
    )  # fmt: skip
    want.backward()

    given = {"ref_logits": ref_logits} if options.get("kl_estimator") == "exact" else {"ref_logprobs": ref}
    leaf = logits.masked_fill(~mask.unsqueeze(-1), float("nan")).to(device).requires_grad_()
    on_device = {k: x.to(device) for k, x in {"targets": targets, "mask": mask, **given}.items()}
    out = fastppo.ppo_loss(
        old.to(device), advantages.to(device), logits=leaf * 1.0, inplace_backward=inplace, backend="triton",
        **on_device, **case,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach().double().cpu(), want.detach(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(leaf.grad.double().cpu(), exact.grad, atol=2e-5, rtol=2e-5)


def test_the_divergence_of_logits_close_together_keeps_its_digits(device):
    """KL is quadratic in the difference: sums of whole logits would leave none of its digits."""
    logits = torch.randn(6, 200, dtype=torch.float64)
    moved = logits + 0.03 * torch.randn(6, 200, dtype=torch.float64)
    want = torch.stack([oracle.divergence(a, b, "reverse") for a, b in zip(logits, moved, strict=True)])
    targets = torch.zeros(6, dtype=torch.long, device=device)
    rounded = [x.to(device, torch.float32) for x in (logits, moved)]
    kl = kernels.statistics(*rounded, targets, 1.0, 1.0, None)[4]
    torch.testing.assert_close(kl.double().cpu(), want, atol=0, rtol=0.02)


def test_the_divergence_counts_the_whole_distance_to_a_model_that_all_but_excludes_tokens(device):
    logits = torch.randn(6, 5000).double()
    far = logits.clone()
    far[:, :1500] -= 1e6 * torch.rand(1500) + 3e4
    want = torch.stack([oracle.divergence(a, b, "reverse") for a, b in zip(logits, far, strict=True)])
    targets = torch.zeros(6, dtype=torch.long, device=device)
    for order in (torch.arange(5000), torch.arange(5000).flip(0)):
        rounded = [x[:, order].to(device, torch.float32) for x in (logits, far)]
        kl = kernels.statistics(*rounded, targets, 1.0, 1.0, None)[4]
        torch.testing.assert_close(kl.double().cpu(), want, atol=0, rtol=1e-4)


def test_a_nan_is_not_hidden(device):
    logits = torch.randn(3, 50, device=device)
    logits[1, 7] = float("nan")
    targets = torch.tensor([4, 5, 6], device=device)
    for reference in (None, torch.randn(3, 50, device=device)):
        logprobs, entropy, _, _, *rest = kernels.statistics(logits, reference, targets, 1.0, 1.0, None)
        for result in (logprobs, entropy, *rest[:1]):
            assert result.isnan().tolist() == [False, True, False]


def test_a_target_outside_the_vocabulary_gives_nan_and_is_not_read(device):
    """On a GPU nobody looks at targets beforehand."""
    logits = torch.randn(2, 100, device=device)[:, :50]
    targets = torch.tensor([50, 3], device=device)
    logprobs = kernels.statistics(logits, None, targets, 1.0, 1.0, None)[0]
    assert logprobs[0].isnan()
    assert torch.isfinite(logprobs[1])
