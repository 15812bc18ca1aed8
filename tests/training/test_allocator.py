"""Memory that the process frees is kept for its next allocations."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
import torch
from fastppo.training.allocator import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page fault for every small page
kept = sys.argv[1] == "kept" and keep_freed_memory()

def step():
    return [torch.ones(4 * 2**20) for _ in range(8)]  # 8 blocks of 16 MiB

for _ in range(4):  # warm-up
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    def run(setting):
        command = [sys.executable, "-c", PROGRAM, setting]
        # By default glibc adapts this threshold to what was freed before.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        kept, faults = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout.split()
        return kept == "True", int(faults)

    round_of_faults = 8 * 16 * 2**20 // mmap.PAGESIZE
    assert run("as it is")[1] > 2 * round_of_faults  # else this test shows nothing
    kept, faults = run("kept")
    assert kept
    assert faults < round_of_faults / 2
