"""The benchmarks of a CPU run, at sizes too small to mean anything."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("benchmarks/roofline.py --tflops 0 --gb-per-s 1", "--tflops: expected a finite number above 0, got 0"),
        ("benchmarks/roofline.py --tflops 1 --gb-per-s nan", "--gb-per-s: expected a finite number above 0, got nan"),
        ("benchmarks/roofline.py --tflops 1 --gb-per-s 1 --dim 0 --vocab 1", "--dim: expected at least 1, got 0"),
        ("benchmarks/plot.py nothing.json", "plot.py: [Errno 2] No such file or directory: 'nothing.json'"),
        ("benchmarks/plot.py .", "Is a directory"),
        ("benchmarks/plot.py README.md", "README.md: not a report of either script"),
        ("benchmarks/plot.py x.json --output nowhere/x.png", "expected a file's name, in a folder that exists"),
        ("benchmarks/rollout.py --engines loop,vlm", "--engines: vlm; there are vllm, continuous, loop, transformers"),
        ("examples/make_tiny_run.py README.md", "README.md: File exists"),
        ("examples/reasoning_prompts.py chain_sum x --set 3", "--set: expected KEY=VALUE, got '3'"),
        ("examples/reasoning_prompts.py chain_sum nowhere/x", "nowhere: no such folder"),
        ("examples/reasoning_prompts.py nothing x", "nothing, with these options: "),
    ],
)
def test_mistakes_are_one_line(words, message, monkeypatch, capsys):
    script, *arguments = words.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    error = capsys.readouterr().err if end.value.code == 2 else end.value.code  # which Python would print
    assert message in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("benchmarks/cpu.py --tokens 70 --dim 40 --vocab 300 --rounds 1 --only cpu,naive", "cpu, loss"),
        ("benchmarks/compare_algorithms.py --tiny --steps 1 --only PPO", "PPO"),
        ("-m pytest benchmarks/gae.py --benchmark-enable -k short", "benchmark 'short'"),
    ],
)
def test_runs(command, word):
    run(command, word)


@pytest.mark.slow
def test_the_benchmark_of_rollouts_runs(tmp_path):
    pytest.importorskip("transformers", minversion="5.17")
    sizes = "--sequences 5 --new-tokens 4 --prompt-tokens 3 --rounds 1 --together 2"
    model = make_tiny_model(tmp_path / "model")
    run(f"benchmarks/rollout.py --engines continuous --model {model} {sizes} --output {tmp_path / 'x.json'}", "mixed")
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [found["lengths"] for found in results] == ["equal", "mixed"]
    assert results[0]["tokens_a_completion"] == 4
    for found in results:
        assert found["tokens_per_second"] > 0
        assert found["largest_gap"] < 0.1  # bfloat16 autocast, which the engine's thread does not see


def run(command, word):
    command = [sys.executable, *command.split()]
    # The plugin of pytest's benchmarks measures nothing in a worker of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert word in done.stdout
