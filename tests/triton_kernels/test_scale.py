"""A gradient times the gradient of the loss, in place."""

from __future__ import annotations

import pytest
import torch
from fastppo_kernels import scale
from fastppo_kernels.launch import INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1 / 3, 65536.0, 1.0, 0.0, -2.5, float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(0,), (1,), (), (37, 911), (40, 4096)])  # the last: several blocks a program
def test_the_product_is_rounded_once(dtype, factor, shape, device):
    x = torch.randn(shape, device=device).to(dtype)
    by = torch.tensor(factor, device=device)
    want = (x.float() * by).to(dtype)
    got = x.clone()
    assert scale.scale_(got, by) is got
    # Triton's interpreter cuts a bfloat16 off instead of rounding it.
    unit = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(got, want, atol=0.0, rtol=unit, equal_nan=True)


def test_a_factor_of_one_leaves_every_bit_alone(device):
    """Infinities and NaN too, whatever their payload."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    x = bits.clone().view(torch.float16)
    scale.scale_(x, torch.ones((), device=device))
    assert torch.equal(x.view(torch.int16), bits)


def test_only_its_own_memory_is_written(device):
    whole = torch.ones(3 * 5000, device=device)
    scale.scale_(whole[5000:10000], torch.full((), 3.0, device=device))
    assert torch.equal(whole, torch.ones_like(whole).index_fill_(0, torch.arange(5000, 10000, device=device), 3.0))
