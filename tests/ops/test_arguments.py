"""Every argument of every public operator, given what it is not: an error of one line that names it."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastppo
from fastppo.ops.checks import ARGUMENTS

B, T, D, V = 2, 3, 4, 7
TOKENS = torch.zeros(B, T)
HIDDEN, WEIGHT, BIAS = torch.randn(B, T, D), torch.randn(V, D), torch.randn(V)
TARGETS = torch.zeros(B, T, dtype=torch.long)
MASK = torch.ones(B, T, dtype=torch.bool)
HEAD = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS}
REFERENCE = {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_bias": BIAS}
ROLLOUT = {"old_logprobs": TOKENS, "advantages": TOKENS, "mask": MASK, "ref_logprobs": TOKENS}
ROLLOUT["importance_weights"] = TOKENS


def scratch_budget(num_bytes: int) -> None:
    with fastppo.scratch_budget(num_bytes):
        pass


# Calls that work; between them they give every argument that is a tensor.
CALLS = [
    (fastppo.linear_logprob, HEAD | {"targets": TARGETS}),
    (fastppo.linear_kl, HEAD | REFERENCE | {"mask": MASK}),
    (fastppo.linear_ppo_loss, HEAD | REFERENCE | ROLLOUT | {"targets": TARGETS}),
    (fastppo.ppo_loss, ROLLOUT | {"logits": HIDDEN, "ref_logits": HIDDEN, "targets": TARGETS}),
    (fastppo.ppo_loss, ROLLOUT | {"logprobs": TOKENS, "entropy": TOKENS}),
    (fastppo.selective_logprob, {"logits": HIDDEN, "targets": TARGETS}),
    (
        fastppo.fisher_vector_product,
        HEAD | {"d_hidden": HIDDEN, "d_weight": WEIGHT, "d_bias": BIAS, "mask": MASK, "row_weights": TOKENS},
    ),
    (
        fastppo.gae,
        {"rewards": TOKENS, "values": TOKENS, "gamma": 1.0, "lam": 0.9, "mask": MASK, "dones": MASK}
        | {"bootstrap": torch.zeros(B)},
    ),
    (
        fastppo.gae,
        {"rewards": TOKENS.flatten(), "values": TOKENS.flatten(), "gamma": 1.0, "lam": 0.9}
        | {"cu_seqlens": torch.tensor([0, B * T])},
    ),
    (fastppo.value_loss, {"values": TOKENS, "returns": TOKENS, "old_values": TOKENS, "mask": MASK}),
    (fastppo.whiten, {"x": TOKENS, "mask": MASK}),
    (fastppo.FixedKLController, {"kl_coef": 0.1}),
    (fastppo.AdaptiveKLController, {"kl_coef": 0.1, "target": 6.0, "horizon": 100}),
    (fastppo.AdaptiveKLController(0.1, 6.0, 100).update, {"current_kl": 1.0, "num_sequences": 4}),
    (fastppo.LinearKLController, {"kl_coef": 0.1, "final": 0.0, "horizon": 100}),
    (fastppo.LinearKLController(0.1, 0.0, 100).update, {"current_kl": 1.0, "num_sequences": 4}),
    (fastppo.FixedKLController(0.1).update, {"current_kl": 1.0, "num_sequences": 4}),
    (scratch_budget, {"num_bytes": 1024}),
]
WALK = [
    pytest.param(operator, valid, name, id=f"{operator.__name__}-{'packed-' * ('cu_seqlens' in valid)}{name}")
    for operator, valid in CALLS
    for name in inspect.signature(operator).parameters
]

# What the arguments beside it are held against: of another shape, it is they that do not fit.
FIRST = ("hidden", "weight", "ref_weight", "logits", "logprobs", "rewards", "values", "x", "targets")

TWO_NUMBERS = torch.tensor([0.5, 0.25])
NO_NUMBER = ["0.5", b"0.5", [0.5], (0.5,), {}, object(), 1j, True, TWO_NUMBERS, TWO_NUMBERS.numpy(), torch.tensor(0.5)]
OUT_OF_RANGE = [float("nan"), float("-inf"), -(10**400)]


def no_tensor(valid: torch.Tensor) -> list:
    dense = valid.float()
    ints = valid.is_floating_point()
    return [
        0.5,
        "tensor",
        [[0.0]],
        np.zeros(tuple(valid.shape), dtype=np.float32),
        valid.tolist(),
        valid.to_sparse(),
        torch.nested.nested_tensor([valid, valid]),
        torch.nested.nested_tensor([valid, valid], layout=torch.jagged),
        torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8),
        valid.to("meta"),
        valid.to(torch.complex64),
        *([valid.to(torch.int64), valid.to(torch.bool), valid.to(torch.float8_e4m3fn)] if ints else []),
    ]


def bad_values(operator, valid: dict, name: str) -> list:
    """What `name` is not; of an argument that is None if not given, None is fine."""
    given, default = valid.get(name), inspect.signature(operator).parameters[name].default
    if isinstance(given, torch.Tensor):
        more = [None] if default is inspect.Parameter.empty else []
        if name in ("targets", "cu_seqlens"):
            more += [given.float(), given.bool(), given - 9]
        elif name in ("mask", "dones"):
            more += [torch.full(given.shape, 0.5), torch.full(given.shape, torch.nan), given.long() + 1]
        return [*no_tensor(given), *more]
    if name in ("logprobs", "entropy", "logits", "ref_logits", "cu_seqlens", "bootstrap", "mask", "dones", "targets"):
        return [0.5, [0.5]]  # the other form of the call has the rest
    if name == "group":
        return ["world", 0, object()]
    if name == "backend":
        return ["nonsense", "", "x" * 10**6, "triton", 3, ["chunked"], TWO_NUMBERS]
    if name in ("ratio_level", "loss_agg", "kl_estimator", "kind"):
        return ["nonsense", "", "x" * 10**6, 3, None, ["token"], TWO_NUMBERS, TWO_NUMBERS.numpy()]
    if name in ("return_entropy", "inplace_backward", "shift_mean", "whiten"):
        return ["yes", 1, 0.0, None, torch.tensor(True), TWO_NUMBERS]
    if name in ("ignore_index", "num_sequences", "num_bytes"):
        return [*NO_NUMBER, *OUT_OF_RANGE, None, 1.5, 2.0, 2**63, -(2**63) - 1, float("inf")]
    if name in ("temperature", "softcap", "horizon", "target"):
        extremes = [1e-300, 1e300] if name in ("temperature", "softcap") else []
        return [*NO_NUMBER, *OUT_OF_RANGE, *extremes, 0.0, -1.0, float("inf"), 10**400]
    if name in ("gamma", "lam"):
        return [*NO_NUMBER, *OUT_OF_RANGE, None, -0.1, 1.1]
    if name in ("clip_low", "clip_high", "dual_clip", "cliprange_value"):
        return [*NO_NUMBER, *OUT_OF_RANGE, -0.1]
    assert name in ("kl_coef", "entropy_coef", "logit_scale", "final", "current_kl"), f"{name}: not walked"
    return [*NO_NUMBER, *OUT_OF_RANGE, *[1e300] * (name == "logit_scale"), None, float("inf"), 10**400]


def names(operator, arguments: dict, name: str) -> bool:
    """Whether the call raises an error of one line that begins with the argument's name."""
    try:
        operator(**arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
        return bool(re.fullmatch(rf"(\w+, )*{name}(, \w+)*: .{{,250}}", message)) or pytest.fail(message)
    return pytest.fail(f"{name} = {arguments.get(name)!r} is taken")


def is_tensor(walked) -> bool:
    _, valid, name = walked.values
    return isinstance(valid.get(name), torch.Tensor)


@pytest.mark.filterwarnings("ignore")  # sparse and nested tensors warn of themselves
@pytest.mark.parametrize(("operator", "valid", "name"), WALK)
def test_an_argument_that_is_wrong_is_named(operator, valid, name):
    for value in bad_values(operator, valid, name):
        assert names(operator, valid | {name: value}, name)


@pytest.mark.parametrize(("operator", "valid", "name"), [w for w in WALK if is_tensor(w)])
def test_a_tensor_of_another_shape_is_named(operator, valid, name):
    given = valid[name]
    for value in (given.unsqueeze(0), torch.cat([given, given]), given[:1], given.flatten()[0]):
        if value.shape != given.shape:
            assert names(operator, valid | {name: value}, r"\w+" if name in FIRST else name)


@pytest.mark.parametrize(("operator", "valid"), CALLS, ids=[operator.__name__ for operator, _ in CALLS])
def test_what_is_right_is_taken(operator, valid):
    operator(**valid)
    named = {name: torch.nn.Parameter(x) if name in ("weight", "hidden", "logits") else x for name, x in valid.items()}
    operator(**named)


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "valid"), CALLS[:11], ids=[operator.__name__ for operator, _ in CALLS[:11]])
def test_the_checks_compile_without_graph_breaks(operator, valid):
    torch.compiler.reset()
    numbers = {name: 0.5 for name in ("temperature", "entropy_coef") if name in inspect.signature(operator).parameters}
    for factor in (1.0, 1.5) if numbers else (1.0,):  # the second makes the numbers dynamic
        arguments = valid | {name: value * factor for name, value in numbers.items()}
        eager, compiled = operator(**arguments), torch.compile(operator, fullgraph=True, backend="eager")(**arguments)
        torch.testing.assert_close(compiled, eager)


def test_numbers_may_be_numpys():
    usual = fastppo.linear_logprob(HIDDEN, WEIGHT, TARGETS, temperature=0.5, ignore_index=3).logprobs
    theirs = fastppo.linear_logprob(
        HIDDEN, WEIGHT, TARGETS, temperature=np.float32(0.5), ignore_index=np.int64(3)
    ).logprobs
    assert torch.equal(usual, theirs)


def test_every_argument_has_a_rule():
    for operator, _ in CALLS:
        for name in inspect.signature(operator).parameters:
            assert name in ARGUMENTS or name == "num_bytes", f"{operator.__name__}: {name}"


@pytest.mark.parametrize(("operator", "valid"), CALLS[:11], ids=[operator.__name__ for operator, _ in CALLS[:11]])
def test_a_tensor_on_another_device_is_named(operator, valid):
    tensors = [name for name, value in valid.items() if isinstance(value, torch.Tensor)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in tensors[1:]:
            elsewhere = torch.empty(valid[name].shape, dtype=valid[name].dtype, device="cuda")
            assert names(operator, valid | {name: elsewhere}, name)
