"""The operators under PyTorch's modes and defaults: they compute the same, or say why they cannot."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastppo
from fastppo.engines import extension

BUILT = pytest.mark.skipif(extension.load() is None, reason=extension.why_missing() or "")
BACKENDS = ["reference", "chunked", pytest.param("cpu", marks=BUILT)]
B, T, D, V = 2, 5, 6, 40


def draw() -> dict[str, torch.Tensor]:
    seeded = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,), "logits": (B, T, V)}
    return {
        **{name: torch.randn(shape, generator=seeded) for name, shape in shapes.items()},
        **{f"ref_{name}": torch.randn(shape, generator=seeded) for name, shape in shapes.items()},
        **{name: torch.randn(B, T, generator=seeded) for name in ("advantages", "values", "rewards")},
        "old_logprobs": -torch.rand(B, T, generator=seeded),
        "targets": torch.randint(0, V, (B, T), generator=seeded),
        "mask": torch.rand(B, T, generator=seeded) < 0.8,
    }


LEAVES = ("hidden", "weight", "bias", "logits", "values")


def losses(x: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """A scalar of every operator that has a gradient."""
    head, ref = (x["hidden"], x["weight"]), (x["ref_hidden"], x["ref_weight"])
    rollout = {name: x[name] for name in ("old_logprobs", "advantages", "targets", "mask")}
    exact = {"kl_coef": 0.1, "kl_estimator": "exact", "entropy_coef": 0.1, "backend": backend}
    bias = {"bias": x["bias"], "backend": backend}
    logprob = fastppo.linear_logprob(*head, x["targets"], return_entropy=True, **bias)
    selective = fastppo.selective_logprob(x["logits"], x["targets"], return_entropy=True, backend=backend)
    return {
        "linear_logprob": logprob.logprobs.sum() + logprob.entropy.sum(),
        "linear_kl": fastppo.linear_kl(*head, *ref, mask=x["mask"], **bias).sum(),
        "linear_ppo_loss": fastppo.linear_ppo_loss(
            *head, **rollout, ref_hidden=ref[0], ref_weight=ref[1], bias=x["bias"], **exact
        ).loss,
        "selective_logprob": selective.logprobs.sum() + selective.entropy.sum(),
        "ppo_loss": fastppo.ppo_loss(**rollout, logits=x["logits"], ref_logits=x["ref_logits"], **exact).loss,
        "value_loss": fastppo.value_loss(x["values"], x["rewards"], old_values=x["advantages"], mask=x["mask"]).loss,
    }


def constants(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of the operators that have none."""
    product = fastppo.fisher_vector_product(x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"], mask=x["mask"])
    whitened = fastppo.whiten(x["advantages"], mask=x["mask"])
    return [*product[:2], *fastppo.gae(x["rewards"], x["values"], gamma=0.9, lam=0.8, whiten=True), whitened]


def everything(x: dict[str, torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Losses, their gradients, and the constants."""
    x = x | {name: x[name].detach().requires_grad_() for name in LEAVES}
    scalars = losses(x, backend)
    sum(scalars.values()).backward()
    return [*scalars.values(), *(x[name].grad for name in LEAVES), *constants(x)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(backend, dtype):
    x = draw()
    want = everything(x, backend)
    torch.set_default_dtype(dtype)
    try:
        got = everything(x, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_and_a_reference_may_come_from_inference_mode(backend):
    x = draw()
    with torch.inference_mode():
        rollout = {name: value.clone() for name, value in x.items() if name not in LEAVES}
        rollout["targets"], rollout["ref_hidden"] = (  # strides and an offset
            torch.stack([value + 1, value], -1)[..., 1] for value in (x["targets"], x["ref_hidden"])
        )
    for a, b in zip(everything(x | rollout, backend), everything(x, backend), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_fake_tensors_have_shapes_and_no_values():
    mode, want = FakeTensorMode(), everything(draw(), "chunked")
    x = {name: mode.from_tensor(value) for name, value in draw().items()}
    with mode:
        got = everything(x, "chunked")
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want]


@pytest.mark.parametrize(
    "operator", ["linear_logprob", "linear_kl", "linear_ppo_loss", "selective_logprob", "ppo_loss"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_right_or_refused(backend, operator):
    name = "logits" if operator in ("selective_logprob", "ppo_loss") else "hidden"
    x = draw()

    def penalty() -> torch.Tensor:
        x[name] = x[name].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(x, backend)[operator], x[name], create_graph=True)
        return gradient.square().sum()

    if backend == "reference":
        assert torch.autograd.grad(penalty(), x[name])[0].abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match=r"create_graph.*backend='reference'"):
            penalty()
