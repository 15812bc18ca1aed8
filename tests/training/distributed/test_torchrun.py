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


@pytest.mark.parametrize("killed", [0])
def test_a_killed_rank_ends_the_others_with_one_message(tmp_path, killed):
    (tmp_path / "deadly.py").write_text(DEADLY)
    rewards = [{"name": "lengths", "function": f"{tmp_path / 'deadly.py'}:lengths"}]
    settings = config(make_world(tmp_path), tmp_path / "run", rewards=rewards)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(settings)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fastppo", "train", str(tmp_path / "run.yaml")]
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels"))
    environment = {**os.environ, "KILLED": str(killed), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    began = time.monotonic()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert run.returncode != 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1  # killed in step 2
    ended = time.time() - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime
    assert ended < 60, f"{ended:.0f} s after step 1, {time.monotonic() - began:.0f} s after the start"
    told = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("fastppo:")]
    assert len(told) == 1
    assert told[0].startswith("fastppo: another process of this run has ended (")
