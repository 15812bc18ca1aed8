"""What every backend must agree on at the edges: run by tests/ops, and by tests/triton_kernels for Triton's.

Small: B sequences of T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math

import oracle
import torch
from torch import Tensor

import fastppo
from fastppo.engines.dispatch import BACKENDS

B, T, D, V = 3, 4, 8, 37
TRAINED = ("hidden", "weight", "bias", "logits", "logprobs", "entropy", "values")
PER_TOKEN = ("targets", "old_logprobs", "ref_logprobs", "advantages", "importance_weights", "mask", "hidden",
             "ref_hidden", "logits", "ref_logits", "logprobs", "entropy", "values", "returns", "old_values", "rewards",
             "dones", "x", "d_hidden", "row_weights")  # fmt: skip


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    hidden, ref_hidden = torch.randn(B, T, D), torch.randn(B, T, D)
    weight, bias = torch.randn(V, D) / math.sqrt(D), torch.randn(V)
    targets = torch.randint(V, (B, T))
    now = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    x = {
        "hidden": hidden, "weight": weight, "bias": bias, "ref_hidden": ref_hidden,
        "ref_weight": torch.randn(V, D) / math.sqrt(D), "ref_bias": torch.randn(V),
        "old_logprobs": now + 0.3 * torch.randn(B, T), "ref_logprobs": now + 0.3 * torch.randn(B, T),
        "advantages": torch.randn(B, T), "importance_weights": 2 * torch.rand(B, T),
    }  # fmt: skip
    return {name: value.to(dtype) for name, value in x.items()} | {"targets": targets}


def run(operator, arguments: dict, upstream=None) -> dict[str, Tensor]:
    """Every output, metric and gradient by name."""
    leaves = {
        name: arguments[name].detach().clone().requires_grad_()
        for name in TRAINED
        if isinstance(arguments.get(name), Tensor) and operator not in (fastppo.gae, fastppo.fisher_vector_product)
    }
    if "logits" in leaves and arguments.get("inplace_backward"):
        out = operator(**(arguments | leaves | {"logits": leaves["logits"] * 1.0}))
    else:
        out = operator(**(arguments | leaves))
    out = {"out": out} if isinstance(out, Tensor) else dict(out._asdict())
    out |= {f"metric {name}": value for name, value in out.pop("metrics", {}).items()}
    out = {name: value for name, value in out.items() if value is not None}
    wanted = {name: value for name, value in out.items() if value.requires_grad}
    torch.autograd.backward(
        list(wanted.values()),
        [torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape) + 0.1 for value in wanted.values()],
    )
    return {n: x.detach() for n, x in out.items()} | {f"∂{n}": x.grad for n, x in leaves.items() if x.grad is not None}


# ---- tokens that are left out ---------------------------------------------------------------------------------------


def operators(backend: str) -> dict[str, tuple]:
    """What a backend can be asked for: name -> (operator, arguments)."""
    x = inputs()
    logits, ref_logits = x["hidden"] @ x["weight"].T + x["bias"], x["ref_hidden"] @ x["ref_weight"].T
    for name in ("bias", "ref_bias"):
        x[name] = x[name] + 100.0  # its exponential overflows: no distance to a maximum
    head = {name: x[name] for name in ("hidden", "weight", "bias")}
    reference = {name: x[name] for name in ("ref_hidden", "ref_weight", "ref_bias")}
    rollout = {name: x[name] for name in ("old_logprobs", "advantages", "ref_logprobs", "importance_weights")}
    targets, mask, loss = {"targets": x["targets"]}, {"mask": torch.ones(B, T)}, {"kl_coef": 0.3, "entropy_coef": 0.1}
    sequences = {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean", "dual_clip": 1.5}
    exact = {"kl_estimator": "exact"} | loss
    scalars = {name: torch.randn(B, T) for name in ("values", "returns", "old_values", "rewards", "x")}
    critic = {name: scalars[name] for name in ("values", "returns", "old_values")}
    directions = {"d_hidden": torch.randn(B, T, D), "d_weight": torch.randn(V, D), "row_weights": torch.rand(B, T)}
    found = {
        "linear_logprob": (fastppo.linear_logprob, head | targets | {"return_entropy": True}),
        "linear_kl": (fastppo.linear_kl, head | reference | mask),
        "linear_kl forward": (fastppo.linear_kl, head | reference | mask | {"kind": "forward"}),
        "linear_ppo_loss": (fastppo.linear_ppo_loss, head | targets | rollout | mask | loss),
        "linear_ppo_loss sequences": (fastppo.linear_ppo_loss, head | targets | rollout | loss | sequences),
        "linear_ppo_loss exact": (fastppo.linear_ppo_loss, head | targets | rollout | reference | mask | exact),
        "selective_logprob": (fastppo.selective_logprob, targets | {"logits": logits, "return_entropy": True}),
        "selective_logprob in place": (
            fastppo.selective_logprob,
            targets | {"logits": logits, "return_entropy": True, "inplace_backward": True},
        ),
        "ppo_loss": (fastppo.ppo_loss, targets | rollout | mask | loss | {"logits": logits}),
        "ppo_loss exact": (
            fastppo.ppo_loss,
            targets | rollout | mask | exact | {"logits": logits, "ref_logits": ref_logits},
        ),
        "ppo_loss of log-probs": (
            fastppo.ppo_loss,
            rollout | mask | loss | {"logprobs": x["old_logprobs"] + 0.1, "entropy": torch.rand(B, T)},
        ),
        "fisher_vector_product": (
            fastppo.fisher_vector_product,
            head | mask | directions,
        ),
    }  # fmt: skip
    found = {
        name: (operator, arguments | {"backend": backend})
        for name, (operator, arguments) in found.items()
        if backend in BACKENDS[operator.__name__]
    }
    if backend in BACKENDS["gae"]:
        gae = {"rewards": scalars["rewards"], "values": scalars["values"], "gamma": 0.9, "lam": 0.8, "whiten": True}
        found["gae"] = (fastppo.gae, gae | mask | {"dones": torch.zeros(B, T), "backend": backend})
    if backend == "reference":
        found["value_loss"] = (fastppo.value_loss, critic | mask)
        found["whiten"] = (fastppo.whiten, {"x": scalars["x"]} | mask)
    return found


GARBAGE = (math.nan, math.inf, -math.inf, 3e38)


def what_is_left_out_changes_nothing(operator, arguments: dict, garbage: tuple[float, ...] = GARBAGE) -> None:
    """No output, metric or gradient, to the last bit, whatever stands where the target is −100 or the mask False."""
    out = torch.zeros(B, T, dtype=torch.bool)
    out[0, 0], out[0, 2], out[1, 3], out[2] = True, True, True, True  # at the start, within, at the end, all of one
    by_target = [True] * ("targets" in arguments) + [False] * ("mask" in arguments)
    for ignored in by_target:
        results = []
        for held in (0.0, *garbage):
            given = dict(arguments)
            for name in PER_TOKEN:
                if name in given and name not in ("targets", "mask"):
                    left_out = out if given[name].dim() == 2 else out.unsqueeze(-1)
                    given[name] = given[name].masked_fill(left_out, held)
            if ignored:
                given["targets"] = given["targets"].masked_fill(out, -100)
                if "mask" in given:
                    given["mask"] = given["mask"].masked_fill(out, held)
            else:
                given["mask"] = given["mask"] * ~out
                if "targets" in given:
                    given["targets"] = given["targets"].masked_fill(out, int(1e9) if held else 0)
            results.append(run(operator, given))
        clean, *others = results
        for name, value in clean.items():
            assert value.isfinite().all(), name
            if value.shape[:2] == (B, T):
                assert (value[out] == 0).all(), name
            for other in others:
                assert torch.equal(other[name], value), name


def rows_without_a_gradient_give_none(backend: str) -> None:
    """What a real token holds whose outputs are not used reaches no gradient."""
    x = inputs()
    head, reference = (
        {name: x[name] for name in names}
        for names in (("hidden", "weight", "bias"), ("ref_hidden", "ref_weight", "ref_bias"))
    )
    for operator, given in (
        (fastppo.linear_logprob, {"targets": x["targets"], "return_entropy": True}),
        (fastppo.linear_kl, reference),
    ):
        gradients = []
        for held in (0.0, math.nan):
            hidden = head["hidden"].index_fill(0, torch.tensor([0]), held)  # the first rows
            leaves = [leaf.clone().requires_grad_() for leaf in (hidden, head["weight"], head["bias"])]
            out = operator(*leaves[:2], bias=leaves[2], **given, backend=backend)
            sum(o[1:].sum() for o in ((out,) if isinstance(out, Tensor) else out)).backward()
            gradients.append([leaf.grad for leaf in leaves])
        assert all(map(torch.equal, *gradients)), operator.__name__


# ---- a policy that rules a sampled token out ------------------------------------------------------------------------


def ruled_out() -> tuple[dict[str, Tensor], Tensor]:
    """Inputs whose first target has a logit of −∞ in its own row alone or (the bias) in every row; where it is so."""
    x = inputs()
    x["targets"][0, 0] = 5
    x["targets"][1:][x["targets"][1:] == 5] = 6
    x["targets"][0, 1:] = 7
    x["bias"] = x["bias"].clone()
    x["bias"][5], x["bias"][20:29] = -torch.inf, -torch.inf
    x["targets"][(x["targets"] >= 20) & (x["targets"] < 29)] = 8
    where = torch.zeros(B, T, dtype=torch.bool)
    where[0, 0] = True
    x["old_logprobs"] = x["ref_logprobs"] = torch.full((B, T), -2.0)
    return x, where


def exactly(x: dict[str, Tensor], function) -> dict[str, Tensor]:
    """`function` of float64 logits [B, T, V], with its gradients by hidden, weight and bias."""
    leaves = {name: x[name].double().requires_grad_() for name in ("hidden", "weight", "bias")}
    z = oracle.logits(leaves["hidden"].view(B * T, D), leaves["weight"], leaves["bias"])
    found = function(z)
    wanted = {name: value for name, value in found.items() if value.requires_grad}
    upstream = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape) + 0.1 for v in wanted.values()]
    torch.autograd.backward(list(wanted.values()), upstream)
    return {n: v.detach() for n, v in found.items()} | {f"∂{n}": v.grad for n, v in leaves.items()}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    for name, value in want.items():
        scale = max(1.0, value[value.isfinite()].abs().max().item() if value.isfinite().any() else 1.0)
        torch.testing.assert_close(
            got[name].double(), value.view(got[name].shape), atol=tolerance * scale, rtol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


def statistics(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rows = [oracle.row(z[n], target) for n, target in enumerate(targets.flatten().tolist())]
    columns = zip(*rows, strict=True)
    return dict(zip(("logprobs", "entropy", "logsumexp"), map(torch.stack, columns), strict=True))


def a_ruled_out_target_has_no_probability(backend: str) -> None:
    """log p = −∞; entropy, logsumexp and every gradient are those of log-softmax: finite."""
    x, where = ruled_out()
    want = exactly(x, lambda z: statistics(z, x["targets"]))
    arguments = {"targets": x["targets"], "return_entropy": True, "backend": backend}
    head = {name: x[name] for name in ("hidden", "weight", "bias")}
    got = run(fastppo.linear_logprob, head | arguments)
    assert torch.equal(got["logprobs"] == -torch.inf, where)
    assert all(value.isfinite().all() for name, value in got.items() if name != "logprobs")
    agree(got, want)
    logits = torch.nn.functional.linear(*head.values())
    got = run(fastppo.selective_logprob, {"logits": logits} | arguments)
    assert torch.equal(got["logprobs"] == -torch.inf, where)
    agree(got, {name: value for name, value in want.items() if "∂" not in name})
    agree({"∂bias": got["∂logits"].sum((0, 1)), "∂weight": got["∂logits"].flatten(0, 1).T @ x["hidden"].view(-1, D)},
          {name: want[name] for name in ("∂bias", "∂weight")})  # fmt: skip


def a_ruled_out_target_in_the_loss(backend: str, **options) -> None:
    """A ratio of 0 without a gradient; a sampled KL is infinite, also without one; the rest of the loss stays."""
    x, where = ruled_out()
    estimator = options.get("kl_estimator")
    exact = estimator == "exact"
    ref_z = oracle.logits(x["ref_hidden"].double().view(B * T, D), x["ref_weight"].double(), x["ref_bias"].double())
    a, infinity = x["advantages"].double(), {"k1": -math.inf, "k2": math.inf, "k3": math.inf}.get(estimator, 0.0)

    def loss(z: Tensor) -> dict[str, Tensor]:
        found = statistics(z, x["targets"])
        logp, entropy = found["logprobs"].view(B, T), found["entropy"].view(B, T)
        d = torch.where(where, 0.0, logp - -2.0)
        ratio = torch.where(where, 0.0, torch.exp(d))
        terms = torch.maximum(-ratio * a, -ratio.clamp(0.8, 1.2) * a) - options.get("entropy_coef", 0.0) * entropy
        if exact:
            kl = torch.stack([oracle.divergence(z[n], ref_z[n], "reverse") for n in range(B * T)]).view(B, T)
        else:
            kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, None: 0.0 * d}[estimator]
        total = (terms + options.get("kl_coef", 0.0) * kl).mean()
        return {"loss": total, "logprobs": logp.detach(), "entropy": entropy.detach()}

    want = exactly(x, loss)
    want["loss"] = want["loss"] + options.get("kl_coef", 0.0) * infinity
    rollout = {name: x[name] for name in ("targets", "old_logprobs", "advantages")}
    if exact:
        given = {name: x[name] for name in ("ref_hidden", "ref_weight", "ref_bias")}
    else:
        given = {"ref_logprobs": x["ref_logprobs"]} if estimator else {}
    head = {name: x[name] for name in ("hidden", "weight", "bias")}
    got = run(fastppo.linear_ppo_loss, head | rollout | given | options | {"backend": backend})
    # The upstream gradient of a scalar in `run` is −0.9 here and in `exactly`.
    agree(got, want)
    logits = torch.nn.functional.linear(*head.values())
    if exact:
        given = {"ref_logits": torch.nn.functional.linear(*given.values())}
    got = run(fastppo.ppo_loss, rollout | given | options | {"backend": backend, "logits": logits})
    agree(got, {name: value for name, value in want.items() if "∂" not in name})
    agree({"∂bias": got["∂logits"].sum((0, 1))}, {"∂bias": want["∂bias"]})


def a_ruled_out_token_in_a_divergence(backend: str, kind: str) -> None:
    """Where the one that weighs has mass and the other has none, the other counts as if log p was −1e20."""
    x = inputs()
    x["ref_bias" if kind == "reverse" else "bias"][11] = -torch.inf
    x["ref_bias"][12] = x["bias"][12] = -torch.inf
    head, reference = (
        {name: x[name] for name in names}
        for names in (("hidden", "weight", "bias"), ("ref_hidden", "ref_weight", "ref_bias"))
    )
    got = run(fastppo.linear_kl, head | reference | {"kind": kind, "backend": backend})
    log_p, log_q = (
        torch.log_softmax(oracle.logits(h.double().view(B * T, D), w.double(), b.double()), -1).clamp(min=-1e20)
        for h, w, b in (head.values(), reference.values())
    )
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q)).sum(-1) if kind == "reverse" else (q * (log_q - log_p)).sum(-1)
    dz = p * (log_p - log_q - kl[:, None]) if kind == "reverse" else p - q
    dz = dz * (torch.linspace(-1, 1, B * T, dtype=torch.float64) + 0.1)[:, None]
    want = {"out": kl, "∂bias": dz.sum(0), "∂weight": dz.T @ x["hidden"].double().view(B * T, D)}
    assert kl.min() > 1e10
    agree(got, want | {"∂hidden": dz @ x["weight"].double()})


# ---- log-ratios far out ---------------------------------------------------------------------------------------------


def far_log_ratios(backend: str, estimator: str) -> None:
    """The loss and its gradient where log π − log π_ref is anything from −1e6 to 80, against float64.

    k3 = e^−d − 1 + d is bounded: beyond d = −60 its exponential is constant, so that the derivative is 1.
    """
    x = inputs()
    x["hidden"] = x["hidden"] * 0.1
    distance = torch.tensor([-1e6, -1e3, -100.0, -70.0, -61.0, -59.0, -30.0, -1.0, 0.0, 1.0, 30.0, 80.0]).view(B, T)
    head = {name: x[name] for name in ("hidden", "weight", "bias")}
    now = fastppo.linear_logprob(**head, targets=x["targets"], backend="reference").logprobs
    rollout = {"targets": x["targets"], "old_logprobs": now, "advantages": torch.zeros(B, T)}
    options = {"ref_logprobs": now - distance, "kl_coef": 0.5, "kl_estimator": estimator}
    logits = torch.nn.functional.linear(*head.values())
    results = [
        run(fastppo.linear_ppo_loss, head | rollout | options | {"backend": backend}),
        run(fastppo.ppo_loss, rollout | options | {"logits": logits, "backend": backend}),
        run(fastppo.ppo_loss, {k: v for k, v in rollout.items() if k != "targets"} | options | {"logprobs": now}),
    ]
    z = logits.double().view(B * T, V).requires_grad_()
    logp = torch.log_softmax(z, -1).gather(-1, x["targets"].view(-1, 1)).view(B, T)
    d = logp - options["ref_logprobs"].double()
    near = torch.exp(-d.clamp(min=-60.0)) - 1 + d
    loss = 0.5 * {"k1": d, "k2": d**2 / 2, "k3": near}[estimator].mean()
    by_logp, by_z = torch.autograd.grad(-0.9 * loss, [logp, z])
    for got in results:
        torch.testing.assert_close(got["loss"].double(), loss.detach(), rtol=2e-4, atol=1e-5)

    def close(got: Tensor, want: Tensor, tolerance: float) -> None:
        """Each token by itself: the greatest is 1e25 times the others."""
        scale = want.abs().amax(-1, keepdim=True) if want.dim() > 1 else want.abs()
        assert ((got.double() - want).abs() <= tolerance * scale + 1e-7).all()

    close(results[2]["∂logprobs"].flatten(), by_logp.flatten(), 1e-4)
    close(results[1]["∂logits"].view(B * T, V), by_z, 2e-4)
    want = by_z @ x["weight"].double()
    close(results[0]["∂hidden"].view(B * T, D), want, 2e-4)


# ---- dtypes that differ ---------------------------------------------------------------------------------------------


def dtypes_may_differ(backend: str, dtype: torch.dtype, other: torch.dtype) -> None:
    """The reference, the bias and all that is given per token may have another dtype than the policy: results have the
    policy's, and are those of everything in it."""
    x = {name: value if name == "targets" else value.to(dtype) for name, value in inputs(torch.bfloat16).items()}
    logits = torch.nn.functional.linear(x["hidden"], x["weight"]).detach().bfloat16().to(dtype)
    ref_logits = torch.nn.functional.linear(x["ref_hidden"], x["ref_weight"]).detach().bfloat16().to(dtype)
    head = {name: x[name] for name in ("hidden", "weight", "bias")}
    reference = {name: x[name] for name in ("ref_hidden", "ref_weight", "ref_bias")}
    rollout = {
        name: x[name] for name in ("targets", "old_logprobs", "advantages", "ref_logprobs", "importance_weights")
    }
    exact = {"kl_coef": 0.3, "kl_estimator": "exact", "entropy_coef": 0.1}
    calls = [
        (fastppo.linear_kl, head | reference),
        (fastppo.linear_kl, head | reference | {"kind": "forward"}),
        (fastppo.linear_logprob, head | {"targets": x["targets"], "return_entropy": True}),
        (fastppo.linear_ppo_loss, head | reference | rollout | exact),
        (fastppo.ppo_loss, rollout | exact | {"logits": logits, "ref_logits": ref_logits}),
        (fastppo.ppo_loss, {k: v for k, v in rollout.items() if k != "targets"} | {"entropy_coef": 0.1, "kl_coef": 0.1}
         | {"logprobs": x["old_logprobs"] + 0.125, "entropy": x["ref_logprobs"].abs()}),
    ]  # fmt: skip
    tolerance = max({torch.bfloat16: 0.02, torch.float32: 2e-5, torch.float64: 1e-9}[x] for x in (dtype, other))
    kept = ("hidden", "weight", "logits", "logprobs", "targets")
    for operator, arguments in calls:
        arguments = arguments | {"backend": backend}
        mixed = {
            name: value.to(other) if isinstance(value, Tensor) and name not in kept else value
            for name, value in arguments.items()
        }
        alike, got = run(operator, arguments), run(operator, mixed)
        for name, value in alike.items():
            assert got[name].dtype == (other if name[1:] in mixed and name[1:] not in kept else value.dtype), name
            scale = max(1.0, value.abs().max().item())
            assert (got[name].double() - value.double()).abs().max() <= tolerance * scale, (operator.__name__, name)


# ---- ranges ---------------------------------------------------------------------------------------------------------


def results_stay_in_range(backend: str, rows: int = 120, vocab: int = 1031) -> None:
    """log p ≤ 0, 0 ≤ entropy ≤ ln V, KL ≥ 0 also where rounding would carry them out; their gradients do not notice."""
    weight = torch.randn(vocab, 16)
    hidden = torch.cat([torch.randn(rows, 16) * scale for scale in (1e-6, 1e-3, 0.3, 3.0)])
    out = fastppo.linear_logprob(
        hidden, weight, torch.randint(vocab, (len(hidden),)), return_entropy=True, backend=backend
    )
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= torch.tensor(float(vocab)).log()).all()
    other = hidden * (1 + 1e-7 * torch.randn_like(hidden))
    for kind in ("reverse", "forward"):
        leaf = hidden.clone().requires_grad_()
        kl = fastppo.linear_kl(leaf, weight, other, weight, kind=kind, backend=backend)
        kl.sum().backward()
        assert (kl >= 0).all()
        assert leaf.grad.isfinite().all()
    logits = hidden @ weight.T
    zeros = torch.zeros(1, len(hidden))
    out = fastppo.ppo_loss(
        zeros, zeros, logits=logits[None], targets=torch.zeros(1, len(hidden), dtype=torch.long),
        ref_logits=(other @ weight.T)[None], kl_coef=1.0, kl_estimator="exact", backend=backend,
    )  # fmt: skip
    assert out.metrics["kl"] >= 0
