"""Import verl and OpenRLHF for the tests of their integrations, and what those tests share.

Importing them needs Ray, DeepSpeed, flash-attn or a LaTeX parser, which neither the replaced functions nor the tests
use. Where one of these is not installed, a stand-in takes its place during the import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

HEAVY = {"verl": ("ray",), "openrlhf": ("deepspeed", "flash_attn", "pylatexenc")}


def load(name: str) -> ModuleType:
    """Import `name`, a module of verl or openrlhf.

    Where the library is not installed the test is skipped, or fails if FASTPPO_REQUIRE_RL_LIBRARIES is 1.
    """
    library = name.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        missing = f"{library} is not installed"
        if os.environ.get("FASTPPO_REQUIRE_RL_LIBRARIES") == "1":
            pytest.fail(f"{missing}, and FASTPPO_REQUIRE_RL_LIBRARIES=1 requires it")
        pytest.skip(missing)
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


def find(name: str) -> Any:
    """The function or class "library.module.name"."""
    module, _, attribute = name.rpartition(".")
    return getattr(load(module), attribute)


def replaced_pairs(replacements: dict[str, Callable]) -> Iterator[tuple[str, Callable, Callable]]:
    """Name, replacement and original of every function, and of the constructor and forward of every class."""
    for name, mine in replacements.items():
        theirs = find(name)
        methods = ("__init__", "forward") if inspect.isclass(mine) else ()
        yield from [(name, getattr(mine, m), getattr(theirs, m)) for m in methods] or [(name, mine, theirs)]


def parameters(function: Callable) -> list[tuple[str, Any]]:
    """Names and defaults, in order."""
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale


def value_and_gradient(function, x: Tensor, *arguments, **options):
    """(outputs, ∂(upstream · first output)/∂x) with upstream gradients from 0.5 to 2."""
    x = x.clone().requires_grad_()
    out = function(x, *arguments, **options)
    first = out[0] if isinstance(out, tuple) else out
    upstream = torch.linspace(0.5, 2.0, max(first.numel(), 1), dtype=first.dtype)[: first.numel()].view(first.shape)
    (first * upstream).sum().backward()
    return out, x.grad


def assert_same(mine, theirs, tolerance=1e-7):
    """Compare values and gradients; verl adds 1e-8 to the number of tokens."""
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # None for a folder of that name on the path


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
