"""Advantages to mean 0 and variance 1, in place, from the moments that `gae_scan` gathered.

    advantages [N], mask [N], mean, variance  ->  (A − mean) / sqrt(variance + 1e-8), 0 at padding

Bytes: 4 read and 4 written a token, and 1 for the mask. FLOPs: 2 a token.
Tiling: BLOCK tokens a program.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch


@triton.jit
def gae_whiten_kernel(advantages, mask, mean, variance, tokens, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < tokens
    a = tl.load(advantages + token, mask=exists, other=0.0)
    a = (a - tl.load(mean)) / tl.sqrt(tl.load(variance) + 1e-8)
    if mask is not None:
        a = tl.where(tl.load(mask + token, mask=exists, other=0) != 0, a, 0.0)
    tl.store(advantages + token, a, mask=exists)


def gae_whiten(advantages: torch.Tensor, mask: torch.Tensor | None, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """advantages: contiguous, float32; mask: uint8 of its shape; mean, variance: 0-dim float32."""
    config = ELEMENTWISE["gae_whiten"]
    launch(
        gae_whiten_kernel,
        (triton.cdiv(advantages.numel(), config.block),),
        advantages,
        mask,
        mean,
        variance,
        advantages.numel(),
        BLOCK=config.block,
        num_warps=config.warps,
    )
