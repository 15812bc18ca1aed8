"""The Triton kernels run here in Triton's interpreter, on the CPU, or on a GPU where there is one.

Whether kernels are interpreted is decided when triton is first imported, for the whole process. So these tests run by
`TRITON_INTERPRET=1 pytest tests/triton_kernels`, which is what tests/test_triton_kernels.py does; in a process without
the variable (and without a GPU) they are not collected.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # oracle

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    from fastppo_kernels.launch import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
