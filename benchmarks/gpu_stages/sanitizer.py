"""compute-sanitizer's memcheck over the correctness cases at tiny sizes, where the program is installed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from gpu_stages.bench import Bench, run_within
from gpu_stages.rows import Rows

RUNNER = Path(__file__).parents[1] / "gpu.py"


def run(bench: Bench) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not (bench.on_gpu and Path(program).exists()):
        bench.row("sanitizer", "memcheck", "skipped", error="needs a GPU and the program compute-sanitizer")
        return
    bench.attempt("sanitizer", "memcheck", lambda: memcheck(bench, program))


def memcheck(bench: Bench, program: str) -> dict:
    out, seconds = bench.out / "sanitizer", bench.left()
    out.mkdir(exist_ok=True)
    command = [
        program, "--tool", "memcheck", "--print-limit", "10", sys.executable, str(RUNNER), "--stage", "correctness",
        "--tiny", "--seconds", str(seconds), "--out", str(out),
    ]  # fmt: skip
    # Each tensor in an allocation of its own, or an access beyond its end would find the next one's memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    _, text = run_within(seconds, command, bench.out / "sanitizer.txt", env=environment)
    rows = [r for r in Rows(out / "rows.jsonl").read() if r["status"] in ("PASS", "FAIL", "error")]
    shutil.rmtree(out)
    faults = re.findall(r"^=+\s+(Invalid .*|.*(?:out of bounds|misaligned).*)$", text, re.MULTILINE)
    refused = re.findall(r"^=+ (?:Error|Warning): .*|.*Device not supported.*", text, re.MULTILINE)
    if faults:
        return {"status": "FAIL", "cases": len(rows), "error": "; ".join(faults[:3])[:200]}
    if not rows:
        return {"status": "skipped", "error": f"no case ran: {'; '.join(refused[:2])}"[:200]}
    return {"status": "PASS", "cases": len(rows), "failed": [r["name"] for r in rows if r["status"] != "PASS"][:5]}
