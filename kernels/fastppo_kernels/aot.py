"""`python -m fastppo_kernels.aot`: every kernel compiled to machine code, for chips that are not there, and inspected.

The public functions of this package run on meta tensors of real shapes; what they would launch on each architecture is
recorded and compiled as the just-in-time compiler would (pointers aligned, integers specialized), to a cubin for
NVIDIA's chips and a code object for AMD's. For each kernel the table shows registers, spills (local memory), shared
memory against the chip's limit, tensor-core instructions, 16-byte loads.

Exit status 1 on a spill, on shared memory over the limit, on a GEMM that asked for tensor cores and has no instruction
of theirs, or where compilation itself fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastppo_kernels import aot_cases
from fastppo_kernels.launch import INTERPRETED, recording

# Shared memory a block may have, in bytes (CUDA C++ Programming Guide, table of compute capabilities; CDNA 3 and 4
# instruction set guides). sm_80's entries also serve sm_86, sm_89 and sm_120, which have 99 KiB.
SHARED_LIMIT = {
    "sm_80": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma", "gfx950": "v_mfma"}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    """One kernel in one specialization; kernel is module:function, so that a worker process can find it."""

    arch: str
    case: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, int], ...]


class Report(NamedTuple):
    launch: Launch
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: str
    wide_loads: bool
    error: str

    def failures(self) -> list[str]:
        if self.error:
            return [self.error]
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        limit = SHARED_LIMIT[self.launch.arch]
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, the chip has {limit}")
        # Products in true float32 have no tensor-core instruction on NVIDIA's chips.
        asks, amd = dict(self.launch.constants), self.launch.arch.startswith("gfx")
        if "PRECISION" in asks and (amd or not (asks["PRECISION"] == "ieee" and asks["COMPUTE"].is_fp32())):
            wanted = TENSOR_CORE[self.launch.arch]
            if self.tensor_core == "-":
                found.append(f"no {wanted}")
        return found


def specialize(arch: str, case: str, kernel, arguments: tuple, options: dict[str, Any]) -> Launch:
    """What the just-in-time compiler would make of these arguments."""
    function = kernel.fn
    compile_options = {k: options.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in options}
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, named[parameter.name]
        signature[name] = "constexpr"
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes.append((position,))
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes.append((position,))
        else:
            signature[name] = "fp32"
    return Launch(
        arch,
        case,
        f"{function.__module__}:{function.__name__}",
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(attributes),
        tuple(compile_options.items()),
    )


def collect(architectures: list[str]) -> list[Launch]:
    """Every distinct specialization that the cases launch."""
    found: dict[tuple, Launch] = {}
    for arch in architectures:
        for case, run in aot_cases.cases():

            def record(kernel, arguments, options, case=case, arch=arch) -> None:
                launch = specialize(arch, case, kernel, arguments, dict(options))
                found.setdefault(launch._replace(case=""), launch)

            with recording(arch, record):
                run()
    return list(found.values())


def compile_launch(launch: Launch) -> Report:
    module, name = launch.kernel.split(":")
    kernel = getattr(__import__(module, fromlist=[name]), name)
    source = ASTSource(
        kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={position: [["tt.divisibility", 16]] for position in launch.attributes},
    )
    amd = launch.arch.startswith("gfx")
    target = GPUTarget("hip", launch.arch, 64) if amd else GPUTarget("cuda", int(launch.arch.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    except Exception as error:
        return Report(launch, 0, 0, 0, "-", False, f"{type(error).__name__}: {str(error).strip()[:300]}")
    shared = compiled.metadata.shared
    if amd:
        text = compiled.asm["amdgcn"]
        wide = r"(global|buffer)_load_(lds_)?dwordx4"
        matrix = "v_mfma" if "v_mfma" in text else "-"
        return Report(launch, *amd_resources(text), shared, matrix, re.search(wide, text) is not None, "")
    registers, local = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    tensor_core = next((word for word in ("tcgen05.mma", "wgmma", "mma.sync") if word in ptx), "-")
    wide = r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg[^;]*0x10|cp\.async\.bulk"
    return Report(launch, registers, local, shared, tensor_core, re.search(wide, ptx) is not None, "")


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread) as cuobjdump reads them from the cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        max(map(int, re.findall(rf"{key}:(\d+)", text)), default=0) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, private memory and spilled registers in bytes) a thread, from the code object's metadata."""
    registers, spilled, scalars_spilled, private = (
        max(map(int, re.findall(rf"\.{key}:\s*(\d+)", assembly)), default=0)
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, private + 4 * (spilled + scalars_spilled)


def describe(launch: Launch) -> str:
    """The tile, where the kernel has one."""
    constants = dict(launch.constants)
    sizes = "×".join(str(constants[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK") if k in constants)
    options = dict(launch.options)
    return f"{sizes} w{options.get('num_warps', 4)} s{options.get('num_stages', 3)}"


def table(reports: list[Report]) -> str:
    head = ["arch", "kernel", "case", "tile", "regs", "spill B", "shared B", "limit B", "tensor core", "16 B loads", ""]
    rows = [
        [
            r.launch.arch,
            r.launch.kernel.split(":")[1].removesuffix("_kernel"),
            r.launch.case,
            describe(r.launch),
            *map(str, (r.registers, r.spill_bytes, r.shared_bytes, SHARED_LIMIT[r.launch.arch], r.tensor_core)),
            "yes" if r.wide_loads else "no",
            "; ".join(r.failures()) or "ok",
        ]
        for r in reports
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastppo_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: the compiler is not there to be asked")
    launches = [x for x in collect(options.arch) if options.kernel in x.kernel]
    start = time.monotonic()
    reports = map_in_processes(options.jobs, launches) if options.jobs > 1 else list(map(compile_launch, launches))
    print(table(reports))
    failed = sum(bool(r.failures()) for r in reports)
    chips, seconds = ", ".join(options.arch), time.monotonic() - start
    print(f"\n{len(reports)} kernels for {chips} by Triton {triton.__version__} in {seconds:.0f} s: {failed} failed")
    return 1 if failed else 0


def map_in_processes(jobs: int, launches: list[Launch]) -> list[Report]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(compile_launch, launches, chunksize=4))


if __name__ == "__main__":
    sys.exit(main())
