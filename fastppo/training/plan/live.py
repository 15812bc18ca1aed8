"""Count the bytes of live tensors while code runs, by the storages that its operators return.

Under FakeTensorMode nothing is computed and nothing allocated, so a pass of any size is measured in milliseconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bytes(NamedTuple):
    """What is live at one time, besides what was there at the beginning."""

    total: int = 0
    gradients: int = 0
    """Of `total`: gradients of parameters."""
    copies: int = 0
    """Of `total`: copies of parameters in another precision, as autocast makes them."""

    def passing(self) -> int:
        """All but the gradients."""
        return self.total - self.gradients


class Peak(NamedTuple):
    first: Bytes
    """When most is live."""
    later: Bytes
    """When most besides gradients is live: the peak where the gradients of an earlier pass are there already."""


class LiveBytes(TorchDispatchMode):
    """The most live bytes in each of the moments that `mark` begins.

    Args:
        known: tensors that are there already and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peaks: dict[str, Peak] = {}
        self._now = dict.fromkeys(Bytes._fields, 0)
        self._kinds: dict[int, str] = {}  # of live storages, by address: a field of Bytes
        self._references: dict[int, weakref.ref] = {}
        self._moment = ""
        self.pass_ = ""
        """The model that runs, where a phase runs several; begins the names of moments in its layers."""
        self.backward = False
        """Whether the backward pass has begun, in which checkpointed layers run forward once more."""
        for tensor in known:
            self._add(tensor, "known")

    def mark(self, moment: str) -> None:
        """Begin a moment."""
        self._moment = moment
        self._record()

    def count_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as one."""
        key = parameter.grad.untyped_storage()._cdata
        if self._kinds.get(key) == "total":
            self._kinds[key] = "gradients"
            self._now["gradients"] += parameter.grad.untyped_storage().nbytes()
            self._record()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # most calls: a look at where a tensor without values would be
            return out
        kind = "total"
        if func is torch.ops.aten._to_copy.default:
            kind = "copies" if self._kinds.get(args[0].untyped_storage()._cdata) == "known" else "total"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, kind)
        self._record()
        return out

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._references:
            return

        def free(_: weakref.ref) -> None:
            del self._references[key]
            self._count(self._kinds.pop(key), -size)

        self._references[key], self._kinds[key] = weakref.ref(storage, free), kind
        self._count(kind, size)

    def _count(self, kind: str, size: int) -> None:
        if kind == "known":
            return
        self._now["total"] += size
        if kind != "total":
            self._now[kind] += size

    def _record(self) -> None:
        now = Bytes(**self._now)
        before = self.peaks.get(self._moment, Peak(now, now))
        self.peaks[self._moment] = Peak(max(before.first, now), max(before.later, now, key=Bytes.passing))
