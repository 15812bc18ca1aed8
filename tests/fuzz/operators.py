"""Random calls of the public operators, valid and invalid, on every backend that can be used here.

A valid call must give what float64 gives: to twice the bound of expected.py comes twice the error of the naive path,
`backend="reference"`. An invalid call must raise ValueError or TypeError in a line that names the argument.
"""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import torch
from torch import Tensor

import fastppo
from fastppo.engines.dispatch import BACKENDS
from tests.fuzz.calls import CALLS, INF, NAN, Call, Draw
from tests.fuzz.expected import EXPECTED, upstream

warnings.simplefilter("ignore")


class Wrong(Exception):
    """What a case found."""


def run(case: int) -> str | None:
    draw = Draw(case)
    call = draw.pick(CALLS)(draw)
    try:
        if draw.chance(0.4):
            check_invalid(draw, call)
        else:
            check_valid(draw, call)
    except Wrong as wrong:
        return f"{call.op}: {wrong}"
    return None


def check_valid(draw: Draw, call: Call) -> None:
    expected, bounds, limits = EXPECTED[call.op](call, draw)
    naive: dict[str, float] = {}
    budget, threads = draw.pick([1, 2**10, 2**14, 2**25]), draw.pick([1, 1, 3])
    compiled = draw.chance(0.02)
    for backend in call.backends(draw):
        torch.set_num_threads(threads)
        try:
            with fastppo.scratch_budget(budget):
                got = outcome(call, backend, compiled)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise Wrong(f"{backend}: a valid call raises {type(error).__name__}: {text}; {describe(call)}") from error
        for name, value in got.items():
            problem = limits(name, value, backend)
            if problem is None and name in expected:
                want = expected[name]
                if value.shape != want.shape:
                    problem = f"shape {tuple(value.shape)}, expected {tuple(want.shape)}"
                elif bounds is not None and want.numel():
                    error = (value.double() - want).abs()
                    allowed = 2 * bounds[name] + 2 * naive.get(name, 0.0)
                    bad = ~(error <= allowed)
                    if call.dtype == torch.float16:
                        bad &= ~(want.abs() + allowed > 6e4)  # which float16 cannot hold
                        if backend == "reference" and name.startswith("∂"):
                            bad &= value.isfinite()  # nor the naive path's gradients of logits, on the way to these
                    if bad.any():
                        at = tuple(bad.nonzero()[0].tolist())
                        allowed = torch.as_tensor(allowed).expand_as(error)
                        problem = (
                            f"{value[at].item():.9g} at {at}, float64 gives {want[at].item():.9g}, "
                            f"allowed {allowed[at].item():.2g}, {int(bad.sum())} of {bad.numel()} off"
                        )
                    if backend == "reference":
                        naive[name] = error.nan_to_num(0.0, posinf=0.0).max().item()
            if problem:
                raise Wrong(f"{backend}{' compiled' * compiled}: {name}: {problem}; {describe(call)}")


def outcome(call: Call, backend: str | None, compiled: bool) -> dict[str, Tensor]:
    """Every number that a call gives: its outputs, and the gradients of its tensors."""
    args = {name: x.detach().requires_grad_() if name in call.leaves() else x for name, x in call.args.items()}
    inputs = dict(args)
    if args.get("inplace_backward"):
        inputs["logits"] = torch.empty_like(args["logits"]).copy_(args["logits"])  # a leaf may not be written over
    if backend is not None or call.op in BACKENDS:
        inputs["backend"] = backend
    operator = getattr(fastppo, call.op)
    if compiled:
        torch.compiler.reset()
        operator = torch.compile(operator, backend="aot_eager")
    result = operator(**inputs)
    out = {"kl": result} if isinstance(result, Tensor) else dict(result._asdict())
    metrics = {f"metrics[{name}]": x for name, x in out.pop("metrics", {}).items()}
    out = {name: x for name, x in (out | metrics).items() if x is not None}
    leaves = [x for x in args.values() if isinstance(x, Tensor) and x.requires_grad]
    if leaves and call.op not in ("gae", "whiten"):
        scalar = out["loss"] * 3.0 if "loss" in out else sum((upstream(x, n) * x).sum() for n, x in out.items())
        # An entropy that is not in the loss has no gradient; everything else gets one, zeros where nothing counts.
        if scalar.requires_grad or "logprobs" in call.leaves() or "entropy" not in call.leaves():
            scalar.backward()
        for name in call.leaves():
            if name == "entropy" and args[name].grad is None:
                args[name].grad = torch.zeros_like(args[name])
            out[f"∂{name}"] = args[name].grad
    return {name: x.detach() for name, x in out.items()}


def describe(call: Call) -> str:
    def word(x: Any) -> str:
        return f"{str(x.dtype)[6:]}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)

    return ", ".join(f"{name}={word(x)}" for name, x in call.args.items())


# Invalid calls

NOT_NUMBERS = ["0.5", NAN, [0.5], {}, 1j, object(), b"1", torch.tensor([0.5, 0.5])]
WRONG_VALUES: dict[str, list] = {
    "temperature": [0, -1, INF, None, 10**400, *NOT_NUMBERS],
    "logit_scale": [INF, None, 10**400, *NOT_NUMBERS],
    "softcap": [0, -1, INF, 10**400, *NOT_NUMBERS],
    "clip_low": [-0.1, None, *NOT_NUMBERS],
    "clip_high": [-0.1, None, *NOT_NUMBERS],
    "dual_clip": [1.0, 0.5, 0, -2, *NOT_NUMBERS],
    "kl_coef": [INF, None, 10**400, *NOT_NUMBERS],
    "entropy_coef": [-INF, None, 10**400, *NOT_NUMBERS],
    "gamma": [-0.1, 1.1, INF, None, *NOT_NUMBERS],
    "lam": [-0.1, 1.1, INF, None, *NOT_NUMBERS],
    "cliprange_value": [0, -1, *NOT_NUMBERS],
    "ignore_index": [1.5, "x", None, [1], 10**30, *NOT_NUMBERS],
    "backend": ["cuda", "", 7, b"cpu", ["cpu"], {}, object()],
    **{name: ["nope", "", None, 3, ["k1"], b"k1", {}] for name in ("ratio_level", "loss_agg", "kl_estimator", "kind")},
}  # fmt: skip
FINITE = (
    "old_logprobs",
    "advantages",
    "ref_logprobs",
    "importance_weights",
    "returns",
    "old_values",
    "rewards",
    "row_weights",
    "x",
)


def check_invalid(draw: Draw, call: Call) -> None:
    args, operator = dict(call.args), getattr(fastppo, call.op)
    if call.op in BACKENDS:
        args["backend"] = draw.pick([name for name in (*call.backends(draw), None) if name != "triton"])
    broken = break_option(draw, operator, args) if draw.chance(0.4) else break_tensor(draw, call, args)
    if broken is None:
        return
    names, what = broken
    what = f"{names[0]}={what:.60}, backend={args.get('backend')!r:.12}"
    try:
        operator(**args)
    except (TypeError, ValueError) as error:
        kind, text = type(error).__name__, str(error)
        if not any(re.search(rf"\b{name}\b", text) for name in names):
            raise Wrong(f"{what}: the error does not name it: {kind}: {' '.join(text.split())[:200]}") from None
        if len(text) > 400 or "\n" in text:
            raise Wrong(f"{what}: an error of {len(text)} characters: {kind}: {text[:100]!r}") from None
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Wrong(f"{what}: {type(error).__name__} instead of ValueError or TypeError: {text}") from None
    else:
        raise Wrong(f"{what}: accepted; {describe(call)}")


def break_option(draw: Draw, operator: Any, args: dict[str, Any]) -> tuple[list[str], str]:
    if draw.chance(0.05):
        args["no_such_option"] = 1
        return ["no_such_option"], "1"
    parameters = inspect.signature(operator).parameters
    name = draw.pick([name for name in WRONG_VALUES if name in parameters] or ["no_such_option"])
    args[name] = draw.pick(WRONG_VALUES.get(name, [1]))
    return [name], repr(args[name])


def break_tensor(draw: Draw, call: Call, args: dict[str, Any]) -> tuple[list[str], str] | None:
    """Make one tensor invalid. Returns the names of which the error must have one, and what was done."""
    tensors = [name for name, x in args.items() if isinstance(x, Tensor)]
    name = draw.pick(tensors)
    x, kind = args[name].detach(), draw.pick(["object", "dtype", "shape", "layout", "value", "missing"])
    if kind == "object":
        args[name] = draw.pick(["text", 3.5, [1.0, 2.0], x.tolist(), x.double().numpy(), object(), (), {}])
        return [name], f"a {type(args[name]).__name__}"
    if kind == "dtype" and name not in ("mask", "dones"):  # which may have any
        other = torch.int64 if x.is_floating_point() else torch.float32
        args[name] = x.nan_to_num(0, 0, 0).to(draw.pick([torch.bool, torch.complex64, other]))
        return [name], str(args[name].dtype)
    if kind == "layout":
        made = {
            "meta": lambda: torch.empty_like(x, device="meta"),
            "sparse": lambda: x.to_sparse(),
            "mkldnn": lambda: x.float().to_mkldnn(),
            "nested": lambda: torch.nested.nested_tensor(list(x) if x.dim() > 1 and len(x) else [x]),
        }
        layout = draw.pick(made)
        args[name] = made[layout]()
        return [name], layout
    if kind == "shape" and name not in ("x", "cu_seqlens") and (call.op, name) != ("whiten", "mask"):
        shapes = [x.unsqueeze(0), x.unsqueeze(-1)]
        if x.numel():
            shapes.append(x.flatten()[0])
            if name != "logits" or "ref_logits" in args:  # a wider vocabulary is as good
                shapes.append(torch.cat([x, x[..., :1]], -1))
        args[name] = draw.pick(shapes)
        # Which of two that don't go together is the wrong one, the operator cannot know.
        return ([name, *tensors], str(list(args[name].shape))) if args[name].shape != x.shape else None
    if kind == "value" and x.numel():
        real = call.mask.nonzero().tolist()
        if name == "targets":
            wrong = draw.pick([call.vocab + 5, -1, -101, 2**30])
        elif name in FINITE or (call.op, name) == ("gae", "values"):
            wrong = draw.pick([NAN, INF, -INF])
        else:
            return None
        if not real or wrong == args.get("ignore_index"):
            return None
        args[name] = x.clone()
        args[name][tuple(draw.pick(real))] = wrong
        return [name], f"{wrong} somewhere"
    if (
        kind == "missing"
        and inspect.signature(getattr(fastppo, call.op)).parameters[name].default is inspect.Parameter.empty
    ):
        args[name] = None
        return [name], "None"
    return None
