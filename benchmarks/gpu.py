"""The operators on one GPU: correctness against float64 first, then the machine's ceilings, then times against them.

    PYTHONPATH=.:kernels python benchmarks/gpu.py --out results/        measures everything, writes gpu.json and gpu.md
    PYTHONPATH=.:kernels python benchmarks/gpu.py --out results/ --models Llama-3-8B --tokens 8192 --only loss
    TRITON_INTERPRET=1 PYTHONPATH=.:kernels python benchmarks/gpu.py --dry-run       tiny sizes on the CPU: does it run
    python benchmarks/plot.py results/gpu.json                          draws it

Needs no network. A time is the median of several runs with a cold L2, by CUDA events; the floor of a case is what the
plain matrix products (or a copy of as many bytes) take in the same run. Naive PyTorch is the backend `reference`;
peers (peers.py) are timed where they are installed. Where a contender fails, out of memory say, the table says so.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peers
import torch
from roofline import MODELS, floors

import fastppo
from fastppo import reference
from fastppo.ops.budget import scratch_bytes
from fastppo.ops.dispatch import BACKENDS, unusable
from fastppo.ops.transform import LogitTransform

TOKENS = [1024, 2048, 4096, 8192, 16_384, 32_768]
GAE_SHAPES = [(1, 1_000_000), (512, 4096), (4096, 1024), (32_768, 32)]
WHOLE_ROWS_BUDGET = 8 * 2**30  # beside the default: room for the tiling by whole rows
Tensors = dict[str, torch.Tensor]


class Bench:
    """Times functions on one device; every result is a row of the table."""

    def __init__(self, device: torch.device, dry_run: bool) -> None:
        self.device, self.dry_run = device, dry_run
        self.rounds = 1 if dry_run else 15
        self.rows: list[dict] = []
        self.flush = torch.empty(1 if dry_run else 2**28, dtype=torch.int8, device=device)

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Median over rounds, after a warm-up that compiles, with L2 overwritten before each."""
        for _ in range(1 if self.dry_run else 3):
            function()
        times = []
        for _ in range(self.rounds):
            self.flush.zero_()
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    def add(self, case: str, name: str, floor_ms: float, make: Callable[[], Callable[[], object]]) -> None:
        """Time what make() returns; a function that fails (out of memory, say) is reported, and the rest goes on."""
        row = {"case": case, "name": name, "floor_ms": floor_ms}
        try:
            function = make()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                function()
                torch.cuda.synchronize()
                row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            row["ms"] = self.milliseconds(function)
            row["ratio"] = row["ms"] / floor_ms
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        self.rows.append(row)
        print(format_row(row), flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def usable_backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    return [name for name in BACKENDS[op] if unusable(name, device, dtype) is None]


def inputs(tokens: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def head() -> tuple[torch.Tensor, torch.Tensor]:
        return normal(tokens, dim).to(dtype), (normal(vocab, dim) / dim**0.5).to(dtype)

    hidden, weight = head()
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator, device=device),
        "old": -torch.rand(tokens, generator=generator, device=device) * 3 - 9,
        "advantages": normal(tokens),
    }


def with_reference(x: Tensors) -> Tensors:
    """The same and a reference model near the policy: an own copy of its head, as far off as a policy drifts."""
    hidden, weight = x["hidden"].detach(), x["weight"].detach()
    return x | {"ref_hidden": hidden + 0.05 * torch.randn_like(hidden), "ref_weight": weight.clone()}


# ---- correctness ----------------------------------------------------------------------------------------------------


def correctness(device: torch.device, dry_run: bool) -> list[dict]:
    """For each operator, dtype and backend: the largest error of each output and gradient against float64.

    Relative to the greatest magnitude of the exact result; `naive` beside it is the error of the reference backend.
    """
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for op, label, call, tensors in operators(device, dry_run):
            if op == "gae" and dtype != torch.float32:
                continue
            exact = run_once(call, tensors, torch.float64, "reference")
            backends = usable_backends(op, device, dtype)
            naive = errors(run_once(call, tensors, dtype, "reference"), exact)
            for backend in backends:
                row = {"operator": label, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
                try:
                    row["errors"] = errors(run_once(call, tensors, dtype, backend), exact)
                    row["naive"] = naive
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:200]
                found.append(row)
                print(row, flush=True)
    return found


def errors(got: Tensors, exact: Tensors) -> dict[str, float]:
    """By output and gradient, relative to the greatest magnitude of the exact one."""
    return {
        name: ((got[name].double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
        for name, want in exact.items()
    }


def run_once(call: Callable, tensors: Tensors, dtype: torch.dtype, backend: str) -> Tensors:
    """Outputs by name, and the gradients of the inputs named hidden, weight, logits, in float64.

    The inputs are rounded to half precision first, so that every dtype is given the same numbers.
    """
    x = {}
    for name, tensor in tensors.items():
        if name in ("hidden", "weight", "ref_hidden", "ref_weight", "logits", "ref_logits"):
            tensor = tensor.bfloat16().half().to(dtype)
        elif tensor.is_floating_point() and dtype == torch.float64:
            tensor = tensor.double()
        x[name] = tensor.detach().clone().requires_grad_(name in ("hidden", "weight", "logits"))
    out = {name: value for name, value in call(x, backend).items() if value is not None}
    total = 0.0  # one backward: in place, it leaves nothing for a second
    for value in out.values():
        if value.requires_grad:
            shares = torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape).to(value.dtype)
            total = total + (value * (shares if value.dim() else 1.0)).sum()
    if isinstance(total, torch.Tensor):
        total.backward()
    gradients = {f"∂{name}": t.grad for name, t in x.items() if t.grad is not None}
    return {name: value.detach().double() for name, value in (out | gradients).items()}


def operators(device: torch.device, dry_run: bool) -> Iterator[tuple[str, str, Callable, Tensors]]:
    """(operator, label, call(inputs, backend) -> outputs by name, inputs) of everything that is checked."""
    batch, time_, dim, vocab = (3, 12, 24, 203) if dry_run else (8, 125, 904, 50_257)
    x = with_reference(inputs(batch * time_, dim, vocab, torch.float32, device))
    with torch.no_grad():
        now = fastppo.linear_logprob(x["hidden"], x["weight"], x["targets"], backend="reference").logprobs
    noise = torch.randn(2, batch * time_, device=device) * 0.2
    x |= {"old": now + noise[0], "ref": now + noise[1], "mask": torch.rand(batch * time_, device=device) < 0.8}
    flat = ("targets", "old", "advantages", "ref", "mask")
    x = {k: v.detach().view(batch, time_, -1) if k in ("hidden", "ref_hidden") else v.detach() for k, v in x.items()}
    x |= {k: x[k].view(batch, time_) for k in flat}

    def logprob(x: Tensors, backend: str, **options) -> Tensors:
        targets = x["targets"].masked_fill(~x["mask"], -100)
        return fastppo.linear_logprob(
            x["hidden"], x["weight"], targets, return_entropy=True, backend=backend, **options
        )._asdict()

    for options in ({}, {"temperature": 0.7, "logit_scale": 0.5, "softcap": 20.0}):
        head = {k: x[k] for k in ("hidden", "weight", "targets", "mask")}
        yield "linear_logprob", f"linear_logprob {options or ''}".strip(), bind(logprob, options), head

    def kl(x: Tensors, backend: str, kind: str) -> Tensors:
        arguments = (x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"])
        return {"kl": fastppo.linear_kl(*arguments, kind=kind, mask=x["mask"], backend=backend)}

    for kind in ("reverse", "forward", "jsd"):
        heads = {k: x[k] for k in ("hidden", "weight", "ref_hidden", "ref_weight", "mask")}
        yield "linear_kl", f"linear_kl {kind}", bind(kl, {"kind": kind}), heads

    def loss(x: Tensors, backend: str, budget: int | None = None, **options) -> Tensors:
        if options.get("kl_estimator") == "exact":
            options |= {k: x[k] for k in ("ref_hidden", "ref_weight")}
        elif "kl_coef" in options:
            options |= {"ref_logprobs": x["ref"]}
        arguments = (x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"])
        with fastppo.scratch_budget(budget or 2**26):
            out = fastppo.linear_ppo_loss(*arguments, mask=x["mask"], backend=backend, **options)
        return {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy}

    for options in LOSSES:
        yield "linear_ppo_loss", f"linear_ppo_loss {options}", bind(loss, options), x

    z, ref_z = ((x[h] @ x[w].t()) for h, w in (("hidden", "weight"), ("ref_hidden", "ref_weight")))
    logits = {"logits": z, "ref_logits": ref_z, **{k: x[k] for k in flat}}

    def selective(x: Tensors, backend: str, **options) -> Tensors:
        targets = x["targets"].masked_fill(~x["mask"], -100)
        return fastppo.selective_logprob(
            x["logits"] * 1.0, targets, return_entropy=True, backend=backend, **options
        )._asdict()

    def from_logits(x: Tensors, backend: str, **options) -> Tensors:
        given = {"ref_logits": x["ref_logits"]} if options.get("kl_estimator") == "exact" else {}
        out = fastppo.ppo_loss(
            x["old"], x["advantages"], logits=x["logits"] * 1.0, targets=x["targets"], mask=x["mask"], backend=backend,
            **given, **options,
        )  # fmt: skip
        return {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy}

    for options in ({}, {"inplace_backward": True}):
        yield "selective_logprob", f"selective_logprob {options or ''}".strip(), bind(selective, options), logits
    for options in ({"entropy_coef": 0.02}, {"kl_coef": 0.2, "kl_estimator": "exact", "inplace_backward": True}):
        yield "ppo_loss", f"ppo_loss {options}", bind(from_logits, options), logits

    def gae(x: Tensors, backend: str, **options) -> Tensors:
        arguments = {k: x[k] for k in ("mask", "dones", "bootstrap", "cu_seqlens") if k in x}
        return fastppo.gae(
            x["rewards"], x["values"], gamma=0.99, lam=0.95, backend=backend, **arguments, **options
        )._asdict()

    rows, length = (3, 40) if dry_run else (64, 3000)
    tokens = {k: torch.randn(rows, length, device=device) for k in ("rewards", "values")}
    mask, dones = torch.rand(rows, length, device=device) < 0.9, torch.rand(rows, length, device=device) < 0.01
    padded = {**tokens, "mask": mask, "dones": dones, "bootstrap": torch.randn(rows, device=device)}
    ends = torch.arange(rows + 1, device=device) * length
    packed = {k: v if k == "bootstrap" else v.flatten() for k, v in padded.items()} | {"cu_seqlens": ends}
    for label, tensors in (("padded", padded), ("packed", packed)):
        for options in ({}, {"whiten": True}):
            yield "gae", f"gae {label} {options or ''}".strip(), bind(gae, options), tensors

    directions = {"d_hidden": torch.randn_like(x["hidden"]), "d_weight": torch.randn_like(x["weight"])}

    def fisher(x: Tensors, backend: str) -> Tensors:
        d_hidden, d_weight = (x[f"d_{k}"].to(x[k].dtype) for k in ("hidden", "weight"))
        out = fastppo.fisher_vector_product(
            x["hidden"], x["weight"], d_hidden, d_weight, mask=x["mask"], backend=backend
        )
        return {"F hidden": out.hidden, "F weight": out.weight}

    heads = {k: x[k] for k in ("hidden", "weight", "mask")} | directions
    yield "fisher_vector_product", "fisher_vector_product", fisher, heads


LOSSES = [
    {"clip_low": 0.1, "clip_high": 0.3},
    {"entropy_coef": 0.02, "dual_clip": 1.5, "loss_agg": "seq-mean-token-mean"},
    {"entropy_coef": 0.02, "budget": WHOLE_ROWS_BUDGET},
    {"kl_coef": 0.2, "kl_estimator": "k3", "loss_agg": "seq-mean-token-sum-norm"},
    {"kl_coef": 0.2, "kl_estimator": "exact", "entropy_coef": 0.02},
    {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean", "budget": WHOLE_ROWS_BUDGET},
]


def bind(call: Callable, options: dict) -> Callable:
    return lambda *arguments: call(*arguments, **options)


# ---- times ----------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> dict[str, float]:
    """Bandwidth of a copy (read and write both counted) and the rate of a large bfloat16 product."""
    size = 64 if bench.dry_run else 8192
    source = torch.empty(size * size * 4, dtype=torch.int8, device=bench.device)
    to = torch.empty_like(source)
    copy = bench.milliseconds(lambda: to.copy_(source))
    a, b = torch.randn(2, size, size, device=bench.device).bfloat16()
    product = bench.milliseconds(lambda: a @ b)
    return {"gb_per_s": 2 * source.numel() / copy / 1e6, "tflops": 2 * size**3 / product / 1e9}


def product_floor(bench: Bench, tokens: int, dim: int, vocab: int) -> tuple[float, float]:
    """Milliseconds of hidden weightᵀ alone, and of a loss's three products; columns at a time where N · V is large."""
    width = max(1, min(vocab, 2**30 // tokens))
    hidden, weight = (torch.randn(n, dim, device=bench.device).bfloat16() for n in (tokens, width))
    logits = torch.empty(tokens, width, dtype=torch.bfloat16, device=bench.device)
    share = vocab / width
    one = bench.milliseconds(lambda: torch.mm(hidden, weight.t(), out=logits)) * share
    two = bench.milliseconds(lambda: (torch.mm(logits, weight), torch.mm(logits.t(), hidden))) * share
    return one, one + two


def naive_loss(hidden, weight, targets, old, advantages) -> torch.Tensor:
    """The loss with entropy as one writes it down, for torch.compile."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    ratio = (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - old).exp()
    surrogate = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    return (surrogate + 0.01 * (log_p.exp() * log_p).sum(-1)).mean()


def naive_statistics(hidden, weight, targets) -> tuple[torch.Tensor, torch.Tensor]:
    out = reference.logprob(
        reference.logits(hidden, weight, None, LogitTransform(), torch.ones_like(targets, dtype=torch.bool)),
        targets,
        return_entropy=True,
    )
    return out.logprobs, out.entropy


def vocabulary_operators(bench: Bench, models: dict[str, tuple[int, int]], token_counts: list[int], only: str) -> None:
    """Forward-only statistics, statistics with gradients, divergences and the loss, from hidden states."""
    for (model, (dim, vocab)), tokens in itertools.product(models.items(), token_counts):
        case = f"{model}, {tokens} tokens"
        x = with_reference(inputs(tokens, dim, vocab, torch.bfloat16, bench.device))
        one, three = product_floor(bench, tokens, dim, vocab)
        calls = {} if bench.dry_run else compiled(x, one, three)  # the compiler takes a minute and proves nothing there
        for backend in usable_backends("linear_logprob", bench.device, torch.bfloat16):
            calls |= from_hidden(x, backend, one, three)
        for name, (floor, call) in calls.items():
            if only in name:
                bench.add(case, name, floor, functools.partial(lambda call: call, call))
        for op, floor, others in (
            ("linear_ppo_loss linear_logprob", three, peers.log_probs(x)),
            ("linear_kl", three + one, peers.divergence(x)),
        ):
            if only in op:
                for name, make in others.items():
                    bench.add(case, name, floor, make)


def from_hidden(x: Tensors, backend: str, one: float, three: float) -> dict[str, tuple[float, Callable]]:
    """Operator and backend -> (floor in ms, call)."""
    hidden, weight, targets, old, advantages = (x[k] for k in ("hidden", "weight", "targets", "old", "advantages"))
    frozen, ref = (hidden.detach(), weight.detach()), (x["ref_hidden"], x["ref_weight"])

    def logprob() -> torch.Tensor:
        out = fastppo.linear_logprob(hidden, weight, targets, return_entropy=True, backend=backend)
        return (advantages * out.logprobs).sum() + 0.01 * out.entropy.sum()

    def loss(budget: int | None = None, **options) -> torch.Tensor:
        with fastppo.scratch_budget(budget or scratch_bytes(hidden.device)):
            out = fastppo.linear_ppo_loss(
                hidden, weight, targets, old, advantages, entropy_coef=0.01, backend=backend, **options
            )
        return out.loss

    exact = {"kl_coef": 0.1, "kl_estimator": "exact", "ref_hidden": ref[0], "ref_weight": ref[1]}
    calls = {
        "linear_logprob forward": (
            one,
            lambda: fastppo.linear_logprob(*frozen, targets, return_entropy=True, backend=backend),
        ),
        "linear_logprob with gradients": (three, peers.step(x, logprob)),
        **{
            f"linear_kl {kind} forward": (
                2 * one,
                functools.partial(fastppo.linear_kl, *frozen, *ref, kind=kind, backend=backend),
            )
            for kind in ("reverse", "forward", "jsd")
        },
        "linear_kl reverse with gradients": (
            three + one,
            peers.step(x, lambda: fastppo.linear_kl(hidden, weight, *ref, backend=backend).mean()),
        ),
        "linear_ppo_loss": (three, peers.step(x, loss)),
        "linear_ppo_loss with exact KL": (three + one, peers.step(x, lambda: loss(**exact))),
    }
    if backend == "triton":
        gib = WHOLE_ROWS_BUDGET / 2**30
        calls[f"linear_ppo_loss in {gib:.0f} GiB"] = (three, peers.step(x, lambda: loss(WHOLE_ROWS_BUDGET)))
        calls["linear_ppo_loss filtered at 1e-4"] = (three, peers.step(x, lambda: loss(filter_mass=1e-4)))
    if backend in BACKENDS["fisher_vector_product"]:
        directions = [torch.randn_like(t) for t in frozen]
        calls["fisher_vector_product"] = (
            2 * one + three,
            lambda: fastppo.fisher_vector_product(*frozen, *directions, backend=backend),
        )
    return {f"{name}, {backend}": call for name, call in calls.items()}


def compiled(x: Tensors, one: float, three: float) -> dict[str, tuple[float, Callable]]:
    """torch.compile of the naive path."""
    arguments = [x[k] for k in ("hidden", "weight", "targets", "old", "advantages")]
    loss, statistics = torch.compile(naive_loss), torch.compile(naive_statistics)

    @torch.no_grad()
    def forward() -> object:
        return statistics(*arguments[:3])

    return {
        "linear_logprob forward, torch.compile of naive": (one, forward),
        "linear_ppo_loss, torch.compile of naive": (three, peers.step(x, lambda: loss(*arguments))),
    }


def logits_operators(bench: Bench, gb_per_s: float, only: str) -> None:
    tokens, vocab = (19, 203) if bench.dry_run else (8192, 128_256)
    case = f"logits [{tokens}, {vocab}] bfloat16"
    model = floors(tokens, 1, vocab)
    floor = {k: 1e3 * model[f"selective_logprob, {k}"].bytes / (gb_per_s * 1e9) for k in ("forward", "backward")}
    logits = torch.randn(tokens, vocab, device=bench.device).bfloat16()
    x = inputs(tokens, 1, vocab, torch.float32, bench.device)

    def step(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        leaf = logits.detach().requires_grad_()

        def run() -> None:
            leaf.grad = None
            call(leaf).backward()

        return run

    for backend in usable_backends("selective_logprob", bench.device, torch.bfloat16):

        def statistics(z: torch.Tensor, backend=backend):
            return fastppo.selective_logprob(z, x["targets"], return_entropy=True, backend=backend)

        def sums(z: torch.Tensor, statistics=statistics) -> torch.Tensor:
            out = statistics(z)
            return out.logprobs.sum() + out.entropy.sum()

        def loss(z: torch.Tensor, backend=backend) -> torch.Tensor:
            return fastppo.ppo_loss(
                x["old"], x["advantages"], logits=z, targets=x["targets"], entropy_coef=0.01, backend=backend
            ).loss

        for name, bound, call in (
            ("selective_logprob forward", floor["forward"], lambda f=statistics: f(logits)),
            ("selective_logprob with gradients", sum(floor.values()), step(sums)),
            ("ppo_loss from logits", sum(floor.values()), step(loss)),
        ):
            if only in name:
                bench.add(case, f"{name}, {backend}", bound, lambda call=call: call)


def gae_operator(bench: Bench, gb_per_s: float) -> None:
    for batch, length in [(3, 40)] if bench.dry_run else GAE_SHAPES:
        rewards, values = torch.randn(2, batch, length, device=bench.device)
        case, floor = f"gae [{batch}, {length}] float32", {}
        for name in ("gae", "gae whitened"):
            floor[name] = 1e3 * floors(batch * length, 1, 1)[name].bytes / (gb_per_s * 1e9)
        for backend in usable_backends("gae", bench.device, torch.float32):
            if backend == "reference" and length > 4096:
                continue  # a loop over a million tokens
            for name, whiten in (("gae", False), ("gae whitened", True)):

                def run(backend=backend, rewards=rewards, values=values, whiten=whiten):
                    return fastppo.gae(rewards, values, gamma=0.99, lam=0.95, whiten=whiten, backend=backend)

                bench.add(case, f"{name}, {backend}", floor[name], lambda run=run: run)
        for name, make in peers.advantages(rewards, values).items():
            bench.add(case, name, floor["gae"], make)


def format_row(row: dict) -> str:
    if "error" in row:
        return f"| {row['case']} | {row['name']} | {row['error']} | | | |"
    extra = f"{row['extra_mib']:.0f}" if "extra_mib" in row else ""
    return f"| {row['case']} | {row['name']} | {row['ms']:.3f} | {row['floor_ms']:.3f} | {row['ratio']:.2f} | {extra} |"


def markdown(report: dict) -> str:
    lines = [f"{report['device']}, PyTorch {report['torch']}, Triton {report['triton']}, {report['ceilings']}", ""]
    lines += ["| operator | dtype | backend | greatest error | naive |", "|---|---|---|---|---|"]
    for row in report["correctness"]:
        cells = [row["operator"], row["dtype"], row["backend"]]
        if "failed" in row:
            cells += [row["failed"], ""]
        else:
            cells += [f"{max(row[k].values()):.1e}" for k in ("errors", "naive")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| case | name | ms | floor, ms | ratio | extra MiB |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(format_row, report["rows"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the times mean nothing")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--only", default="", help="only operators whose name contains this")
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("there is no GPU here; --dry-run shows that the script runs")
    device = torch.device("cpu" if options.dry_run else "cuda")
    bench = Bench(device, options.dry_run)
    report = {
        "device": "dry run on a CPU" if options.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "correctness": correctness(device, options.dry_run),
        "ceilings": ceilings(bench),
    }
    print(report["ceilings"], flush=True)
    models = {"tiny": (24, 203)} if options.dry_run else {name: MODELS[name] for name in options.models}
    vocabulary_operators(bench, models, [37] if options.dry_run else options.tokens, options.only)
    logits_operators(bench, report["ceilings"]["gb_per_s"], options.only)
    if options.only in "gae":
        gae_operator(bench, report["ceilings"]["gb_per_s"])
    report["rows"] = bench.rows
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
        (options.out / "gpu.md").write_text(markdown(report))


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


if __name__ == "__main__":
    main()
