"""What becomes of memory that a training step has freed.

glibc gives freed memory back to the system, and the next step gets it again a page of 4 KB at a time, cleared:
activations and gradients, half a gigabyte an update for SmolLM2-135M.
"""

from __future__ import annotations

import ctypes
import os

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_LARGEST = 32 * 2**20  # what glibc allows. Blocks beyond it, which would leave large holes, still come and go.


def keep_freed_memory() -> bool:
    """Have this process keep blocks of up to 32 MiB that it frees for its next ones, and get larger ones in huge pages.

    Returns whether the C library can keep them (glibc). For a program whose every step needs the same memory again: it
    concerns all of the process, to its end. PyTorch asks Linux for huge pages only if it is told to before its first
    tensor; THP_MEM_ALLOC_ENABLE=0 in the environment leaves them out.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "gnu_get_libc_version"):  # the numbers are glibc's
            return False
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2 * _LARGEST))
    return all(mallopt(name, value) for name, value in settings)
