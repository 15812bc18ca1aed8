"""The Triton kernels (kernels/fastppo_kernels), if this installation can use them.

Imported here and now, not on first use: torch.compile cannot trace an import. A PyTorch without CUDA leaves
them alone, unless TRITON_INTERPRET=1 asks for Triton's interpreter on the CPU, which is how the tests run them there.
"""

from __future__ import annotations

import os

import torch

_why_missing: str | None = None

if not (torch.version.cuda or os.environ.get("TRITON_INTERPRET") == "1"):
    _why_missing = "this PyTorch is built without CUDA"
else:
    try:
        from fastppo_kernels import (  # noqa: F401  (for the operators)
            clipped_loss,
            fisher,
            gae,
            launch,
            linear,
            loss,
            scale,
            selective,
        )
    except ImportError as error:
        _why_missing = f"the kernels do not load: {str(error).splitlines()[0]}"


@torch.compiler.assume_constant_result
def why_unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve tensors of this device and dtype, in a line; None if they can."""
    return _why_missing or launch.unusable(device, dtype)


@torch.compiler.assume_constant_result
def is_measured(device: torch.device) -> bool:
    """Whether every check of benchmarks/gpu.py has passed on this kind of chip: sm_90 (H100, H200)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
