"""What a random call must give: float64 results, gradients, and how far from them an implementation may be.

The formulas are those of tests/oracle.py, and gradients come from autograd. The bound on an error follows from the
roundings that any implementation makes, carried through the formulas:

    a logit is off by at most e = c u |z| + D u32 (|h| |W|ᵀ + |b|)       u: the inputs' precision, u32: the sums'
    a log-probability by 2 e, an entropy by 2 e ln V, a KL by 2 e (E |log p/q| + 1)
    ∂z by what p, H and the upstream scalars change by when z does; ∂h and ∂W by |δ∂z| |W|, |δ∂z|ᵀ |h| and roundings

A scalar of the loss upstream of a row, ∂loss/∂logp, is monotone between clip boundaries: its change is that between
the two ends of logp ± 2 e, so that a ratio that rounds to the other side of a boundary is within the bound. Where e is
above 0.1 the bound says little: then there is none, and only what must hold on any input is checked.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import oracle
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.fuzz.calls import Call, Draw

INF = float("inf")


def upstream(x: Tensor, name: str) -> Tensor:
    """What the outputs of an operator without a loss are weighed by; the same for every backend."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def logits_of(call: Call, args: dict[str, Any], prefix: str = "") -> tuple[Tensor, Tensor, float]:
    """Transformed logits of the rows that count, float64; the bound e on their errors; and the transform's slope."""
    transform = {k: args[k] for k in ("temperature", "logit_scale", "softcap") if k in args}
    factor = abs(transform.get("logit_scale", 1.0)) / transform.get("temperature", 1.0)
    fine = torch.finfo(torch.float64 if call.dtype == torch.float64 else torch.float32).eps
    coarse = torch.finfo(call.dtype).eps
    if f"{prefix}logits" in args:
        x = args[f"{prefix}logits"].double()[call.mask]
        z = oracle.logits(x, torch.eye(x.shape[-1], dtype=torch.float64), **transform)
        raw = torch.zeros(len(x), dtype=torch.float64)
    else:
        hidden = args[f"{prefix}hidden"].double()[call.mask]
        weight, bias = args[f"{prefix}weight"].double(), args.get(f"{prefix}bias")
        bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        z = oracle.logits(hidden, weight, bias, **transform)
        size = (hidden.detach().abs() @ weight.detach().abs().T + bias.detach().abs()).nan_to_num(0, 0, 0)
        product = (hidden.detach() @ weight.detach().T).abs() + bias.detach().abs().nan_to_num(0, 0, 0)
        raw = (coarse * product + fine * (hidden.shape[-1] + 2) * size).amax(-1) if len(hidden) else product.sum(-1)
    top = z.detach().nan_to_num(0, 0, 0).abs().amax(-1) if len(z) else z.sum(-1)
    return z, factor * raw + 8 * fine * (1 + top), factor


def statistics_of(z: Tensor, targets: Tensor | None, ref_z: Tensor | None, kind: str) -> dict[str, Tensor]:
    """{logp, entropy, lse, kl} of each row [n], float64, differentiable."""
    zero, out = z.new_zeros(0), {"logp": [], "entropy": [], "lse": [], "kl": []}
    for n in range(len(z)):
        top = z[n].detach().max()  # taken off, since the oracle's Σ p z cancels at ±1e4
        logp, entropy, lse = oracle.row(z[n] - top, None if targets is None else targets[n])
        for name, value in (("logp", logp), ("entropy", entropy), ("lse", lse + top)):
            out[name].append(value if value is not None else z.new_zeros(()))
        out["kl"].append(z.new_zeros(()) if ref_z is None else oracle.divergence(z[n], ref_z[n], kind))
    return {name: torch.stack(values) if values else zero for name, values in out.items()}


def expected_of_rows(call: Call, draw: Draw, loss: Any = None) -> tuple[dict, dict | None, Any]:
    """Results, gradients and their bounds for the operators that start from logits or hidden states."""
    args = dict(call.args)
    leaves = {name: args[name].detach().double().requires_grad_() for name in call.leaves()}
    args |= leaves
    z, e, factor = logits_of(call, args)
    if not z.requires_grad:
        z.requires_grad_()
    z.retain_grad()
    has_ref = "ref_weight" in args or "ref_logits" in args
    ref_z, ref_e, _ = logits_of(call, args, "ref_") if has_ref else (None, 0.0, 0.0)
    kind, count, vocab = args.get("kind", "reverse"), len(z), z.shape[-1]
    targets = args["targets"][call.mask].long() if "targets" in args else None
    stats = statistics_of(z, targets, ref_z, kind)
    given = {name: x.detach() for name, x in stats.items()}
    fine = torch.finfo(torch.float64 if call.dtype == torch.float64 else torch.float32).eps
    coarse = torch.finfo(call.dtype).eps
    tiny = 1.2e-7 if call.dtype == torch.float16 else 1e-37  # what a small number may be flushed to zero from

    log_p = torch.log_softmax(z.detach(), -1)
    p, flat = log_p.exp(), log_p.clamp(min=-1e30)
    both = e + ref_e
    spread = given["entropy"] + 1
    change = {"logp": 2 * e, "entropy": 2 * e * math.log(vocab), "lse": e, "kl": torch.zeros(count)}
    if ref_z is not None:
        log_q = torch.log_softmax(ref_z, -1)
        q, distance = log_q.exp(), (log_p - log_q).abs().nan_to_num(0, 0, 0)
        spread = ((p if kind == "reverse" else q) * distance).sum(-1) + 1
        change["kl"] = both * (2 * spread + 2) + vocab * fine * (spread + given["entropy"])
    change["entropy"] = change["entropy"] + vocab * fine * (1 + given["entropy"])
    change = {name: x + 4 * fine * (1 + given[name].abs()) for name, x in change.items()}

    def scalars(moved: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss as a function of the rows' statistics, and its derivatives."""
        moved = {name: x.detach().requires_grad_() for name, x in moved.items()}
        total = loss(moved) if loss else weighed(call, moved)
        gradients = torch.autograd.grad(total, list(moved.values()), allow_unused=True) if total.requires_grad else {}
        pairs = zip(moved, gradients or [None] * 4, strict=True)
        return total.detach(), {n: torch.zeros(count).double() if g is None else g for n, g in pairs}

    total, up = scalars(given)
    lower, higher = (scalars({n: x + s * change[n] for n, x in given.items()})[1] for s in (-1, 1))
    largest = {n: torch.stack([up[n].abs(), lower[n].abs(), higher[n].abs()]).amax(0) for n in up}
    jump = (
        torch.maximum((higher["logp"] - up["logp"]).abs(), (lower["logp"] - up["logp"]).abs()) if count else up["logp"]
    )

    expected = {"∂" + name: leaf for name, leaf in leaves.items()}
    if leaves:
        live = [name for name, x in stats.items() if x.requires_grad]
        torch.autograd.backward([stats[name] for name in live], [up[name] for name in live])
        expected = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in expected.items()}
    grid = torch.zeros(call.lead, dtype=torch.float64)
    outputs = {"logprobs": "logp", "entropy": "entropy", "logsumexp": "lse", "kl": "kl"}
    names = ["kl"] if call.op == "linear_kl" else [n for n in outputs if n != "kl"]
    expected |= {name: grid.masked_scatter(call.mask, given[outputs[name]]) for name in names}
    limits = row_limits(call, e, vocab)
    if loss:
        expected["loss"] = total * 1.0
    if count and not (both.max() < 0.1):
        return expected, None, limits

    grid = grid.unsqueeze(-1)
    bounds = {name: grid.squeeze(-1).masked_scatter(call.mask, change[outputs[name]]) for name in names}
    if loss:
        magnitude = 3 * fine * (count + 20) * loss.magnitude(given)
        bounds["loss"] = sum((largest[n] * change[n]).sum() for n in given) + magnitude
    dz = z.grad.abs() if z.grad is not None else torch.zeros_like(p)
    slack = e.unsqueeze(-1) * 1.5  # e^(4e) at e = 0.1
    both = (both * 1.5).unsqueeze(-1)
    column = {n: largest[n].unsqueeze(-1) for n in largest}
    moved = slack * p * (4 * (column["logp"] + column["lse"]))
    moved = moved + slack * p * column["entropy"] * (
        2 * (flat + given["entropy"].unsqueeze(-1)).abs() + 4 + 4 * math.log(vocab)
    )
    if ref_z is not None:
        kl = given["kl"].unsqueeze(-1)
        away = (log_p - log_q).nan_to_num(0, 0, 0) - kl
        moved = moved + column["kl"] * both * (
            p * (2 * away.abs() + 4 + 4 * (spread.unsqueeze(-1) + 1)) if kind == "reverse" else 2 * (p + q)
        )
    if targets is not None:
        chosen = torch.nn.functional.one_hot(targets, vocab).double()
        moved = moved + jump.unsqueeze(-1) * (p + chosen)
    if cap := args.get("softcap"):
        moved = moved + dz * 2 * (slack * args.get("temperature", 1.0) / cap + 4 * fine)
    dx = factor * dz
    moved = factor * moved + (coarse + 4 * fine) * dx + 2 * tiny

    def product(a: Tensor, a_error: Tensor, b: Tensor, result: Tensor) -> Tensor:
        return a_error @ b.abs() + a.shape[-1] * fine * (a @ b.abs()) + coarse * result.abs() + tiny

    for name, gradient in expected.items():
        if not name.startswith("∂"):
            continue
        flat_result = gradient
        if name == "∂hidden":
            weight = args["weight"].detach().double()
            bounds[name] = torch.zeros_like(gradient)
            bounds[name][call.mask] = product(dx, moved, weight, flat_result[call.mask])
        elif name == "∂weight":
            hidden = args["hidden"].detach().double()[call.mask]
            bounds[name] = product(dx.T, moved.T, hidden, flat_result)
        elif name == "∂bias":
            bounds[name] = product(dx.T, moved.T, torch.ones(count, 1).double(), flat_result.unsqueeze(-1)).squeeze(-1)
        else:  # ∂logits
            bounds[name] = torch.zeros_like(gradient)
            bounds[name][call.mask] = moved
    if loss:  # 3.0 · loss is what is differentiated
        for name in [n for n in bounds if n.startswith("∂")]:
            expected[name], bounds[name] = 3.0 * expected[name], 3.0 * bounds[name] + coarse * 3 * expected[name].abs()
    return expected, bounds, limits


def weighed(call: Call, rows: dict[str, Tensor]) -> Tensor:
    """What `outcome` differentiates where there is no loss."""
    names = {"kl": "kl"} if call.op == "linear_kl" else {"logprobs": "logp", "entropy": "entropy", "logsumexp": "lse"}
    if not call.args.get("return_entropy", True):
        del names["entropy"]
    dtype = torch.promote_types(call.dtype, torch.float32)
    return sum(
        (upstream(torch.empty(call.lead, dtype=dtype), n)[call.mask].double() * rows[s]).sum() for n, s in names.items()
    )


def row_limits(call: Call, e: Tensor, vocab: int) -> Any:
    """What must hold of the outputs on any input: as far as float16 can hold the logits of the naive path."""
    overflows = call.dtype == torch.float16 and bool(len(e)) and not bool((e < 10).all())

    def check(name: str, value: Tensor, backend: str | None) -> str | None:
        gradient = name.startswith("∂") or call.op == "fisher_vector_product"
        if overflows or (value.dtype == torch.float16 and gradient):
            return None
        if not name.startswith("metrics") and not torch.isfinite(value).all():
            return f"not finite: {value[~torch.isfinite(value)][0].item()}"
        if name == "logprobs" and call.op != "ppo_loss" and (value > 0).any():
            return f"a log-probability of {value.max().item()}"
        # The naive path sums as it does; the others are bounded.
        most = math.log(vocab) * (1 + (1e-5 if backend == "reference" else 2e-7)) + 1e-12
        if name == "entropy" and call.op != "ppo_loss" and ((value < 0) | (value > most)).any():
            return f"outside [0, ln {vocab}]: {value.min().item()} to {value.max().item():.9g}"
        if name == "kl" and call.op == "linear_kl" and (value < 0).any():
            return f"below 0: {value.min().item()}"
        return None

    return check


class Loss:
    """The oracle's loss as a function of the rows' statistics."""

    def __init__(self, call: Call) -> None:
        self.call, a = call, call.args
        names = (
            "clip_low",
            "clip_high",
            "dual_clip",
            "ratio_level",
            "kl_coef",
            "kl_estimator",
            "entropy_coef",
            "loss_agg",
        )
        self.options = {name: a[name] for name in names if name in a}
        self.old, self.advantages, self.ref, self.weights = (
            None if a.get(n) is None else a[n].double().reshape(-1, max(call.lead[-1], 1))
            for n in ("old_logprobs", "advantages", "ref_logprobs", "importance_weights")
        )

    def __call__(self, rows: dict[str, Tensor]) -> Tensor:
        width = max(self.call.lead[-1], 1)
        mask = self.call.mask.reshape(-1, width)

        def grid(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)

        return oracle.ppo(
            grid(rows["logp"]), grid(rows["entropy"]), self.old, self.advantages, mask.tolist(), ref=self.ref,
            exact_kl=grid(rows["kl"]), importance_weights=self.weights, **self.options,
        )  # fmt: skip

    def magnitude(self, rows: dict[str, Tensor]) -> float:
        """The sum of the sizes of the loss's terms, for the rounding of that sum."""
        a, mask = self.call.args, self.call.mask
        if not mask.any():
            return 0.0
        old, advantages = a["old_logprobs"].double()[mask], a["advantages"].double()[mask]
        log_ratio = (rows["logp"] - old).clamp(-60, 60)
        if a.get("ratio_level", "token") != "token":
            log_ratio = log_ratio.abs().sum().clamp(max=60) * torch.ones_like(log_ratio)
        ratio = (
            log_ratio.exp().clamp(max=1 + a.get("clip_high", 0.2)) if not (advantages < 0).any() else log_ratio.exp()
        )
        size = (
            (ratio + 1 + a.get("clip_high", 0.2) + (a.get("dual_clip") or 0)) * advantages.abs() * (1 + log_ratio.abs())
        ).sum()
        size += abs(a.get("entropy_coef", 0.0)) * rows["entropy"].sum()
        if a.get("kl_coef") and a["kl_estimator"] != "exact":
            d = (rows["logp"] - a["ref_logprobs"].double()[mask]).clamp(-60, 60)
            size += a["kl_coef"] * (d.abs() + d.square() + 1 + (-d).exp()).sum()
        elif a.get("kl_coef"):
            size += a["kl_coef"] * rows["kl"].sum()
        mean = a.get("loss_agg", "token-mean") == "token-mean"
        return float(size / mask.sum() if mean else size)


def expected_loss(call: Call, draw: Draw) -> tuple[dict, dict | None, Any]:
    if "logprobs" not in call.args:
        expected, bounds, limits = expected_of_rows(call, draw, Loss(call))
        expected.pop("logsumexp", None)
        if "entropy" not in expected and bounds:
            bounds.pop("entropy", None)
        return expected, bounds, limits
    loss, args = Loss(call), call.args
    rows = {"logp": args["logprobs"], "entropy": args["entropy"]}
    rows = {n: x.detach().double()[call.mask].requires_grad_() for n, x in rows.items()}
    rows["kl"] = torch.zeros(int(call.mask.sum()), dtype=torch.float64)
    total = loss(rows)
    gradients = (
        torch.autograd.grad(3.0 * total, [rows["logp"], rows["entropy"]], allow_unused=True)
        if total.requires_grad
        else [None, None]
    )
    fine, coarse = (torch.finfo(t).eps for t in (torch.promote_types(call.dtype, torch.float32), call.dtype))
    fine = max(fine, torch.finfo(args["old_logprobs"].dtype).eps if call.dtype == torch.float64 else 0)
    size = loss.magnitude({n: x.detach() for n, x in rows.items()})
    expected, bounds = {"loss": total.detach()}, {"loss": 4 * fine * (rows["kl"].numel() + 20) * size}
    for name, gradient in zip(("logprobs", "entropy"), gradients, strict=True):
        if name in call.leaves():
            grid = torch.zeros(call.lead, dtype=torch.float64)
            expected["∂" + name] = grid if gradient is None else grid.masked_scatter(call.mask, gradient)
            bounds["∂" + name] = (
                coarse * expected["∂" + name].abs() + 100 * fine * (1 + size) + 1.2e-7 * (call.dtype == torch.float16)
            )
    return expected, bounds, row_limits(call, torch.zeros(0), 2)


def expected_fisher(call: Call, draw: Draw) -> tuple[dict, dict | None, Any]:
    args = {n: x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x for n, x in call.args.items()}
    weights = args.get("row_weights", torch.ones(call.lead, dtype=torch.float64))[call.mask]
    transform = {k: args[k] for k in ("temperature", "logit_scale", "softcap") if k in args}
    hidden, d_hidden = args["hidden"][call.mask], args["d_hidden"][call.mask]
    names = ["weight"] + ["bias"] * ("bias" in args)
    primal = [hidden, *(args[n] for n in names)]
    moves = [d_hidden, *(args.get(f"d_{n}", torch.zeros_like(args[n])) for n in names)]
    z, dz = torch.func.jvp(lambda *x: oracle.logits(*x, **transform), tuple(primal), tuple(moves))
    _, pull = torch.func.vjp(lambda *x: oracle.logits(*x, **transform), *primal)
    p = torch.softmax(z, -1)
    mean = (p * dz).sum(-1, keepdim=True)
    u = weights.unsqueeze(-1) * p * (dz - mean)
    products = dict(zip(["hidden", *names], pull(u), strict=True))
    out = torch.zeros_like(args["hidden"])
    out[call.mask] = products["hidden"]
    expected = {"hidden": out} | {n: products[n] for n in names if f"d_{n}" in args}
    _, e, factor = logits_of(call, call.args)
    limits = row_limits(call, e, len(args["weight"]))
    if len(e) and not e.max() < 0.1:
        return expected, None, limits
    fine, coarse = (torch.finfo(t).eps for t in (torch.promote_types(call.dtype, torch.float32), call.dtype))
    size = (
        d_hidden.abs() @ args["weight"].abs().T
        + hidden.abs() @ moves[1].abs().T
        + (moves[2].abs() if len(moves) > 2 else 0)
    )
    e = 1.5 * e.unsqueeze(-1)
    e_dz = factor * (2 * coarse + fine * (2 * hidden.shape[-1] + 9)) * size
    slope = 0.0
    if cap := args.get("softcap"):
        slope = 2 * (e * args.get("temperature", 1.0) / cap + 4 * fine)
        e_dz = e_dz + slope * factor * size
    away = (dz - mean).abs()
    e_u = (
        weights.abs().unsqueeze(-1)
        * p
        * (2 * e * (away + (p * away).sum(-1, keepdim=True)) + e_dz + (p * e_dz).sum(-1, keepdim=True))
    )
    tiny = 1.2e-7 if call.dtype == torch.float16 else 1e-37
    g = u.abs() * factor
    e_g = (
        factor * (e_u + u.abs() * slope)
        + (coarse + len(args["weight"]) * fine) * (g + weights.abs().unsqueeze(-1) * p * away)
        + 2 * tiny
    )
    bounds = {"hidden": torch.zeros_like(out)}
    bounds["hidden"][call.mask] = e_g @ args["weight"].abs() + coarse * products["hidden"].abs() + tiny
    n = len(hidden)
    for name, other in (("weight", hidden.abs()), ("bias", torch.ones(n, 1).double())):
        if name in expected:
            product = (e_g + n * fine * g).T @ other
            bounds[name] = (product if name == "weight" else product.squeeze(-1)) + coarse * expected[name].abs() + tiny
    return expected, bounds, limits


def expected_gae(call: Call, draw: Draw) -> tuple[dict, dict | None, Any]:
    """The recursion in Python's own floats, and the same of the sizes for the bound."""
    a, real = call.args, call.mask.flatten().tolist()
    rewards, values = a["rewards"].double().flatten().tolist(), a["values"].double().flatten().tolist()
    dones = a["dones"].flatten().tolist() if "dones" in a else [False] * len(real)
    offsets = a["cu_seqlens"].tolist() if "cu_seqlens" in a else [s * call.lead[1] for s in range(call.lead[0] + 1)]
    dtype = torch.float64 if torch.float64 in (a["rewards"].dtype, a["values"].dtype) else torch.float32
    fine = torch.finfo(dtype).eps
    advantages, returns, errors = ([0.0] * len(real) for _ in range(3))
    for s, (start, end) in enumerate(itertools.pairwise(offsets)):
        value = float(a["bootstrap"][s]) if "bootstrap" in a else 0.0
        advantage = error = 0.0
        for t in reversed([t for t in range(start, end) if real[t]]):
            goes_on = not dones[t]
            advantage = rewards[t] + goes_on * (a["gamma"] * value + a["gamma"] * a["lam"] * advantage) - values[t]
            size = abs(rewards[t]) + abs(value) + abs(values[t]) + abs(advantage)
            error = goes_on * a["gamma"] * a["lam"] * error + 8 * fine * size
            value = values[t]
            advantages[t], returns[t], errors[t] = advantage, advantage + value, error + 2 * fine * abs(value)
    pair, bound = (
        torch.tensor([x, y], dtype=torch.float64).view(2, *call.lead)
        for x, y in ((advantages, returns), (errors, errors))
    )
    expected = {"advantages": pair[0], "returns": pair[1]}
    bounds = {"advantages": 4 * bound[0], "returns": 4 * bound[1]}
    if a["whiten"]:
        expected["advantages"], bounds["advantages"] = whitened(pair[0], bounds["advantages"], call.mask, fine)
    return expected, bounds, lambda name, value, _: None if torch.isfinite(value).all() else "not finite"


def whitened(x: Tensor, error: Tensor, mask: Tensor, fine: float, shift_mean: bool = True) -> tuple[Tensor, Tensor]:
    """(x − mean) / sqrt(var + 1e-8) and the bound for a given error of x."""
    out, real = torch.zeros_like(x), x[mask]
    if not len(real):
        return out, out
    centered = real - real.mean()
    deviation = math.sqrt(float(centered.square().sum()) / max(len(real) - 1, 1) + 1e-8)
    out[mask] = centered / deviation + (0.0 if shift_mean else real.mean())
    off = float(error[mask].max()) + fine * (len(real) + 8) * float(real.abs().max())
    # Where the deviation itself is lost in rounding nothing is known of the result.
    bound = INF if off > 0.1 * deviation else 3 * off / deviation + fine * len(real) + off
    return out, (bound * (1 + out.abs())).masked_fill(~mask, 0.0)


def expected_value_loss(call: Call, draw: Draw) -> tuple[dict, dict | None, Any]:
    a = call.args
    leaf = a["values"].detach().double().requires_grad_()
    values, returns = leaf[call.mask], a["returns"].double()[call.mask]
    squared = (values - returns).square()
    if (c := a["cliprange_value"]) is not None:
        old = a["old_values"].double()[call.mask]
        squared = torch.maximum(squared, (old + (values - old).clamp(-c, c) - returns).square())
    grid = torch.zeros(call.lead, dtype=torch.float64)
    flat = grid.masked_scatter(call.mask, squared).reshape(-1, max(call.lead[-1], 1))
    mask = call.mask.reshape(flat.shape).double()
    lengths, sequences = mask.sum(-1), max(int((call.mask.reshape(flat.shape).any(-1)).sum()), 1)
    loss = (
        0.5
        * {
            "token-mean": lambda: flat.sum() / mask.sum().clamp(min=1),
            "seq-mean-token-mean": lambda: (flat.sum(-1) / lengths.clamp(min=1)).sum() / sequences,
            "seq-mean-token-sum": lambda: flat.sum() / sequences,
            "seq-mean-token-sum-norm": lambda: flat.sum() / sequences / max(call.lead[-1], 1),
        }[a.get("loss_agg", "token-mean")]()
    )
    (3.0 * loss).backward() if values.numel() else None
    fine, coarse = (torch.finfo(t).eps for t in (torch.promote_types(call.dtype, torch.float32), call.dtype))
    if c is not None and call.dtype == torch.float64:
        fine = coarse
    expected, bounds = {"loss": loss.detach()}, {"loss": 4 * fine * (flat.numel() + 20) * (loss.detach() + 1)}
    if a["values"].requires_grad:
        expected["∂values"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        bounds["∂values"] = coarse * expected["∂values"].abs() + 100 * fine + 1.2e-7 * (call.dtype == torch.float16)
    return expected, bounds, row_limits(call, torch.zeros(0), 2)


def expected_whiten(call: Call, draw: Draw) -> tuple[dict, dict | None, Any]:
    x = call.args["x"].double()
    fine = torch.finfo(torch.promote_types(call.dtype, torch.float32)).eps
    out, bound = whitened(x, torch.zeros_like(x), call.mask, fine, call.args["shift_mean"])
    return {"kl": out}, {"kl": bound}, lambda name, value, _: None if torch.isfinite(value).all() else "not finite"


EXPECTED = {
    "linear_logprob": expected_of_rows, "selective_logprob": expected_of_rows, "linear_kl": expected_of_rows,
    "linear_ppo_loss": expected_loss, "ppo_loss": expected_loss, "fisher_vector_product": expected_fisher,
    "gae": expected_gae, "value_loss": expected_value_loss, "whiten": expected_whiten,
}  # fmt: skip
