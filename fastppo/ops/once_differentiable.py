"""Gradients that raise an error where they would be differentiated once more."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def once_differentiable(backward: Callable) -> Callable:
    """For a backward that computes without autograd.

    PyTorch's decorator of this name lets a second derivative pass as zero wherever the upstream gradient is a constant.
    """

    @functools.wraps(backward)
    def call(ctx, *upstream):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # as with create_graph=True
            raise RuntimeError(
                "create_graph: fastppo's gradients cannot be differentiated again; leave it off, or use "
                "backend='reference', which has every derivative"
            )
        return backward(ctx, *upstream)

    return call
