"""Time and peak memory of the PPO loss and of log-probs on a CPU: fastppo's backends, their floor and other projects.

    python benchmarks/cpu.py                                   # SmolLM2's head: 1,024 tokens, D 576, V 49,152, bfloat16
    python benchmarks/cpu.py --dim 2048 --dtype float32 --rounds 5
    python benchmarks/cpu.py --output benchmarks/results/cpu.json; python benchmarks/plot.py benchmarks/results/cpu.json

The floor is the plain matrix products alone: h Wᵀ, ∂zᵀ h and ∂z W, into preallocated memory. All contenders run once a
round, so that other load on the machine affects each of them. A turn is two calls, of which the second is timed: it
finds its own data in the caches, as in a loop of steps. The table has medians and their ratio to the floor. Memory is
the peak above what was resident before the call, including the previous call's gradients; it does not include scratch
that a backend keeps between calls, which is within its budget.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import peers
import torch
from arguments import count, output, run_script

import fastppo
from fastppo.engines import extension
from fastppo.engines.cpu import products

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=count, default=1024)
    parser.add_argument("--dim", type=count, default=576)
    parser.add_argument("--vocab", type=count, default=49152)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--only", help="comma-separated words: run the floors and contenders with one in their name")
    parser.add_argument("--output", type=output, help="write the results here as JSON")
    args = parser.parse_args()

    machine = describe_machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if machine["load_average"] > 0.5:
        print("other processes are at work on this machine: the ratios mean little")

    everything = contenders(args.tokens, args.dim, args.vocab, getattr(torch, args.dtype))
    words = ("product", *args.only.split(",")) if args.only else ("",)
    chosen = {name: call for name, call in everything.items() if any(word in name for word in words)}
    results = measure(chosen, args.rounds)
    machine["load_average_after"] = os.getloadavg()[0]
    print_table(results)

    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "only")}
        args.output.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1))


def contenders(n: int, d: int, v: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name -> one call. Names end in the pass they are measured against: loss or forward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=generator)
    advantages = torch.randn(n, generator=generator)
    with torch.no_grad():
        old = fastppo.linear_logprob(hidden, weight, targets).logprobs
    old = old + 0.05 * torch.randn(n, generator=generator)
    h, w = hidden.detach(), weight.detach()
    z, dh, dw = torch.empty(n, v, dtype=dtype), torch.empty_like(h), torch.empty_like(w)

    def three_products() -> None:
        torch.mm(h, w.t(), out=z)
        torch.mm(z.t(), h, out=dw)
        torch.mm(z, w, out=dh)

    def loss(backend: str, budget: int | None = None) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = weight.grad = None
            # By the environment: the end of `scratch_budget` would give the memory back before the call that is timed.
            with mock.patch.dict(os.environ, {"FASTPPO_SCRATCH_MB": str(budget / MIB)} if budget else {}):
                out = fastppo.linear_ppo_loss(
                    hidden, weight, targets, old, advantages, entropy_coef=0.01, backend=backend
                )
                out.loss.backward()

        return call

    def forward(backend: str) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return fastppo.linear_logprob(h, w, targets, return_entropy=True, backend=backend)

        return call

    def naive_loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - old).exp()
        surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return (surrogate - 0.01 * entropy).mean()

    compiled_loss = torch.compile(naive_loss)

    def compiled() -> None:
        hidden.grad = weight.grad = None
        compiled_loss(hidden, weight).backward()

    calls: dict[str, Callable[[], object]] = {
        "three products": three_products,
        "one product": lambda: torch.mm(h, w.t(), out=z),
        "naive, loss": loss("reference"),
        "torch.compile of naive, loss": compiled,
        "chunked, loss": loss("chunked"),
    }
    if extension.load() and products.PRODUCTS:
        calls |= {
            "cpu, loss": loss("cpu"),
            "cpu 64 MiB, loss": loss("cpu", 64 * MIB),
            "cpu, forward": forward("cpu"),
        }
    calls |= {"naive, forward": forward("reference"), "chunked, forward": forward("chunked")}
    inputs = {"hidden": hidden, "weight": weight, "targets": targets, "advantages": advantages, "old": old}
    return calls | peers_here(inputs)


def peers_here(inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Other projects' (peers.py) that are installed and run on a CPU. None has the whole loss: the label says what."""
    calls: dict[str, Callable[[], object]] = {}
    for label, make in peers.LOG_PROBS.items():
        try:
            call = make(inputs)
            call()
        except Exception as error:  # somebody else's code, which may want a GPU, a compiler, another package
            print(f"{label}: left out ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
        else:
            calls[f"peer: {label}"] = call
    return calls


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> list[dict]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    memory = {}
    for name, call in calls.items():  # warm up: compilation, first touches
        call()
        call()
        memory[name] = extra_memory(call)
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    results = []
    for name, seconds in times.items():
        floor = "one product" if name.endswith("forward") or name == "one product" else "three products"
        results.append(
            {
                "name": name,
                "median_s": median[name],
                "min_s": min(seconds),
                "floor": floor,
                "ratio": median[name] / median[floor] if floor in median else None,
                "extra_mib": memory[name],
            }
        )
    return results


def extra_memory(call: Callable[[], object]) -> float | None:
    """MiB that one call adds to the resident memory at its peak; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    reset.write_text("5")  # the peak starts anew
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024


def print_table(results: list[dict]) -> None:
    print(f"\n{'':52}{'median s':>10}{'min s':>10}{'/ floor':>9}{'peak + MiB':>12}")
    for r in results:
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else ""
        memory = f"{r['extra_mib']:.0f}" if r["extra_mib"] is not None else ""
        print(f"{r['name']:52}{r['median_s']:10.4f}{r['min_s']:10.4f}{ratio:>9}{memory:>12}")


def describe_machine() -> dict:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in info if ":" in line}
    flags = fields.get("flags", "").split()
    module = extension.load()
    return {
        "processor": fields.get("model name", platform.processor()),
        "features": " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastppo": fastppo.__version__ if hasattr(fastppo, "__version__") else "",
        "instruction set": module.instruction_sets()[0] if module else "extension not built",
        "products": " ".join(products.PRODUCTS),
        "load_average": os.getloadavg()[0],
    }


if __name__ == "__main__":
    run_script(main)
