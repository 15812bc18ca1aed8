"""The benchmarks of a CPU run, at sizes too small to mean anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("benchmarks/cpu.py --tokens 70 --dim 40 --vocab 300 --rounds 1 --only cpu,naive", "cpu, loss"),
        ("benchmarks/compare_algorithms.py --tiny --steps 1 --only PPO", "PPO"),
        ("-m pytest benchmarks/gae.py --benchmark-enable -k short", "benchmark 'short'"),
    ],
)
def test_runs(command, word, tmp_path):
    command = [sys.executable, *command.split()]
    env = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert word in done.stdout
