"""Which compilations a just-in-time compiler would make of what is launched, without a chip."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from fastppo_kernels.launch import recording
from triton import JITFunction
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def compilations(run: Callable[[int], None], sizes: Iterable[int], arch: str = "sm_90") -> dict[str, set]:
    """Kernel name -> the distinct keys by which Triton caches what run(size), on meta tensors, launches for all sizes.

    The key: types, compile-time arguments, and, where it is not told otherwise, whether an integer is 1 or a multiple
    of 16 and whether a pointer is 16-byte aligned.
    """
    found = defaultdict(set)

    def record(kernel, arguments: tuple, options: dict) -> None:
        if isinstance(kernel, InterpretedFunction):
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        parameters = {p.name: p for p in kernel.params}
        key = tuple((name, _key(parameters.get(name), value)) for name, value in sorted(named.items()))
        found[kernel.fn.__name__].add(key)

    for size in sizes:
        with recording(arch, record):
            run(size)
    return found


def _key(parameter, value):
    if isinstance(value, TensorDescriptor):
        return "descriptor", value.base.dtype, tuple(value.block_shape)
    if isinstance(value, torch.Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return "pointer", value.dtype, aligned or parameter.do_not_specialize_on_alignment
    if type(value) is float:
        return "float"
    if parameter is None or parameter.is_constexpr or type(value) is not int:
        return value
    wide = value >= 2**31
    return ("integer", wide) if parameter.do_not_specialize else ("integer", wide, value == 1, value % 16 == 0)
