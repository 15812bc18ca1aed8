"""Input checks of the public operators, done once, when they are called.

`checked` holds each argument against the rule that ARGUMENTS has for its name: what type it has, which dtypes and
layout a tensor, which range a number; and all tensors against one device. What arguments must be to one another, such
as shapes, the operators check themselves, with the functions below.

Values (a target outside the vocabulary, a NaN advantage) are checked where that is free, on CPU tensors; on an
accelerator it would stall the stream, so it is done there only with FASTPPO_CHECK=1, and under torch.compile not at
all. A target outside the vocabulary then gives a log-prob of NaN.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastppo.engines.dispatch import NAMES
from fastppo.errors import quote

P, R = ParamSpec("P"), TypeVar("R")
Rule = Callable[[str, Any], Any]  # (an argument's name, its value) -> the value as the operator takes it

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
FLAGS = (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATING)

RATIO_LEVELS = ("token", "sequence", "sequence-geometric")
LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")


class NonFiniteValue(ValueError, FloatingPointError):
    """A NaN or Inf where a finite number is needed."""

    row: int | None = None
    """The sequence of the batch it is in, where that is known."""


# ---- rules for one argument -----------------------------------------------------------------------------------------


def tensor_of(dtypes: tuple[torch.dtype, ...], expected: str, *, sharded: bool = False) -> Rule:
    """A dense tensor of one of `dtypes`; with `sharded` it may be a DTensor."""

    def check(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {shown(value)}")
        if value.dtype not in dtypes:
            raise TypeError(f"{name}: expected {expected}, got {value.dtype}")
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else value.layout
            raise TypeError(f"{name}: expected a dense tensor, got a {kind} one; pad it or call .to_dense()")
        if value.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
        if not sharded and hasattr(value, "full_tensor"):
            raise TypeError(f"{name}: expected a plain tensor, got a DTensor; take .to_local() or .full_tensor()")
        return usable_by_autograd(value)

    return check


def usable_by_autograd(tensor: Tensor) -> Tensor:
    """A tensor from torch.inference_mode(), such as a rollout's targets, cannot be saved for a backward; another tensor
    in its memory can."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or hasattr(tensor, "full_tensor"):
        return tensor
    if not tensor.is_inference() or tensor.requires_grad:  # autograd has its own message for a parameter
        return tensor
    tensor = tensor.resolve_neg()
    where = (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*where)


def number(expected: str, holds: Callable[[float], bool]) -> Rule:
    """An int or float, or NumPy's, but no bool; handed on as a float."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
        try:
            result = float(value)
        except OverflowError:  # an int beyond the greatest float
            result = math.inf if value > 0 else -math.inf
        if not holds(result):
            error = ValueError if math.isfinite(result) else NonFiniteValue
            raise error(f"{name}: expected {expected}, got {shown(value)}")
        return result

    return check


def integer(expected: str, least: int) -> Rule:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
            raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
        if not least <= value < 2**63:
            raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
        return int(value)

    return check


def one_of(*choices: str) -> Rule:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            error = ValueError if isinstance(value, str) else TypeError
            raise error(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return value


def process_group(name: str, value: Any) -> Any:
    if torch.distributed.is_available():
        # What `new_group` gives a process that is not in the group is refused where the ranks are looked at.
        stranger = value is torch.distributed.GroupMember.NON_GROUP_MEMBER
        if stranger or isinstance(value, torch.distributed.ProcessGroup):
            return value
    raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup, got {shown(value)}")


floats = tensor_of(FLOATING, "float32, bfloat16, float16 or float64")
parameters = tensor_of(FLOATING, "float32, bfloat16, float16 or float64", sharded=True)
flags = tensor_of(FLAGS, "bool, or 0 and 1 of an integer or floating dtype")
finite = number("a finite number", lambda x: -math.inf < x < math.inf)
positive = number("a finite number above 0", lambda x: 0 < x < math.inf)
# Of the logits' transform: what is made of two of them must stay well within float32, or logits become NaN.
factor = number("a number from 1e-10 to 1e10", lambda x: 1e-10 <= x <= 1e10)
share = number("a number in [0, 1]", lambda x: 0 <= x <= 1)

# By the name of the argument, in every operator that has it. None goes with arguments annotated so.
ARGUMENTS: dict[str, Rule] = {
    **dict.fromkeys(("hidden", "ref_hidden", "d_hidden", "logits", "ref_logits"), floats),
    **dict.fromkeys(("weight", "bias", "ref_weight", "ref_bias", "d_weight", "d_bias"), parameters),
    **dict.fromkeys(("old_logprobs", "ref_logprobs", "logprobs", "entropy", "advantages", "row_weights"), floats),
    "importance_weights": floats,
    **dict.fromkeys(("rewards", "values", "old_values", "returns", "bootstrap", "x"), floats),
    **dict.fromkeys(("mask", "dones"), flags),
    "targets": tensor_of(INTEGERS, "int64 or int32 token ids"),
    "cu_seqlens": tensor_of(INTEGERS, "int32 or int64"),
    **dict.fromkeys(("temperature", "softcap"), factor),
    "logit_scale": number("a number from -1e10 to 1e10", lambda x: -1e10 <= x <= 1e10),
    **dict.fromkeys(("kl_coef", "entropy_coef", "final", "current_kl"), finite),
    **dict.fromkeys(("clip_low", "clip_high"), number("a number of at least 0", lambda x: x >= 0)),
    "dual_clip": number("a number above 1", lambda x: x > 1),
    "cliprange_value": number("a number above 0", lambda x: x > 0),
    **dict.fromkeys(("gamma", "lam"), share),
    **dict.fromkeys(("target", "horizon"), positive),
    "num_sequences": integer("a whole number of at least 0", 0),
    "ignore_index": integer("a whole number", -(2**63)),
    "ratio_level": one_of(*RATIO_LEVELS),
    "loss_agg": one_of(*LOSS_AGGS),
    "kl_estimator": one_of(*KL_ESTIMATORS),
    "kind": one_of("reverse", "forward"),
    **dict.fromkeys(("return_entropy", "inplace_backward", "shift_mean"), flag),
    "whiten": flag,
    "backend": one_of(*NAMES),
    "group": process_group,
}


def checked(operator: Callable[P, R]) -> Callable[P, R]:
    """Hold the arguments of `operator` against ARGUMENTS, and its tensors against one device, before it runs."""
    signature = inspect.signature(operator).parameters
    names = tuple(signature)
    optional = frozenset(name for name, parameter in signature.items() if "None" in str(parameter.annotation))

    def check(name: str, value: Any) -> Any:
        if name not in ARGUMENTS or (value is None and name in optional):
            return value
        return ARGUMENTS[name](name, value)

    @functools.wraps(operator)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Too many positional arguments are left for the operator's own message.
        positional = [check(name, value) for name, value in zip(names, args, strict=False)]
        named = {name: check(name, value) for name, value in kwargs.items()}
        device = None
        for name, value in (*zip(names, positional, strict=False), *named.items()):
            if isinstance(value, Tensor):
                device = device or value.device
                if value.device != device:
                    raise ValueError(f"{name}: expected on {device} like the other arguments, got {value.device}")
        return operator(*positional, *args[len(positional) :], **named)

    return call


def shown(value: Any) -> str:
    """A value in a message, at a bounded length; of what is neither text nor a number, the type."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if not isinstance(value, (str, bytes, int, float, complex, type(None))):
        return f"an object of type {type(value).__name__}"
    return quote(value)


# ---- rules for arguments beside one another -------------------------------------------------------------------------


def looks_at_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.is_meta or hasattr(tensor, "fake_mode"):  # a FakeTensor has none
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTPPO_CHECK") == "1"


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], like: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({like}), got {tuple(tensor.shape)}")


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """hidden [..., D], weight [V, D] and bias [V] that can be multiplied; `prefix` names the reference model's."""
    if hidden.dim() < 1:
        raise ValueError(f"{prefix}hidden: expected [..., D], got a scalar")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: expected [V, {hidden.shape[-1]}] to go with {prefix}hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{prefix}weight: expected a vocabulary and a hidden size above 0, got {tuple(weight.shape)}")
    # Autocast lets float32 and the 16-bit dtypes mix, but leaves float64 as it is.
    mixes = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype)
    if weight.dtype != hidden.dtype and not mixes:
        raise TypeError(
            f"{prefix}weight: expected {hidden.dtype} like {prefix}hidden, got {weight.dtype}; cast one of them, "
            "or use autocast"
        )
    if bias is not None:
        check_shape(f"{prefix}bias", bias, (weight.shape[0],), f"one for each row of {prefix}weight")


def first_true(bad: Tensor) -> tuple[int, ...] | None:
    """The index of the first True of a bool tensor; None if there is none."""
    return tuple(bad.nonzero()[0].tolist()) if bad.any() else None


def check_targets(
    targets: Tensor, shape: tuple[int, ...], vocab: int, ignore_index: int, *, name: str = "targets"
) -> None:
    check_shape(name, targets, shape, "one for each hidden state or row of logits")
    if looks_at_values(targets) and targets.numel():
        targets = targets.long()  # which every ignore_index can be compared with
        bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
        if (where := first_true(bad)) is not None:
            raise ValueError(
                f"{name}: expected ids in [0, {vocab}) or ignore_index={ignore_index}, "
                f"got {targets[where].item()} at {where}"
            )


def check_mask(mask: Tensor | None, like: Tensor, name: str = "mask", real: Tensor | None = None) -> Tensor:
    """A boolean mask of `like`'s shape and device; all True if none is given. 0/1 of any dtype are taken.

    Where `real` (bool, of the same shape) is False the mask is False, whatever it holds there.
    """
    if mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device) if real is None else real
    check_shape(name, mask, tuple(like.shape), "one for each token")
    if mask.dtype != torch.bool:
        given, mask = mask, mask != 0
        if looks_at_values(given):
            bad = mask & (given != 1)
            bad = bad if real is None else bad & real
            if (where := first_true(bad)) is not None:
                raise ValueError(f"{name}: expected 0 and 1, or a bool mask, got {given[where].item()} at {where}")
    return mask if real is None else mask & real


def check_per_token(name: str, tensor: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite per-token quantity in `dtype`, detached, 0 on padding, whatever stood there."""
    check_shape(name, tensor, tuple(mask.shape), "one for each token")
    values = torch.where(mask, tensor.detach().to(dtype), 0.0)
    if looks_at_values(values) and (where := first_true(~torch.isfinite(values))) is not None:
        raise NonFiniteValue(f"{name}: expected finite values of {dtype}, got {tensor[where].item()} at {where}")
    return values
