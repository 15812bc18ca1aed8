"""What a launch needs to know of the machine: architecture, precision, processors, descriptors."""

import contextlib
import functools
import json
import os
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

# Decided by TRITON_INTERPRET when triton is imported, for the whole process.
INTERPRETED = isinstance(exp, InterpretedFunction)
TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# Set by `recording`: the ahead-of-time gate sees what would be launched on a chip that isn't there.
_recording: tuple[str, Callable] | None = None


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options), with multiplications and additions fused: Triton's default is changing."""
    options = {"enable_fp_fusion": True, **options}
    if _recording is not None:
        _recording[1](kernel, arguments, options)
    elif all(grid):
        tensor = next(x for x in arguments if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever holds the tensors
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
        return "the kernels compile for AMD chips (MI300, MI350) but have not run on one yet"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def architecture(device: torch.device) -> str:
    """The key of `configs.GEMM` that serves this device."""
    if _recording is not None:
        return _recording[0]
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """half, tf32 or ieee: float32 products are exact unless PyTorch's own switch allows TensorFloat-32 for them.

    That switch is torch.set_float32_matmul_precision("high"), torch.backends.cuda.matmul.allow_tf32 or, from PyTorch
    2.9 on, torch.backends.cuda.matmul.fp32_precision. AMD's chips multiply in float32 whatever it says.
    """
    if dtype != torch.float32:
        return "half"
    if INTERPRETED or architecture(device).startswith("gfx"):
        return "ieee"
    # The older getters raise where the newer switch was used.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = newer == "tf32" if newer is not None else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def gemm_config(
    kernel: str, compute_dtype: torch.dtype, weight: torch.Tensor, *dims: int, softcap: bool = False
) -> Gemm:
    """The entry for products in compute_dtype with this weight (and others like it) over hidden sizes `dims`."""
    arch = architecture(weight.device)
    kind = precision(compute_dtype, weight.device)
    tuned = {} if _recording is not None else tuned_for(weight.device).get("gemm", {}).get(kernel, {})
    if arch != "interpreter":
        if weight.element_size() > compute_dtype.itemsize:
            kind = "mixed"
        if any(dim % 16 for dim in dims):
            arch = "gfx odd" if arch.startswith("gfx") else "odd"
    table = GEMM[kernel] | {(arch, of): config for of, config in tuned.items() if "odd" not in arch}
    plain = table[arch, kind]
    return table.get((arch, f"{kind} capped"), plain) if softcap else plain


def gemm_options(config: Gemm, compute_dtype: torch.dtype, device: torch.device, *dims: int) -> dict:
    """The compile-time arguments that every kernel with a product over hidden sizes `dims` has."""
    kind = precision(compute_dtype, device)
    return {
        "EVEN_K": all(dim % config.block_k == 0 for dim in dims),
        "COMPUTE": TRITON_DTYPE[compute_dtype],
        "PRECISION": "ieee" if kind == "half" else kind,  # half-precision products are exact in float32 anyway
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


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


def interpreted_dtype(dtype: torch.dtype) -> torch.dtype:
    """Triton's interpreter has no bfloat16 product; float32 holds every bfloat16 exactly."""
    return torch.float32 if INTERPRETED else dtype


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, columns])


def fits_descriptor(x: torch.Tensor) -> bool:
    """TMA wants a contiguous last dimension and 16-byte alignment of the base and of every row."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def balanced_splits(blocks_m: int, tiles: int, programs: int, limit: int) -> int:
    """Into how many parts to cut `tiles` column tiles, so that `programs` of them at a time end together.

    The longest program takes ceil(blocks_m · splits / programs) items of ceil(tiles / splits) tiles; an item costs
    about half a tile more to start and to combine.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(blocks_m * splits, programs) * (triton.cdiv(tiles, splits) + 0.5)

    return min(range(1, max(1, min(tiles, limit)) + 1), key=cost)
