"""A gradient times the loss's own gradient, in place, without the host looking at either.

    x [...], factor [] float32  ->  x = x · factor, computed in float32 and rounded once

Bytes: 4, the factor, where it is 1; else x read and written. FLOPs: one an element.
Tiling: a few programs a processor walk over blocks of x, so that a factor of 1, which is what loss.backward() gives,
costs the start of that many programs that end at once, however large x is.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.launch import launch, processors

BLOCK = 4096
WARPS = 8  # 16 elements a thread: two 16-byte accesses in half precision
PROGRAMS = 8  # a processor: as many as its 2,048 threads allow


@triton.jit(do_not_specialize=["size"])
def scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        first = tl.program_id(0).to(tl.int64)  # x may have more than 2³¹ elements
        # Whole blocks need no mask, and without one the accesses are 16 bytes wide whatever the size is.
        for block in range(first, size // BLOCK, tl.num_programs(0)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(x + at, scaled(tl.load(x + at), by))
        if first == 0:
            at = size // BLOCK * BLOCK + tl.arange(0, BLOCK)
            tl.store(x + at, scaled(tl.load(x + at, mask=at < size), by), mask=at < size)


@triton.jit
def scaled(values, by):
    return (values.to(tl.float32) * by).to(values.dtype)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x · factor in x's own memory.

    Args:
        x: float32, bfloat16 or float16, contiguous, of any shape.
        factor: [] float32 on the same device.
    """
    grid = (min(triton.cdiv(x.numel(), BLOCK), PROGRAMS * processors(x.device)),)
    launch(scale_kernel, grid, x.view(-1), factor, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return x
