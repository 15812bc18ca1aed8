"""On an accelerator a loss makes the host wait for nothing: it looks at no value and copies nothing to the device.

The operators run on fake tensors, which hold no values, with the checks of values off as they are on an accelerator.
Looking at a value raises, and so does a tensor made of Python numbers: on an accelerator that is a copy from pageable
memory, which waits for all the work before it. What the engines do inside of their operators is not seen here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import fastppo
from fastppo.engines import triton_kernels
from fastppo.ops import checks, head, linear_ppo_loss, vocabulary_parallel

aten = torch.ops.aten
WAITS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten.repeat_interleave,
    aten.lift_fresh,  # torch.tensor and torch.as_tensor of Python numbers
    aten._unique2,
)
INDEXING = (aten.index, aten.index_put, aten.index_put_)
B, T, D, V = 3, 5, 16, 40


class HostWait(AssertionError):
    pass


class NoHostWait(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(operator, "overloadpacket", None) in WAITS:
            raise HostWait(str(operator))
        indices = args[1] if getattr(operator, "overloadpacket", None) in INDEXING else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise HostWait(f"{operator} with a mask")
        if operator is aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            raise HostWait(f"copy from {args[0].device} to {kwargs['device']}")
        return operator(*args, **kwargs)


@pytest.fixture
def scaled(monkeypatch):
    """Stands in for an accelerator; the gradients that were handed to the kernel that scales them."""
    for module in (checks, head, linear_ppo_loss, vocabulary_parallel):
        monkeypatch.setattr(module, "looks_at_values", lambda tensor: False)
    monkeypatch.setattr(triton_kernels, "why_unusable", lambda device, dtype: None)
    seen = []
    kernel = SimpleNamespace(scale_=lambda gradient, d_loss: seen.append(gradient) or gradient)
    monkeypatch.setattr(triton_kernels, "scale", kernel, raising=False)
    return seen


@pytest.fixture
def world():
    """A group of two ranks that is simulated in this process."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


def draw(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def model(dtype, *, bias=True, dim=D):
    hidden, weight = draw(B, T, dim, dtype=dtype).requires_grad_(), torch.nn.Parameter(draw(V, dim, dtype=dtype))
    return hidden, weight, torch.nn.Parameter(draw(V, dtype=dtype)) if bias else None


def tokens():
    return torch.empty(B, T, dtype=torch.int64), torch.empty(B, T, dtype=torch.bool)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x.sum()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.long().repeat_interleave(x.long()),
        lambda x: torch.tensor(60.0, device=x.device),
        lambda x: x.unique(),
        lambda x: x.to("meta"),  # any other device
    ],
)
def test_a_wait_is_found(wait):
    with FakeTensorMode(), NoHostWait(), pytest.raises(HostWait):
        wait(draw(4))


LOSSES = [
    {},
    {"dual_clip": 2.0, "entropy_coef": 0.01, "loss_agg": "seq-mean-token-mean"},
    {"ratio_level": "sequence", "loss_agg": "seq-mean-token-sum", "entropy_coef": 0.01},
    {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-sum-norm"},
    {"kl_coef": 0.1, "kl_estimator": "k1"},
    {"kl_coef": 0.1, "kl_estimator": "k2"},
    {"kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.01},
    {"kl_coef": 0.1, "kl_estimator": "exact", "entropy_coef": 0.01},
    {"temperature": 0.7, "softcap": 30.0, "logit_scale": 0.5},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "chunked"])  # the gradient in the engine's operator, and outside of it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_ppo_loss(options, backend, dtype, masked, scaled):
    with FakeTensorMode(), NoHostWait():
        (hidden, weight, bias), (targets, mask) = model(dtype, bias=masked), tokens()
        given = dict(options)
        if options.get("kl_estimator") == "exact":
            ref_hidden, ref_weight, ref_bias = model(dtype, bias=masked, dim=8)
            given |= {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        elif "kl_coef" in options:
            given |= {"ref_logprobs": draw(B, T), "importance_weights": draw(B, T)}
        out = fastppo.linear_ppo_loss(
            hidden, weight, targets, draw(B, T), draw(B, T), mask=mask if masked else None, bias=bias, backend=backend,
            **given,
        )  # fmt: skip
        (out.loss / 3).backward()
        assert len(out.metrics) >= 7
    gradients = [hidden.grad, weight.grad, *([bias.grad] if masked else [])]
    assert all(g is not None for g in gradients)
    assert len(scaled) == (len(gradients) if backend == "triton" else 0)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_linear_logprob(backend, ignore_index, scaled):
    with FakeTensorMode(), NoHostWait():
        (hidden, weight, bias), (targets, _) = model(torch.bfloat16), tokens()
        out = fastppo.linear_logprob(
            hidden, weight, targets, bias=bias, ignore_index=ignore_index, return_entropy=True, softcap=30.0,
            backend=backend,
        )  # fmt: skip
        (out.logprobs + out.entropy + out.logsumexp).sum().backward()


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_linear_kl(backend, kind, scaled):
    with FakeTensorMode(), NoHostWait():
        (hidden, weight, bias), (_, mask) = model(torch.bfloat16), tokens()
        ref_hidden, ref_weight, _ = model(torch.bfloat16, dim=8)
        kl = fastppo.linear_kl(hidden, weight, ref_hidden, ref_weight, kind=kind, mask=mask, bias=bias, backend=backend)
        kl.sum().backward()


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_ppo_loss_from_logits(options, inplace, scaled):
    with FakeTensorMode(), NoHostWait():
        logits, (targets, mask) = draw(B, T, V).requires_grad_() * 1.0, tokens()
        given = dict(options)
        if options.get("kl_estimator") == "exact":
            given["ref_logits"] = draw(B, T, V)
        elif "kl_coef" in options:
            given["ref_logprobs"] = draw(B, T)
        out = fastppo.ppo_loss(
            draw(B, T), draw(B, T), logits=logits, targets=targets, mask=mask, inplace_backward=inplace,
            backend="triton", **given,
        )  # fmt: skip
        out.loss.backward()


def test_losses_from_what_is_there(scaled):
    with FakeTensorMode(), NoHostWait():
        logprobs, entropy, values = (draw(B, T).requires_grad_() for _ in range(3))
        _, mask = tokens()
        out = fastppo.ppo_loss(
            draw(B, T), draw(B, T), logprobs=logprobs, entropy=entropy, mask=mask, entropy_coef=0.1, kl_coef=0.1,
            ref_logprobs=draw(B, T), importance_weights=draw(B, T), kl_estimator="k3",
        )  # fmt: skip
        critic = fastppo.value_loss(values, draw(B, T), old_values=draw(B, T), mask=mask)
        (out.loss + critic.loss).backward()
        fastppo.whiten(draw(B, T), mask=mask)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("whole_head", [False, True])
def test_fisher_vector_product(backend, whole_head, scaled):
    with FakeTensorMode(), NoHostWait():
        (hidden, weight, bias), (_, mask) = model(torch.float32), tokens()
        directions = {"d_weight": draw(V, D), "d_bias": draw(V)} if whole_head else {}
        fastppo.fisher_vector_product(
            hidden, weight, draw(B, T, D), bias=bias, mask=mask, row_weights=draw(B, T), backend=backend, **directions
        )


@pytest.mark.parametrize("exact", [False, True])
def test_a_vocabulary_over_ranks(exact, world, scaled):
    with FakeTensorMode(), NoHostWait():
        (hidden, weight, bias), (targets, mask) = model(torch.bfloat16), tokens()
        ref_hidden, ref_weight, _ = model(torch.bfloat16)
        given = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "kl_coef": 0.1, "kl_estimator": "exact"}
        out = fastppo.linear_ppo_loss(
            hidden, weight, targets, draw(B, T), draw(B, T), mask=mask, bias=bias, entropy_coef=0.1, group=world,
            backend="triton", **(given if exact else {}),
        )  # fmt: skip
        out.loss.backward()
