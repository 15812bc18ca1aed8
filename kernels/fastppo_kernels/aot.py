"""`python -m fastppo_kernels.aot`: every kernel compiled to machine code, for chips that are not there, and inspected.

Three kinds of specializations are compiled, by whatever Triton this runs under, as its just-in-time compiler would:
each entry of `configs.GEMM`, launched by `tune.runs`; what the package's public functions launch on meta tensors of
real shapes (`aot_cases`); and the tuner's candidates (`tune.candidates`; those of sm_90 alone without --all).

For each the table shows registers, spills (local memory), shared memory against the chip's limit, tensor-core
instructions, 16-byte loads, and the instructions outside of the matrix loop for each logit.

Exit status 1 where compilation fails, on a spill, on shared or tensor memory over the limit, on a GEMM that asked for
tensor cores and has no instruction of theirs, or that never loads 16 bytes at a time, on a kernel that computes in
float64 and is not meant to, on a kernel that exceeds its budget in budgets.json by more than a tenth, and on a
candidate that is not clean.

`--write-budgets` measures the budgets anew and keeps of `tune.PROPOSALS` the candidates that compile clean, those of
sm_90 or with --all of every chip. Run it under each Triton that budgets.json names. Compiled kernels are kept in
Triton's cache, in the folder that TRITON_CACHE_DIR names.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

if importlib.util.find_spec("triton") is None and __name__ == "__main__":
    sys.exit("fastppo_kernels.aot: the compiler, triton, is not installed; pip install triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import native_specialize_impl

from fastppo_kernels import aot_cases, budgets, machine_code, tune
from fastppo_kernels.configs import GEMM, Gemm
from fastppo_kernels.launch import INTERPRETED, recording
from fastppo_kernels.machine_code import Counts

# Shared memory a block may have, in bytes (CUDA C++ Programming Guide, table of compute capabilities). sm_80's entries
# also serve sm_86, sm_89 and sm_120, which have 99 KiB.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
# Elsewhere float64 comes about by accident, as in Triton 3.6 from a constant below the normal float32, and is slow.
FLOAT64 = ("fastppo_kernels.gae:gae_moments_kernel",)
CANDIDATES_ALWAYS = "sm_90"  # the chips that the tuner meets first


class Launch(NamedTuple):
    """One kernel in one specialization.

    Attributes:
        name: of an entry in configs.GEMM where it has one, else of the function.
        case: what it is compiled for: the entry's precision, a case of `aot_cases`, or "candidate".
        kernel: module:function, so that a worker process can find it.
        budget: its key in budgets.json, or "" for what is held to none.
    """

    arch: str
    name: str
    case: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, str], ...]
    options: tuple[tuple[str, int], ...]
    budget: str = ""

    @property
    def is_gemm(self) -> bool:
        return "BLOCK_K" in dict(self.constants)

    @property
    def wants_tensor_core(self) -> bool:
        """Whether there are products, other than those in true float32, which have no tensor-core instruction."""
        half = any("bf16" in kind or "fp16" in kind for _, kind in self.signature)
        return self.is_gemm and (half or dict(self.constants).get("PRECISION") != "ieee")

    @property
    def tile(self) -> int:
        """Logits a program works on at one time."""
        constants = dict(self.constants)
        return math.prod(constants.get(k, 1) for k in ("BLOCK_M", "BLOCK_N"))


class Report(NamedTuple):
    """What the compiler made of a launch; counts only where it is to be held to a budget."""

    launch: Launch
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory: int = 0
    tensor_core: str = "-"
    wide_loads: bool = False
    float64: bool = False
    counts: Counts | None = None
    error: str = ""

    def a_logit(self, instructions: int) -> float:
        """Instructions a thread executes once for each tile -> instructions for each logit of it."""
        return instructions * 32 * dict(self.launch.options).get("num_warps", 4) / self.launch.tile

    def measured(self) -> dict[str, int]:
        """What a budget limits."""
        return {"registers": self.registers, "shared": self.shared_bytes, **self.counts._asdict()}

    def failures(self) -> list[str]:
        if self.error:
            return [self.error]
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        limit = SHARED_LIMIT[self.launch.arch]
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, the chip has {limit}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory} columns of tensor memory, the chip has {TENSOR_MEMORY_COLUMNS}")
        if self.launch.wants_tensor_core and self.tensor_core == "-":
            found.append(f"no {TENSOR_CORE[self.launch.arch]}")
        if self.launch.is_gemm and not self.wide_loads:
            found.append("no 16-byte loads")
        if self.float64 and self.launch.kernel not in FLOAT64:
            found.append("computes in float64")
        return found


def specialize(arch: str, name: str, case: str, kernel, arguments: tuple, options: dict[str, Any]) -> Launch:
    """What the just-in-time compiler would make of these arguments."""
    backend = make_backend(target(arch))
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value, kind, key = named[parameter.name], "constexpr", None
        if not parameter.is_constexpr:
            kind, key = native_specialize_impl(
                backend,
                value,
                parameter.is_const,
                not parameter.do_not_specialize,
                not parameter.do_not_specialize_on_alignment,
            )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif key:
            attributes.append((position, key))
    return Launch(
        arch,
        name or kernel.fn.__name__.removesuffix("_kernel"),
        case,
        f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(attributes),
        tuple((k, v) for k, v in options.items() if k not in kernel.arg_names),
    )


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def recorded(arch: str, case: str, run: Callable[[], object], name: str = "") -> list[Launch]:
    """What `run` would launch; where it runs the kernel of a GEMM entry, `name`, only that kernel."""
    found = []

    def record(kernel, arguments, options) -> None:
        found.append(specialize(arch, name, case, kernel, arguments, dict(options)))

    with recording(arch, record):
        run()
    return [launch for launch in found if launch.is_gemm] if name else found


def shipped(architectures: Iterable[str]) -> list[Launch]:
    """Every distinct specialization of the entries of configs.GEMM, then of the cases.

    Each entry has a budget, and each kernel without products in the first specialization that comes along.
    """
    launches = []
    for arch in architectures:
        for kernel in GEMM:
            for precision in precisions(kernel, arch):
                found = entry(kernel, arch, precision)
                launches += [launch._replace(budget=f"{kernel} {precision}") for launch in found]
        seen = set()
        for case, run in aot_cases.cases():
            for launch in recorded(arch, case, run):
                first = not launch.is_gemm and launch.name not in seen
                launches.append(launch._replace(budget=launch.name if first else ""))
                seen.add(launch.name)
    return distinct(launches)


def precisions(kernel: str, arch: str) -> list[str]:
    return [precision for precision in tune.PRECISIONS if (arch, precision) in GEMM[kernel]]


def entry(kernel: str, arch: str, precision: str, case: str = "", config: Gemm | None = None) -> list[Launch]:
    """The launch of an entry of configs.GEMM, with `config` in its place where given."""
    config = config or GEMM[kernel][arch, precision]
    with tune.entry_replaced(kernel, arch, precision, config):
        return recorded(arch, case or precision, lambda: tune.run_on_meta(kernel, precision), kernel)


def candidates(architectures: Iterable[str], of: Callable[[str, str, str], Iterable[Gemm]]) -> dict[tuple, list]:
    """{(kernel, architecture, precision, configuration): launches} of of(kernel, architecture, precision)."""
    return {
        (kernel, arch, precision, config): entry(kernel, arch, precision, "candidate", config)
        for arch in architectures
        for kernel in GEMM
        for precision in precisions(kernel, arch)
        for config in of(kernel, arch, precision)
        if config != GEMM[kernel][arch, precision]
    }


def specialization(launch: Launch) -> Launch:
    """What two launches have in common that are compiled to the same thing, but for a constant in index arithmetic."""
    constants = tuple((name, value) for name, value in launch.constants if name != "GROUP_M")
    return launch._replace(name="", case="", budget="", constants=constants)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Those that are compiled to the same thing once, under the first name."""
    found: dict[Launch, Launch] = {}
    for launch in launches:
        found.setdefault(specialization(launch), launch)
    return list(found.values())


def compile_launch(launch: Launch) -> Report:
    module, name = launch.kernel.split(":")
    kernel = getattr(__import__(module, fromlist=[name]), name)
    chip = target(launch.arch)
    attributes = {(position,): make_backend(chip).parse_attr(key) for position, key in launch.attributes}
    source = ASTSource(kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attributes)
    try:
        compiled = triton.compile(source, target=chip, options=dict(launch.options))
    except Exception as error:
        return Report(launch, error=f"{type(error).__name__}: {str(error).strip()[:300]}")
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    registers, local = machine_code.resources(cubin)
    wide = r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg[^;]*0x10|cp\.async\.bulk"
    return Report(
        launch,
        registers,
        local,
        compiled.metadata.shared,
        compiled.metadata.tmem_size,
        next((word for word in ("tcgen05.mma", "wgmma", "mma.sync") if word in ptx), "-"),
        re.search(wide, ptx) is not None,
        re.search(r"\.f64\b", ptx) is not None,
        machine_code.count(cubin) if launch.budget else None,
    )


def over_budget(report: Report) -> list[str]:
    return budgets.excess(report.launch.arch, report.launch.budget, report.measured())


def compile_all(launches: list[Launch], jobs: int) -> list[Report]:
    """In worker processes, the largest tiles first; a worker that the compiler takes down is replaced."""
    order = sorted(range(len(launches)), key=lambda i: -launches[i].tile)
    workers = threading.local()

    def one(launch: Launch) -> Report:
        worker = workers.__dict__.setdefault("worker", None) or Worker()
        workers.worker = worker
        try:
            return worker.compile(launch)
        except EOFError:
            workers.worker = None
            return Report(launch, error="the compiler aborted")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        reports = dict(zip(order, pool.map(one, (launches[i] for i in order)), strict=True))
    return [reports[i] for i in range(len(launches))]


class Worker:
    """A process that compiles. Triton's compiler ends its process on an assertion, and prints whole modules."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs,), daemon=True).start()
        theirs.close()

    def compile(self, launch: Launch) -> Report:
        self.connection.send(launch)
        return self.connection.recv()


def serve(connection) -> None:
    with tempfile.TemporaryFile() as log, contextlib.suppress(EOFError):
        os.dup2(log.fileno(), 2)
        while True:
            log.truncate(0)
            log.seek(0)
            report = compile_launch(connection.recv())
            log.seek(0)
            reason = re.search(r"error: (.*)", log.read().decode(errors="replace"))
            if report.error and reason:
                report = report._replace(error=reason[1][:300])
            connection.send(report)


def describe(launch: Launch) -> str:
    """The tile, where the kernel has one."""
    constants = dict(launch.constants)
    sizes = "×".join(str(constants[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK") if k in constants)
    options = dict(launch.options)
    return f"{sizes} w{options.get('num_warps', 4)} s{options.get('num_stages', 3)}"


def table(reports: list[Report], failures: list[list[str]]) -> str:
    head = [
        "arch", "kernel", "case", "tile", "regs", "spill B", "shared B", "tensor core", "products", "loop", "other",
        "other a logit", "MUFU a logit", "16 B loads", "",
    ]  # fmt: skip
    rows = []
    for report, found in zip(reports, failures, strict=True):
        launch, counts = report.launch, ["", "", "", "", ""]
        if report.counts:
            counts = [str(n) for n in report.counts[:3]]
            a_logit = [f"{report.a_logit(n):.1f}" for n in (report.counts.other, report.counts.special)]
            counts += a_logit if launch.is_gemm else ["", ""]
        rows.append([
            launch.arch, launch.name, launch.case, describe(launch), str(report.registers), str(report.spill_bytes),
            str(report.shared_bytes), report.tensor_core, *counts, "yes" if report.wide_loads else "no",
            "; ".join(found) or "ok",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastppo_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--all", action="store_true", help=f"the candidates of every chip, not of {CANDIDATES_ALWAYS}")
    parser.add_argument("--write-budgets", action="store_true", help="measure budgets and choose candidates anew")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.write_budgets and options.kernel:
        parser.error("--write-budgets replaces the figures of all kernels: leave out --kernel")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: the compiler is not there to be asked")
    start = time.monotonic()
    tried = candidates(
        [arch for arch in options.arch if options.all or arch == CANDIDATES_ALWAYS],
        tune.proposals if options.write_budgets else tune.candidates,
    )
    launches = distinct([*shipped(options.arch), *(launch for found in tried.values() for launch in found)])
    launches = [x for x in launches if options.kernel in x.name or options.kernel in x.kernel]
    if not launches:
        parser.error(f"--kernel: no kernel's name contains {options.kernel!r}")
    reports = compile_all(launches, options.jobs)
    by_launch = {specialization(report.launch): report for report in reports}
    if options.write_budgets:
        clean = {
            key: not any(by_launch[specialization(x)].failures() for x in found if specialization(x) in by_launch)
            for key, found in tried.items()
        }
        budgets.write({(r.launch.arch, r.launch.budget): r.measured() for r in reports if r.counts}, clean)
    failures = [report.failures() or (over_budget(report) if report.counts else []) for report in reports]
    passed_over = [options.write_budgets and r.launch.case == "candidate" for r in reports]
    print(table(reports, failures))
    failed = sum(bool(found) and not over for found, over in zip(failures, passed_over, strict=True))
    chips, seconds = ", ".join(options.arch), time.monotonic() - start
    print(f"\n{len(reports)} kernels for {chips} by Triton {triton.__version__} in {seconds:.0f} s: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
