"""What would make the host wait for a GPU raises, also inside of the operators, on a machine without one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch
from fastppo_kernels import launch

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@contextlib.contextmanager
def no_host_waits(device: torch.device) -> Iterator[None]:
    """Inside, what would wait for a GPU raises: by PyTorch's own means on one, by stubs on a CPU.

    On a CPU the kernels do not run, since Triton's interpreter reads tensors, and values are not looked at, as they
    would not be on a GPU.
    """
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return

    def wait(*_arguments, **_options):
        raise AssertionError("the host would wait for the device")

    with pytest.MonkeyPatch.context() as patch, launch.recording("sm_90", lambda *_launched: None):
        for name, module in list(sys.modules.items()):
            if name.startswith("fastppo.") and hasattr(module, "looks_at_values"):
                patch.setattr(module, "looks_at_values", lambda _tensor: False)
        for name in WAITS:
            patch.setattr(torch.Tensor, name, wait)
        for name in ("tensor", "nonzero", "masked_select", "unique"):
            patch.setattr(torch, name, wait)
        yield
