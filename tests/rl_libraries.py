"""verl and OpenRLHF for the tests of their adapters, and what those tests share.

They are imported also where what they run on (Ray, DeepSpeed, flash-attn, a LaTeX parser) is not installed.

Neither the functions that the adapters replace nor the tests touch those, but importing the libraries does. So
stand-ins take their place, for the length of the import only; where they are installed they are themselves.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

HEAVY = {"verl": ("ray",), "openrlhf": ("deepspeed", "flash_attn", "pylatexenc")}


def load(name: str) -> ModuleType:
    """Import `name`, a module of verl or openrlhf; skip the test if the library is not installed."""
    library = name.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if name in sys.modules:
        return sys.modules[name]
    finder = _StandIns([heavy for heavy in HEAVY[library] if not _is_installed(heavy)])
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] in finder.packages]:
            del sys.modules[module]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale


def value_and_gradient(function, x: Tensor, *arguments, **options):
    """(outputs, ∂(random upstream · outputs)/∂x); the first output alone is differentiated."""
    x = x.clone().requires_grad_()
    out = function(x, *arguments, **options)
    first = out[0] if isinstance(out, tuple) else out
    upstream = torch.linspace(0.5, 2.0, max(first.numel(), 1), dtype=first.dtype)[: first.numel()].view(first.shape)
    (first * upstream).sum().backward()
    return out, x.grad


def assert_same(mine, theirs, tolerance=1e-7):
    """Values and gradients; verl adds 1e-8 to the number of tokens."""
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name on the path has none


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


class _StandIn(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")
