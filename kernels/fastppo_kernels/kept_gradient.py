"""∂loss/∂logits over the exponentials that `linear_statistics` kept, in place: no product, one read and one write.

    kept eᶻ⁻ᵐ [R, V], m [N, tiles]   a few scalars a row
         \\                             /
      log p = (m − row_max) − log_sum + log eᶻ⁻ᵐ,   p = eᶻ⁻ᵐ · exp((m − row_max) − log_sum)
      ∂z = p (a + b log p) + c [v = target], then the transform's derivative, over eᶻ⁻ᵐ

with a, b, c of `logit_gradient`. In bfloat16 and float16 an exponential is rounded once, to a relative 2⁻⁹ or 2⁻¹¹:
p carries that error, as ∂z will when it is rounded in its turn, and log p carries it absolutely, whatever the size of
the logits; the statistics were made before any rounding. The row's target, whose z is known exactly, uses it.

Bytes: R · V read, R · V written; 4 · N · tiles of maxima. FLOPs: about 12 a logit.
Tiling: one program for a few whole tiles of a row, so that a maximum serves 128 or 256 columns. Rows behind the count
are written as zeros without being read, so that the products that follow may run over R rows whatever the count is.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.linear_statistics import Kept
from fastppo_kernels.tile import VERY_NEGATIVE, exp, log, transform_gradient


@triton.jit
def kept_gradient_kernel(
    kept,
    kept_max,
    targets,
    rows,
    count,
    logprobs,
    entropy,
    row_max,
    log_sum,
    d_logprobs,
    d_entropy,
    scale,
    vocab,
    stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = column < vocab
    place = kept + m * stride + column
    if m >= tl.load(count):
        tl.store(place, tl.zeros((TILES, TILE), dtype=kept.dtype.element_ty), mask=inside)
        return
    row = tl.load(rows + m)
    a, b, c = 0.0, 0.0, 0.0
    if d_logprobs is not None:
        c += tl.load(d_logprobs + row)
    if d_entropy is not None:
        b -= tl.load(d_entropy + row)
    if (b == 0.0) & (c == 0.0):
        tl.store(place, tl.zeros((TILES, TILE), dtype=kept.dtype.element_ty), mask=inside)
        return
    a = a - c + b * tl.load(entropy + row)
    top, normalizer = tl.load(row_max + row), tl.load(log_sum + row)
    moment = tl.load(kept_max + m * tl.cdiv(vocab, TILE) + tile, mask=tile * TILE < vocab, other=0.0)
    base = (moment - top) - normalizer
    e = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    is_target = column == tl.load(targets + row)
    # What underflowed to 0 has no gradient but the target's own; its logarithm stands in for log 0.
    log_e = tl.where(e > 0.0, log(tl.maximum(e, 1e-38)), -87.0)
    log_p = tl.where(is_target, tl.load(logprobs + row), tl.maximum(base[:, None] + log_e, VERY_NEGATIVE))
    p = tl.where(is_target, exp(log_p), e * exp(base)[:, None])
    dz = p * (a + b * log_p) + tl.where(is_target, c, 0.0)
    z = (log_p + normalizer) + top
    dz = transform_gradient(dz, z, inner, outer, SOFTCAP)
    if scale is not None:
        dz *= tl.load(scale)
    tl.store(place, dz.to(kept.dtype.element_ty), mask=inside)


def kept_gradient(
    kept: Kept,
    rows: torch.Tensor,
    count: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    d_logprobs: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    *,
    num_rows: int,
    vocab: int,
    inner: float,
    outer: float,
    softcap: bool,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """∂z [num_rows, V] in the memory of `kept.values`, whose contents it replaces.

    Args:
        rows, count: of `compact_rows`; num_rows ≥ count.
        targets: [N] int64; statistics: [4, N] of `linear_statistics`; d_logprobs, d_entropy: [N] float32 or None.
        inner, outer, softcap: the logit transform, see `tile.transform`.
        scale: [1] float32 that ∂z is multiplied by, or None.
    """
    config = ELEMENTWISE["kept_gradient"]
    tiles = max(1, config.block // kept.tile)
    launch(
        kept_gradient_kernel,
        (num_rows, triton.cdiv(vocab, tiles * kept.tile)),
        kept.values,
        kept.maxima,
        targets,
        rows,
        count,
        *statistics,
        d_logprobs,
        d_entropy,
        scale,
        vocab,
        kept.values.stride(0),
        inner,
        outer,
        SOFTCAP=softcap,
        TILES=tiles,
        TILE=kept.tile,
        num_warps=config.warps,
    )
    return kept.values[:num_rows, :vocab]
