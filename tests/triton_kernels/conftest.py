"""The Triton kernels run here in Triton's interpreter, on the CPU, or on a GPU where there is one.

Whether kernels are interpreted is decided when triton is first imported, for the whole process. So these tests run by
`TRITON_INTERPRET=1 pytest tests/triton_kernels`, which is what tests/conftest.py does; in a process without the
variable (and without a GPU) they are not collected.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # oracle

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__

    def call(self, *arguments, **named):
        """Replace triton.language if need be, rather than whenever a kernel calls a function, which takes longer."""
        replaced = not any(tl.core.is_builtin(language.load) for language in (tl, tl.core))
        return self.rewrite()(*arguments, **named) if replaced else _call(self, *arguments, **named)

    InterpretedFunction.__call__ = call


@pytest.fixture(scope="session")
def device() -> torch.device:
    from fastppo_kernels.launch import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is multiplied and rounded as on a GPU.

    The interpreter holds bfloat16 as uint16 and multiplies those as integers; here they become float32 first. And it
    cuts float32 down to bfloat16 where a GPU rounds to the nearest.
    """
    import numpy as np
    from fastppo_kernels import launch

    if not launch.INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x: TensorHandle) -> TensorHandle:
        if x.data.dtype != np.uint16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, x, dtype):
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, x, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(launch, "INTERPRETER_MULTIPLIES_BFLOAT16", True)
