"""Every operator at real sizes against float64: PASS if it is as accurate as plain PyTorch in the same dtype.

An output or gradient passes if its error is at most 1.2 times that of the naive path (the backend `reference` in the
same dtype, on the same inputs) and a small slack more, in two measures: the norm of the error over that of the exact
result, and the greatest error over the greatest magnitude, which sees a single wrong tile. The slack is an eighth of
the dtype's epsilon for the first and half of it for the second, and what sums in float32 lose. Where the naive path is
off by more than 2% (far-off targets, whose logits bfloat16 rounds by whole halves), it counts as if by 2%: an error as
large would hide a wrong kernel. But no more is asked than the result's dtype can hold: where the exact result rounded
to it is off by more (gradients of a mean in float16, whose smallest number is 6e-8), that counts. A loss is compared
with the sum of its terms' magnitudes, since it may be near 0 itself.

A quarter of the rows are masked and hold NaN. Cases that later stages time are marked `bars`: where one fails, its
operator is left out there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

import fastppo
from gpu_stages import exact, inputs
from gpu_stages.bench import Bench, WarmUp, short

Tensors = dict[str, torch.Tensor]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FACTOR = 1.2
NAIVE_AT_MOST = 0.02
FLOAT32_SUMS = (1e-5, 4e-5)  # slack of float32 sums, in each of the two measures
GAE = {"gamma": 0.99, "lam": 0.95}


class Case(NamedTuple):
    """One operator with options at one size; `tokens` are [sequences, length]."""

    operator: str
    dim: int
    vocab: int
    options: dict
    dtype: torch.dtype = BF16
    bars: bool = False
    budget: float | None = None  # MiB; None is the default
    far: bool = False  # targets with log-probabilities of −100 and below
    autocast: bool = False  # float32 inputs, computed in bfloat16
    tokens: tuple[int, int] = (9, 149)

    @property
    def label(self) -> str:
        words = [self.operator, *(f"{k}={v}" for k, v in self.options.items())]
        if self.budget is not None:
            words.append(f"in {self.budget:g} MiB")
        words += ["far-off targets"] * self.far + ["autocast"] * self.autocast
        return " ".join(words)


CAPPED = {"temperature": 0.7, "logit_scale": 0.5, "softcap": 20.0}
ENTROPY, EXACT = {"entropy_coef": 0.02}, {"kl_coef": 0.2, "kl_estimator": "exact"}

CASES = [
    Case("linear_logprob", 4096, 128_256, {}, bars=True),
    Case("linear_ppo_loss", 4096, 128_256, ENTROPY, bars=True),
    Case("linear_ppo_loss", 4096, 128_256, {}, bars=True),
    Case("linear_ppo_loss", 4096, 128_256, ENTROPY, bars=True, budget=256),
    Case("linear_ppo_loss", 576, 49_152, ENTROPY, bars=True),
    Case("linear_ppo_loss", 3584, 50_257, ENTROPY, bars=True),
    Case("selective_logprob", 0, 128_256, {}, bars=True),
    Case("ppo_loss", 0, 128_256, ENTROPY | {"inplace_backward": True}, bars=True),
    Case("gae", 0, 0, {}, FP32, bars=True),
    Case("gae", 0, 0, {"whiten": True}, BF16, bars=True),
    Case("linear_ppo_loss", 4096, 128_256, ENTROPY, budget=64),
    Case("linear_ppo_loss", 4096, 50_257, ENTROPY, budget=4),
    Case("linear_ppo_loss", 896, 50_257, {}, budget=64),
    Case("linear_ppo_loss", 576, 50_257, {}, far=True),
    Case("linear_ppo_loss", 576, 50_257, ENTROPY, far=True),
    Case("linear_ppo_loss", 4096, 50_257, EXACT | ENTROPY),
    Case("linear_ppo_loss", 896, 50_257, {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean"}),
    Case("linear_ppo_loss", 896, 49_152, {"ratio_level": "sequence", "clip_high": 3.0} | ENTROPY, budget=64),
    Case("linear_ppo_loss", 896, 50_257, {"dual_clip": 1.5, "loss_agg": "seq-mean-token-sum"} | ENTROPY),
    Case("linear_ppo_loss", 576, 49_152, {"kl_coef": 0.2, "kl_estimator": "k3", "bias": True} | CAPPED | ENTROPY),
    Case("linear_ppo_loss", 904, 50_257, ENTROPY),
    Case("linear_ppo_loss", 577, 50_257, {}),
    Case("linear_ppo_loss", 896, 49_152, ENTROPY, autocast=True),
    Case("linear_ppo_loss", 896, 50_257, ENTROPY, FP16),
    Case("linear_ppo_loss", 576, 49_152, ENTROPY, FP32),
    Case("linear_logprob", 3584, 50_257, {"bias": True} | CAPPED),
    Case("linear_logprob", 576, 49_152, {}, far=True),
    Case("linear_logprob", 904, 50_257, {}),
    Case("linear_logprob", 577, 50_257, {"temperature": 0.7}),
    Case("linear_logprob", 896, 50_257, {}, autocast=True),
    Case("linear_logprob", 896, 50_257, {}, FP16),
    Case("linear_logprob", 576, 50_257, {}, FP32),
    Case("linear_kl", 4096, 50_257, {"kind": "reverse"}, bars=True),
    Case("linear_kl", 896, 128_256, {"kind": "forward"}),
    Case("linear_kl", 904, 50_257, {"kind": "reverse"} | CAPPED),
    Case("linear_kl", 576, 49_152, {"kind": "forward"}, FP32),
    Case("linear_kl", 896, 50_257, {"kind": "reverse"}, FP16),
    Case("fisher_vector_product", 4096, 50_257, {}, bars=True),
    Case("fisher_vector_product", 896, 49_152, {"weight_moves": False}),
    Case("fisher_vector_product", 904, 50_257, CAPPED),
    Case("fisher_vector_product", 896, 50_257, {}, FP16),
    Case("fisher_vector_product", 576, 49_152, {}, FP32),
    Case("selective_logprob", 0, 50_257, {"inplace_backward": True} | CAPPED),
    Case("selective_logprob", 0, 50_257, {}, FP16),
    Case("selective_logprob", 0, 49_152, {}, FP32),
    Case("ppo_loss", 0, 50_257, EXACT | ENTROPY),
    Case("ppo_loss", 0, 50_257, ENTROPY, FP16),
    Case("ppo_loss", 0, 49_152, {}, FP32),
    Case("gae", 0, 0, {"packed": True}, FP32),
    Case("gae", 0, 0, {"packed": True, "whiten": True}, FP32),
]  # fmt: skip
TINY_DIMS = {4096: 48, 3584: 48, 896: 32, 576: 16, 904: 24, 577: 17, 0: 0}


def run(bench: Bench) -> None:
    cases: dict[tuple[str, str], Case] = {}
    for case in (shrink(case, bench) if bench.tiny else case for case in CASES):
        cases.setdefault((case.label, where(case)), case)  # several sizes have the same tiny one
    for (label, size), case in cases.items():
        about = {"operator": case.operator, "dtype": short(case.dtype), "bars": case.bars}
        bench.attempt(size, label, lambda case=case: check(case, bench), **about)


def where(case: Case) -> str:
    sizes = [f"D {case.dim}"] * bool(case.dim) + [f"V {case.vocab}"] * bool(case.vocab)
    return ", ".join([*sizes, short(case.dtype)])


def shrink(case: Case, bench: Bench) -> Case:
    """The same case at a size for the interpreter, which cannot multiply bfloat16."""
    return case._replace(
        dim=TINY_DIMS[case.dim],
        vocab=101 if case.vocab else 0,
        tokens=(3, 13),
        dtype=FP32 if case.dtype == BF16 and not bench.on_gpu else case.dtype,
        autocast=case.autocast and bench.on_gpu,
        budget=None if case.budget is None else case.budget / 2**12,
    )


def check(case: Case, bench: Bench) -> dict:
    """The fields of the case's row: errors of every output and gradient, the naive path's beside them, the verdict."""
    x, mask = make_inputs(case, bench.device)
    got = outputs(case, x, mask, bench.backend)
    if isinstance(bench, WarmUp):
        return {}
    naive = outputs(case, x, mask, "reference")
    want = exact_outputs(case, x, mask)
    scale = want.pop("scale", None)
    epsilon = torch.finfo(BF16 if case.autocast else case.dtype).eps
    slack = (epsilon / 8 + FLOAT32_SUMS[0], epsilon / 2 + FLOAT32_SUMS[1])
    errors, worst, where = {}, 0.0, ""
    for name, exactly in want.items():
        found = (got[name], naive[name], exactly.to(got[name].dtype))
        mine, plain, rounded = (measures(x, exactly, scale if name == "loss" else None) for x in found)
        errors[name] = {"error": mine, "naive": plain}
        for error, *bounds in zip(mine, plain, rounded, slack, strict=True):
            share = error / allowed(*bounds)
            share = share if math.isfinite(share) else math.inf  # a NaN passes no comparison, and must not hide
            if share > worst:
                worst, where = share, name
    return {
        "status": "PASS" if worst <= 1.0 else "FAIL",
        "worst": worst,
        "worst_of": where,
        "checks": len(errors),
        "errors": errors,
    }


def allowed(naive: float, rounded: float, slack: float) -> float:
    """The greatest error that passes, given those of the naive path and of the exact result rounded to its dtype."""
    return FACTOR * max(min(naive, NAIVE_AT_MOST), rounded) + slack


def measures(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor | None) -> tuple[float, float]:
    """(norm of the error / norm, greatest error / greatest magnitude)."""
    difference = got.double() - want
    if scale is not None:
        share = (difference.abs() / scale).item()
        return share, share
    tiny = 1e-30
    return (
        (difference.norm() / want.norm().clamp(min=tiny)).item(),
        (difference.abs().max() / want.abs().max().clamp(min=tiny)).item(),
    )


# ---- inputs ---------------------------------------------------------------------------------------------------------


def make_inputs(case: Case, device: torch.device) -> tuple[Tensors, torch.Tensor]:
    """(tensors, mask), per-token ones [B, T, …]; masked rows hold NaN."""
    generator = torch.Generator(device).manual_seed(len(case.label) + case.dim + case.vocab)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if case.operator == "gae":
        batch, time = (5, 40) if case.tokens[0] == 3 else (64, 1501)
        mask = torch.rand(batch, time, generator=generator, device=device) < 0.9
        x = {name: normal(batch, time).to(case.dtype).masked_fill(~mask, torch.nan) for name in ("rewards", "values")}
        x["dones"] = torch.rand(batch, time, generator=generator, device=device) < 0.01
        return x | {"bootstrap": normal(batch).to(case.dtype)}, mask
    shape = case.tokens
    n, dim, vocab = shape[0] * shape[1], case.dim or 64, case.vocab
    mask = torch.rand(shape, generator=generator, device=device) < 0.75
    mask[0, :2] = True
    x = inputs.head(n, dim, vocab, case.dtype, device, seed=dim + vocab)
    x = {name: t.detach() for name, t in x.items()}
    hidden, weight = x.pop("hidden"), x.pop("weight")
    if case.far:
        far = torch.arange(n, device=device) % 3 == 0
        hidden[far] *= 16
        z = hidden[far].float() @ weight.float().t()
        x["targets"][far] = z.argmin(-1)
        x["old"][far] = z.amin(-1) - z.logsumexp(-1)
    x["ref"] = x["old"] + 0.2 * normal(n)
    # A fifth of the tokens lie clearly beyond the clip range, on either side: their gradient may be 0.
    number = torch.arange(n, device=device)
    x["old"] = x["old"] + torch.where(number % 5 == 0, 0.5 - (number // 5 % 2), 0.0)
    if case.operator in ("selective_logprob", "ppo_loss"):
        x["logits"] = hidden @ weight.t()
        x["ref_logits"] = x["logits"] + 0.3 * normal(n, vocab).to(case.dtype)
    else:
        x |= {"hidden": hidden, "ref_hidden": hidden + 0.3 * normal(n, dim).to(case.dtype)}
    x = {name: t.view(*shape, *t.shape[1:]) for name, t in x.items()}
    for name in ("hidden", "ref_hidden", "logits", "ref_logits"):
        if name in x:
            x[name] = x[name].masked_fill(~mask.unsqueeze(-1), torch.nan)
    if "hidden" in x:
        x |= {"weight": weight, "ref_weight": weight}
    if case.options.get("bias"):
        x["bias"] = normal(vocab).to(case.dtype)
    if case.operator == "fisher_vector_product":
        x["d_hidden"] = normal(*shape, dim).to(case.dtype)
        if case.options.get("weight_moves", True):
            x["d_weight"] = (normal(vocab, dim) / dim**0.5).to(case.dtype)
    return x, mask


# ---- what fastppo computes ------------------------------------------------------------------------------------------

SHARES = (-1.0, 1.0)  # upstream gradients of per-token outputs, evenly spaced along the tokens


def weighted(found: Tensors) -> torch.Tensor:
    """A scalar of per-token outputs in which every token counts differently."""
    total = 0.0
    for value in found.values():
        shares = torch.linspace(*SHARES, value.numel(), dtype=value.dtype, device=value.device)
        total = total + (shares * value.flatten()).mean()
    return total


def outputs(case: Case, x: Tensors, mask: torch.Tensor, backend: str) -> Tensors:
    """Outputs and gradients by name."""
    call = OPERATORS[case.operator]
    names = [name for name in ("hidden", "weight", "bias", "logits") if name in x]
    leaves = {name: x[name].clone().requires_grad_() for name in names}
    x = x | leaves | {"logits": leaves["logits"] * 1.0} if "logits" in leaves else x | leaves  # in place: not a leaf
    options = {k: v for k, v in case.options.items() if k not in ("bias", "weight_moves", "packed")}
    if "bias" in leaves:
        options["bias"] = leaves["bias"]
    budget = nullcontext() if case.budget is None else fastppo.scratch_budget(int(case.budget * 2**20))
    autocast = torch.autocast("cuda", BF16) if case.autocast else nullcontext()
    with budget, autocast:
        found, total = call(case, x, mask, options | {"backend": backend})
    if total is not None:
        (total / 3).backward()  # an upstream gradient that no half-precision number is equal to
        found |= {f"∂{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def linear_logprob(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    targets = x["targets"].masked_fill(~mask, -100)
    found = fastppo.linear_logprob(x["hidden"], x["weight"], targets, return_entropy=True, **options)._asdict()
    return found, weighted(found)


def linear_kl(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    kl = fastppo.linear_kl(x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"], mask=mask, **options)
    return {"kl": kl}, weighted({"kl": kl})


def linear_ppo_loss(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    if options.get("kl_estimator") == "exact":
        options |= {name: x[name] for name in ("ref_hidden", "ref_weight")}
    elif "kl_coef" in options:
        options["ref_logprobs"] = x["ref"]
    arguments = (x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"])
    out = fastppo.linear_ppo_loss(*arguments, mask=mask, **options)
    return {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy}, out.loss


def selective_logprob(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    targets = x["targets"].masked_fill(~mask, -100)
    found = fastppo.selective_logprob(x["logits"], targets, return_entropy=True, **options)._asdict()
    return found, weighted(found)


def ppo_loss(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    if options.get("kl_estimator") == "exact":
        options["ref_logits"] = x["ref_logits"]
    given = {"logits": x["logits"], "targets": x["targets"], "mask": mask}
    out = fastppo.ppo_loss(x["old"], x["advantages"], **given, **options)
    return {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy}, out.loss


def fisher_vector_product(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    arguments = (x["hidden"], x["weight"], x["d_hidden"], x.get("d_weight"))
    with torch.no_grad():
        out = fastppo.fisher_vector_product(*arguments, mask=mask, **options)
    return {"F hidden": out.hidden} | ({} if out.weight is None else {"F weight": out.weight}), None


def gae(case: Case, x: Tensors, mask: torch.Tensor, options: dict):
    given = x | {"mask": mask}
    if case.options.get("packed"):
        given = {name: t if name == "bootstrap" else t.flatten() for name, t in given.items()}
        given["cu_seqlens"] = torch.arange(mask.shape[0] + 1, device=mask.device) * mask.shape[1]
    out = fastppo.gae(given.pop("rewards"), given.pop("values"), **given, **GAE, **options)
    return {name: value.view(mask.shape) for name, value in out._asdict().items()}, None


OPERATORS: dict[str, Callable] = {
    f.__name__: f
    for f in (linear_logprob, linear_kl, linear_ppo_loss, selective_logprob, ppo_loss, fisher_vector_product, gae)
}


# ---- the same, exactly ----------------------------------------------------------------------------------------------


def exact_outputs(case: Case, x: Tensors, mask: torch.Tensor) -> Tensors:
    """By the names of `outputs`; for a loss also `scale`, see `exact.ppo`."""
    if case.operator == "gae":
        return exact.gae(x | {"mask": mask}, **GAE, whiten=case.options.get("whiten", False))
    transform = {k: case.options[k] for k in CAPPED if k in case.options}
    flat = {
        name: t if name in ("weight", "ref_weight", "d_weight", "bias") else t.flatten(0, 1) for name, t in x.items()
    }
    big = [name for name in flat if name.endswith(("hidden", "weight")) or name == "bias"]
    flat |= {name: flat[name].double() for name in big}
    rows = mask.flatten()
    if case.operator == "fisher_vector_product":
        return shaped(exact.fisher(flat, rows, transform), mask)
    if case.operator.endswith("ppo_loss"):
        names = [k for k in case.options if k not in (*CAPPED, "bias", "inplace_backward")]
        options, scale = {k: case.options[k] for k in names}, []
        kind = "reverse" if options.get("kl_estimator") == "exact" else ""

        def loss(results: Tensors) -> torch.Tensor:
            total, magnitude = exact.ppo(results, x, mask, **options)
            scale.append(magnitude)
            return total / 3

        found = exact.differentiate(flat, rows, loss, transform, kind)
        found |= {"loss": 3 * found.pop("total"), "scale": scale[0]}
        return shaped({k: v for k, v in found.items() if k not in ("logsumexp", "kl")}, mask)
    kept = {"kl": ("kl",)}.get(case.operator.removeprefix("linear_"), ("logprobs", "entropy", "logsumexp"))

    def upstream(results: Tensors) -> torch.Tensor:
        return weighted({name: results[name] for name in kept}) / 3

    found = exact.differentiate(flat, rows, upstream, transform, case.options.get("kind", ""))
    return shaped({k: v for k, v in found.items() if k in kept or k.startswith("∂")}, mask)


def shaped(found: Tensors, mask: torch.Tensor) -> Tensors:
    """Per-token results [N, …] as [B, T, …]."""
    per_token = ("logprobs", "entropy", "logsumexp", "kl", "∂hidden", "∂logits", "F hidden")
    return {k: v.view(*mask.shape, *v.shape[1:]) if k in per_token else v for k, v in found.items()}
