"""The operators on one GPU: correctness against float64 first, then the machine's ceilings, then times against them.

    PYTHONPATH=.:kernels python benchmarks/gpu.py --out results/        measures everything, writes gpu.json and gpu.md
    PYTHONPATH=.:kernels python benchmarks/gpu.py --dry-run             tiny sizes on the CPU: does it run at all

Needs no network. A time is the median of several runs with a cold L2, by CUDA events; the floor of a case is what the
plain matrix products (or a copy of as many bytes) take in the same run. Peers are timed where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from roofline import MODELS, floors

import fastppo
from fastppo.ops.dispatch import BACKENDS, unusable

TOKENS = [1024, 8192, 32768]
GAE_SHAPES = [(1, 1_000_000), (512, 4096), (4096, 1024), (32768, 32)]


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


def inputs(tokens: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return {
        "hidden": normal(tokens, dim).to(dtype).requires_grad_(),
        "weight": (normal(vocab, dim) / dim**0.5).to(dtype).requires_grad_(),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator, device=device),
        "old": -torch.rand(tokens, generator=generator, device=device) * 3 - 9,
        "advantages": normal(tokens),
    }


def loss_of(x: dict[str, torch.Tensor], backend: str) -> Callable[[], None]:
    """One training step of the loss, with entropy."""

    def run() -> None:
        x["hidden"].grad = x["weight"].grad = None
        fastppo.linear_ppo_loss(
            x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"], entropy_coef=0.01, backend=backend
        ).loss.backward()

    return run


def correctness(device: torch.device, dry_run: bool) -> list[dict]:
    """Each backend's largest error against float64, beside the naive path's, for values and gradients."""
    found = []
    sizes = (37, 24, 203) if dry_run else (1000, 904, 50_257)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = None
        for backend in ("reference in float64", *usable_backends("linear_logprob", device, dtype)):
            x = inputs(*sizes, dtype, device)
            if exact is None:
                x |= {k: x[k].detach().double().requires_grad_() for k in ("hidden", "weight")}
            out = fastppo.linear_logprob(
                x["hidden"], x["weight"], x["targets"], return_entropy=True, backend=backend.split()[0]
            )
            (x["advantages"] * (out.logprobs + 0.1 * out.entropy)).sum().backward()
            got = [out.logprobs, out.entropy, x["hidden"].grad, x["weight"].grad]
            if exact is None:
                exact = [t.detach().double() for t in got]
                continue
            errors = [((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, exact, strict=True)]
            names = ("logprobs", "entropy", "d_hidden", "d_weight")
            found.append({"dtype": str(dtype), "backend": backend, **dict(zip(names, errors, strict=True))})
            print(found[-1], flush=True)
    return found


def ceilings(bench: Bench) -> dict[str, float]:
    """Bandwidth of a copy (read and write both counted) and the rate of a large bfloat16 product."""
    size = 64 if bench.dry_run else 8192
    source = torch.empty(size * size * 4, dtype=torch.int8, device=bench.device)
    to = torch.empty_like(source)
    copy = bench.milliseconds(lambda: to.copy_(source))
    a, b = torch.randn(2, size, size, device=bench.device).bfloat16()
    product = bench.milliseconds(lambda: a @ b)
    return {"gb_per_s": 2 * source.numel() / copy / 1e6, "tflops": 2 * size**3 / product / 1e9}


def vocabulary_operators(bench: Bench) -> None:
    models = {"tiny": (24, 203)} if bench.dry_run else MODELS
    for model, (dim, vocab) in models.items():
        for tokens in [37] if bench.dry_run else TOKENS:
            case = f"{model}, {tokens} tokens"
            x = inputs(tokens, dim, vocab, torch.bfloat16, bench.device)
            hidden, weight, targets = x["hidden"].detach(), x["weight"].detach(), x["targets"]
            one, three = product_floor(bench, tokens, dim, vocab)
            for backend in usable_backends("linear_logprob", bench.device, torch.bfloat16):

                def forward(backend=backend, hidden=hidden, weight=weight, targets=targets):
                    return lambda: fastppo.linear_logprob(hidden, weight, targets, return_entropy=True, backend=backend)

                bench.add(case, f"linear_logprob forward, {backend}", one, forward)
                bench.add(case, f"linear_ppo_loss, {backend}", three, lambda b=backend, x=x: loss_of(x, b))
            for name, make in peers(x).items():
                bench.add(case, name, three, make)


def product_floor(bench: Bench, tokens: int, dim: int, vocab: int) -> tuple[float, float]:
    """Milliseconds of hidden weightᵀ alone, and of a loss's three products; columns at a time where N · V is large."""
    width = max(1, min(vocab, 2**30 // tokens))
    hidden, weight = (torch.randn(n, dim, device=bench.device).bfloat16() for n in (tokens, width))
    logits = torch.empty(tokens, width, dtype=torch.bfloat16, device=bench.device)
    share = vocab / width
    one = bench.milliseconds(lambda: torch.mm(hidden, weight.t(), out=logits)) * share
    two = bench.milliseconds(lambda: (torch.mm(logits, weight), torch.mm(logits.t(), hidden))) * share
    return one, one + two


def peers(x: dict[str, torch.Tensor]) -> dict[str, Callable[[], Callable[[], object]]]:
    """Other projects' kernels, where installed: they compute the cross-entropy alone, a part of the loss."""
    found = {}

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            x["hidden"].grad = x["weight"].grad = None
            loss().backward()

        return run

    if importlib.util.find_spec("liger_kernel"):

        def liger():
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            function = LigerFusedLinearCrossEntropyLoss()
            return step(lambda: function(x["weight"], x["hidden"], x["targets"]))

        found["peer: Liger, cross-entropy only"] = liger
    if importlib.util.find_spec("cut_cross_entropy"):

        def cce():
            from cut_cross_entropy import linear_cross_entropy

            return step(lambda: linear_cross_entropy(x["hidden"], x["weight"], x["targets"]))

        found["peer: cut-cross-entropy, cross-entropy only"] = cce
    if importlib.util.find_spec("quack"):

        def quack():
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            return step(lambda: chunked_linear_cross_entropy(x["hidden"], x["weight"], x["targets"]))

        found["peer: QuACK, cross-entropy only"] = quack
    return found


def logits_operators(bench: Bench, gb_per_s: float) -> None:
    tokens, vocab = (19, 203) if bench.dry_run else (8192, 128_256)
    case = f"logits [{tokens}, {vocab}] bfloat16"
    model = floors(tokens, 1, vocab)
    floor = {k: 1e3 * model[f"selective_logprob, {k}"].bytes / (gb_per_s * 1e9) for k in ("forward", "backward")}
    logits = torch.randn(tokens, vocab, device=bench.device).bfloat16()
    targets = torch.randint(0, vocab, (tokens,), device=bench.device)
    for backend in usable_backends("selective_logprob", bench.device, torch.bfloat16):

        def forward(backend=backend):
            return lambda: fastppo.selective_logprob(logits, targets, return_entropy=True, backend=backend)

        def both(backend=backend):
            leaf = logits.detach().requires_grad_()

            def run():
                leaf.grad = None
                out = fastppo.selective_logprob(leaf, targets, return_entropy=True, backend=backend)
                (out.logprobs.sum() + out.entropy.sum()).backward()

            return run

        bench.add(case, f"selective_logprob forward, {backend}", floor["forward"], forward)
        bench.add(case, f"selective_logprob both, {backend}", sum(floor.values()), both)


def gae_operator(bench: Bench, gb_per_s: float) -> None:
    for batch, length in [(3, 40)] if bench.dry_run else GAE_SHAPES:
        rewards, values = torch.randn(2, batch, length, device=bench.device)
        floor = 1e3 * floors(batch * length, 1, 1)["gae"].bytes / (gb_per_s * 1e9)
        for backend in usable_backends("gae", bench.device, torch.float32):
            if backend == "reference" and length > 4096:
                continue  # a loop over a million tokens

            def run(backend=backend, rewards=rewards, values=values):
                return lambda: fastppo.gae(rewards, values, gamma=0.99, lam=0.95, backend=backend)

            bench.add(f"gae [{batch}, {length}] float32", backend, floor, run)


def format_row(row: dict) -> str:
    if "error" in row:
        return f"| {row['case']} | {row['name']} | {row['error']} | | | |"
    extra = f"{row['extra_mib']:.0f}" if "extra_mib" in row else ""
    return f"| {row['case']} | {row['name']} | {row['ms']:.3f} | {row['floor_ms']:.3f} | {row['ratio']:.2f} | {extra} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the times mean nothing")
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("there is no GPU here; --dry-run shows that the script runs")
    device = torch.device("cpu" if options.dry_run else "cuda")
    bench = Bench(device, options.dry_run)
    report = {
        "device": "dry run on a CPU" if options.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "correctness": correctness(device, options.dry_run),
        "ceilings": ceilings(bench),
    }
    print(report["ceilings"], flush=True)
    vocabulary_operators(bench)
    logits_operators(bench, report["ceilings"]["gb_per_s"])
    gae_operator(bench, report["ceilings"]["gb_per_s"])
    report["rows"] = bench.rows
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
        head = "| case | name | ms | floor, ms | ratio | extra MiB |\n|---|---|---|---|---|---|"
        text = "\n".join([f"{report['device']}, {report['ceilings']}\n", head, *map(format_row, bench.rows)])
        (options.out / "gpu.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
