"""What a call launches: on a GPU counted, in Triton's interpreter told from the operators that PyTorch runs."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from fastppo_kernels.launch import INTERPRETED
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# Operators that neither compute nor copy.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "promote_types", "result_type"),
    *("as_strided", "view", "_unsafe_view", "_reshape_alias", "reshape", "slice", "select", "split", "unbind"),
    *("expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "detach_", "alias", "contiguous", "to"),
    *("narrow", "lift_fresh", "resolve_conj", "resolve_neg", "is_same_size"),
}


def launches(call: Callable[[], object]) -> list[str]:
    """The names of kernels on a GPU; else of the Triton kernels and of the innermost operators beside them.

    The latter stand for as many launches, or one or two more: a few have nothing to do, as for empty tensors.
    """
    call()  # compiles
    if not INTERPRETED:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        return [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]

    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def named(executor, *arguments, **options):
        with record_function(f"triton::{executor.fn.__name__}"):
            return run(executor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as profiled:
        patch.setattr(GridExecutor, "__call__", named)
        for name, module in list(sys.modules.items()):
            if name.startswith("fastppo.") and hasattr(module, "looks_at_values"):  # nor does a GPU's host
                patch.setattr(module, "looks_at_values", lambda _tensor: False)
        call()
    return [name for event in profiled.events() if event.cpu_parent is None for name in innermost(event)]


def innermost(event) -> list[str]:
    if event.name.startswith("triton::"):
        return [event.name]
    found = [name for child in event.cpu_children for name in innermost(child)]
    if not found and event.name.startswith("aten::") and event.name.removeprefix("aten::") not in FREE:
        return [event.name]
    return found
