"""Keep memory freed by a training step for the next one, or, of several processes, return it.

glibc returns freed memory to the system, and the next step gets it back page by page, zeroed: for SmolLM2-135M half a
gigabyte of activations and gradients per update.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 32 * 2**20  # glibc's maximum; larger blocks are still returned


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of up to 32 MiB for the whole process, and PyTorch ask for huge pages.

    Call it before the first tensor is made. THP_MEM_ALLOC_ENABLE=0 in the environment disables the huge pages.

    Returns:
        Whether it took effect: False if the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _mallopt((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2 * _LARGEST))


def return_freed_memory() -> bool:
    """Make glibc return freed blocks of 1 MiB and more at once: those of several processes on one machine add up.

    Otherwise a rank keeps what it has gathered of the others' parameters.
    """
    return _mallopt((_M_MMAP_THRESHOLD, 2**20))


def _mallopt(*settings: tuple[int, int]) -> bool:
    try:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "gnu_get_libc_version"):  # the constants are glibc's
            return False
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return all(mallopt(name, value) for name, value in settings)
