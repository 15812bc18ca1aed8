"""Runs tests/triton_kernels in a process of its own, since Triton's interpreter is chosen when triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastppo
from fastppo.ops import dispatch

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_agree_with_float64_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/triton_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter multiplies in float32 always")
def test_float32_is_multiplied_as_pytorch_is_told_to():
    """In a process of its own: PyTorch's older and newer switches exclude each other."""
    code = """
import torch
from fastppo_kernels import launch

def show(arch="sm_90", dtype=torch.float32):
    with launch.recording(arch, None):
        print(launch.precision(dtype, torch.device("meta")))

show()
for name in ("high", "highest"):
    torch.set_float32_matmul_precision(name)
    show()
for allowed in (True, False):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    show()
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
else:
    torch.backends.cuda.matmul.allow_tf32 = True
show()
show("gfx942")
show(dtype=torch.bfloat16)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ieee", "tf32", "ieee", "tf32", "ieee", "tf32", "ieee", "half"]


def test_a_preference_that_cannot_be_met_is_explained_once(monkeypatch):
    """FASTPPO_BACKEND falls back, with one warning whatever the operator; an argument is refused."""
    monkeypatch.setenv("FASTPPO_BACKEND", "triton")
    monkeypatch.setattr(dispatch.triton_kernels, "why_unusable", lambda device, dtype: "there is no such chip")
    monkeypatch.setattr(dispatch, "_warned", set())
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fastppo.linear_logprob(hidden, weight, targets)
            fastppo.gae(torch.randn(2, 3), torch.randn(2, 3), gamma=1.0, lam=1.0)
    assert [str(w.message).count("there is no such chip") for w in caught] == [1]
    with pytest.raises(ValueError, match="there is no such chip"):
        fastppo.linear_logprob(hidden, weight, targets, backend="triton")


def test_the_gate_fails_on_what_it_is_there_for():
    from fastppo_kernels import aot

    class Half:
        def is_fp32(self):
            return False

    constants = (("PRECISION", "ieee"), ("COMPUTE", Half()))
    for arch, instruction in aot.TENSOR_CORE.items():
        launch = aot.Launch(arch, "case", "module:kernel", (), constants, (), ())
        good = aot.Report(launch, 200, 0, aot.SHARED_LIMIT[arch], instruction, True, "")
        assert good.failures() == []
        assert "spills 8 bytes" in good._replace(spill_bytes=8).failures()
        assert "shared memory" in good._replace(shared_bytes=aot.SHARED_LIMIT[arch] + 1).failures()[0]
        assert instruction in good._replace(tensor_core="-").failures()[0]
        assert good._replace(error="it broke").failures() == ["it broke"]


def test_amd_spills_are_read_from_the_code_objects_metadata():
    from fastppo_kernels import aot

    text = """
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     212
    .vgpr_spill_count: 2
    """
    assert aot.amd_resources(text) == (212, 16 + 4 * 3)
