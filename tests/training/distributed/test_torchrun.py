"""The command under torchrun: a rank that is killed ends the others, with one message."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import config, make_world

from fastppo.training.config import to_dict

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]
ROOT = Path(__file__).resolve().parents[3]

DEADLY = """
import os, signal

calls = []


def lengths(completions):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == os.environ["KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


def test_a_killed_rank_ends_the_others_with_one_message_and_the_run_resumes(tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    rewards = [{"name": "lengths", "function": f"{tmp_path / 'deadly.py'}:lengths"}]
    settings = config(make_world(tmp_path), tmp_path / "run", rewards=rewards, checkpoint__every=1, total_steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(settings)))
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels"))

    def train(*options: str, killed: int | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "fastppo", "train", str(tmp_path / "run.yaml"), *options]
        environment = {**os.environ, "KILLED": str(killed), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)

    run = train(killed=0)
    assert run.returncode != 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert metrics.read_text().count("\n") == 1  # killed in step 2
    assert time.time() - metrics.stat().st_mtime < 60
    told = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("fastppo:")]
    assert len(told) == 1
    assert told[0].startswith("fastppo: another process of this run has ended (")

    run = train("--resume")
    assert run.returncode == 0, run.stderr
    assert metrics.read_text().count("\n") == 2
    assert run.stdout.count("policy: ") == 1
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
