"""What a launch needs to know of the machine: architecture, precision, processors, descriptors."""

import contextlib
import contextvars
import functools
import json
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastppo_kernels.configs import CEILINGS, GEMM, Ceilings, Gemm
from fastppo_kernels.tile import exp

# Decided by TRITON_INTERPRET when triton is imported, for the whole process; any kernel function shows it.
INTERPRETED = isinstance(exp, InterpretedFunction)
TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# Set by `recording`: the ahead-of-time gate sees what would be launched on a chip that isn't there.
_recording: tuple[str, Callable] | None = None


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options), with multiplications and additions fused: Triton's default is changing.

    A kernel that makes a descriptor of its own (without TMA) may need a few bytes of device memory for it, which Triton
    asks of an allocator. That is set in a copy of the context, so that the caller's own allocator stays.
    """
    options = {"enable_fp_fusion": True, **options}
    if _recording is not None:
        _recording[1](kernel, arguments, options)
    elif all(grid):
        tensor = next(x for x in arguments if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever holds the tensors
            if not (options.get("TMA", True) or INTERPRETED):
                contextvars.copy_context().run(_launch_with_memory, kernel, grid, arguments, options)
            else:
                kernel[grid](*arguments, **options)


def _launch_with_memory(kernel, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    kernel[grid](*arguments, **options)


@contextlib.contextmanager
def recording(arch: str, record: Callable) -> Iterator[None]:
    """Inside, launches on meta tensors are chosen for `arch` and handed to record(kernel, arguments, options)."""
    global _recording
    _recording = (arch, record)
    try:
        yield
    finally:
        _recording = None


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, in a line; None if they can."""
    if dtype not in TRITON_DTYPE:
        return f"the kernels compute in float32, bfloat16 and float16, not {dtype}"
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on the CPU only"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip:
        return "the kernels are for NVIDIA's chips"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return _no_launchers()


@functools.cache
def _no_launchers() -> str | None:
    """Triton compiles a piece of C around every kernel, when it is first launched."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is none: install gcc, or name one in CC"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Triton needs Python's C headers (Python.h), and there are none: install python3-dev"
    return None


def architecture(device: torch.device) -> str:
    """The key of `configs.GEMM` that serves this device."""
    if _recording is not None:
        return _recording[0]
    if INTERPRETED:
        return "interpreter"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def precision(dtype: torch.dtype) -> str:
    """half, tf32 or ieee: float32 products are exact unless PyTorch's own switch allows TensorFloat-32 for them.

    That switch is torch.set_float32_matmul_precision("high"), torch.backends.cuda.matmul.allow_tf32 or, from PyTorch
    2.9 on, torch.backends.cuda.matmul.fp32_precision.
    """
    if dtype != torch.float32:
        return "half"
    if INTERPRETED:
        return "ieee"
    # The older getters raise where the newer switch was used.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = newer == "tf32" if newer is not None else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def gemm_config(kernel: str, dtype: torch.dtype, device: torch.device, *, SOFTCAP: int = 0, **_transform) -> Gemm:
    """The entry of `configs.GEMM` for products of this dtype on this device."""
    arch, kind = architecture(device), precision(dtype)
    tuned = {} if _recording is not None else tuned_for(device).get("gemm", {}).get(kernel, {})
    table = GEMM[kernel] | {(arch, of): config for of, config in tuned.items()}
    plain = table[arch, kind]
    return table.get((arch, f"{kind} capped"), plain) if SOFTCAP else plain


def gemm_options(config: Gemm, dtype: torch.dtype, device: torch.device) -> dict:
    """The compile-time arguments that every kernel with a matrix product has."""
    kind = precision(dtype)
    return {
        "TMA": has_tma(device),
        "PRECISION": "ieee" if kind == "half" else kind,  # half-precision products are exact in float32 anyway
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def programs(config: Gemm, items: int, device: torch.device) -> int:
    """How many programs share `items` output tiles: `config.per_processor` on each processor, or one for each tile."""
    return min(items, config.per_processor * processors(device)) if config.per_processor else items


def ceilings(device: torch.device) -> Ceilings:
    """Of this device: as `tune` measured them, else the nominal ones."""
    measured = {} if _recording is not None else tuned_for(device)
    return measured.get("ceilings") or CEILINGS[architecture(device)]


def tuned_for(device: torch.device) -> dict:
    """What `tune` wrote for this device, from the file that FASTPPO_TUNED names; empty where there is none."""
    path = os.environ.get("FASTPPO_TUNED")
    return _read_tuned(path, device_name(device)) if path else {}


@functools.cache
def _read_tuned(path: str, name: str) -> dict:
    try:
        found = json.loads(Path(path).read_text()).get(name)
        if found is None:
            return {}
        gemm = {
            kernel: {kind: Gemm(**config) for kind, config in entries.items()}
            for kernel, entries in found["gemm"].items()
        }
        return {"gemm": gemm, "ceilings": Ceilings(**found["ceilings"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"FASTPPO_TUNED={path} is not used: {type(error).__name__}: {error}; "
            "write it with `python -m fastppo_kernels.tune`",
            stacklevel=2,
        )
        return {}


def device_name(device: torch.device) -> str:
    return "interpreter" if device.type != "cuda" else torch.cuda.get_device_name(device)


# Triton's interpreter multiplies the bits of bfloat16 operands as integers. Tests mend it and say so here.
INTERPRETER_MULTIPLIES_BFLOAT16 = False


def interpreted_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products in `dtype` are computed in: in Triton's interpreter float32, which holds every bfloat16 exactly."""
    if INTERPRETED and not (dtype == torch.bfloat16 and INTERPRETER_MULTIPLIES_BFLOAT16):
        return torch.float32
    return dtype


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor | torch.Tensor:
    """x [R, C] for `tile.described`: a descriptor of blocks of rows × columns, or without TMA x itself.

    x starts on a 16-byte boundary, its last dimension is contiguous, and its rows are a multiple of 16 elements apart.
    """
    return TensorDescriptor.from_tensor(x, [rows, columns]) if has_tma(x.device) else x


def has_tma(device: torch.device) -> bool:
    """Whether the chip has the bulk copy engine that reads descriptors."""
    if INTERPRETED or device.type != "cuda":  # interpreted, or recorded for a chip that is not there
        return architecture(device) != "sm_80"
    return torch.cuda.get_device_capability(device) >= (9, 0)
