"""What a launch needs to know of the machine: architecture, precision, processors, descriptors."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastppo_kernels.configs import GEMM, Gemm
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
    if not torch.version.cuda:
        return "the configurations are proved for NVIDIA chips only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def architecture(device: torch.device) -> str:
    """The key of `configs.GEMM` that serves this device."""
    if _recording is not None:
        return _recording[0]
    if INTERPRETED:
        return "interpreter"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def precision(dtype: torch.dtype) -> str:
    """half, tf32 or ieee; tf32 only where torch.set_float32_matmul_precision asks for it."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if INTERPRETED or torch.get_float32_matmul_precision() == "highest" else "tf32"


def dot_precision(name: str) -> str:
    """What tl.dot is told; half precision products are exact in float32 whatever it says."""
    return "ieee" if name == "half" else name


def gemm_config(
    kernel: str, compute_dtype: torch.dtype, weight: torch.Tensor, *dims: int, softcap: bool = False
) -> Gemm:
    """The entry for products in compute_dtype with this weight (and others like it) over hidden sizes `dims`."""
    arch = architecture(weight.device)
    kind = precision(compute_dtype)
    if arch != "interpreter":
        if weight.element_size() > compute_dtype.itemsize:
            kind = "mixed"
        if any(dim % 16 for dim in dims):
            arch = "odd"
    plain = GEMM[kernel][arch, kind]
    return GEMM[kernel].get((arch, f"{kind} capped"), plain) if softcap else plain


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


def even(dim: int, block: int) -> bool:
    return dim % block == 0


def balanced_splits(blocks_m: int, tiles: int, programs: int, limit: int) -> int:
    """Into how many parts to cut `tiles` column tiles, so that `programs` of them at a time end together.

    The longest program takes ceil(blocks_m · splits / programs) items of ceil(tiles / splits) tiles; an item costs
    about half a tile more to start and to combine.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(blocks_m * splits, programs) * (triton.cdiv(tiles, splits) + 0.5)

    return min(range(1, max(1, min(tiles, limit)) + 1), key=cost)
