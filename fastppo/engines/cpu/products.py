"""The matrix products that the C++ extension builds on: oneDNN's microkernels, by their names in PyTorch's library.

They are tried out when this module is imported.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from fastppo.engines import extension

isa: str | None = None  # an instruction set that the tests force; None: the best there is


def _load_products() -> tuple[str, ...]:
    """Hand PyTorch's microkernels to the extension; the types of product that work here."""
    module = extension.load()
    library = (
        Path(torch.__file__).parent / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    )
    if module is None or not library.exists():
        return ()
    long = "x" if sys.platform == "darwin" else "l"  # how the C++ ABI spells int64_t
    names = [
        f"_ZN2at6native7cpublas6brgemmE{6 * long}bPKfS3_Pfb",
        f"_ZN2at6native7cpublas6brgemmE{6 * long}bPKN3c108BFloat16ES5_Pfb",
        "_ZN2at6native7cpublas14brgemm_releaseEb",
    ]
    try:
        exported = ctypes.CDLL(str(library))
        symbols = [_address(getattr(exported, name)) for name in names]
    except (OSError, AttributeError):
        return ()
    # By way of PyTorch's library the search finds the OpenMP runtime that it is linked with, and no other.
    module.use_team(_address(getattr(exported, "GOMP_parallel", None)))
    return tuple(module.use_products(*symbols))


def _address(function) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


PRODUCTS = _load_products()


def why_slow() -> str | None:
    """Why this engine hands its work to `chunked`, in a line; None where it does not."""
    return (
        None if PRODUCTS else "this PyTorch does not export the matrix products that fastppo's C++ extension builds on"
    )
