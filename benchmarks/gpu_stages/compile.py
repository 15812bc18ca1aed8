"""Fill the compiler's cache for this chip, by running what the later stages run, with few tokens, in many processes.

Each process takes every k-th case, so that kernels compile on all cores. Nothing is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from gpu_stages import correctness, elementwise, graph, logits, loss, peers
from gpu_stages.bench import Bench, WarmUp

WORKERS = 16
STAGES = (correctness, loss, logits, peers, graph, elementwise)


def run(bench: Bench) -> None:
    bench.attempt("compile", "all kernels", lambda: share_out(bench))


def share_out(bench: Bench) -> dict:
    workers = 2 if bench.tiny else min(WORKERS, os.cpu_count() or 1)
    # Whatever a process is compiling when its time is over, it finishes: hence the margin.
    seconds = str(max(bench.left() - 5, 5))
    command = [sys.executable, *sys.orig_argv[1:], "--seconds", seconds, "--workers", str(workers), "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    processes = [
        subprocess.Popen([*command, str(worker)], stdout=subprocess.PIPE, text=True, env=environment)
        for worker in range(workers)
    ]
    printed = "".join(process.communicate()[0] for process in processes)
    print(printed, flush=True)
    counts = re.findall(r"^compiled (\d+) of (\d+)", printed, re.MULTILINE)
    compiled, cases = (sum(int(count[i]) for count in counts) for i in (0, 1))
    return {"cases": compiled, "of": cases, "workers": workers, "seconds": round(time.monotonic() - begin, 1)}


def work(bench: WarmUp) -> None:
    """One process's share; the kernels of the stages that come first are compiled first."""
    for stage in (graph,) if bench.tiny else STAGES:  # a dry run has nothing to compile
        stage.run(bench)
    print(f"compiled {bench.compiled} of {bench.share}", flush=True)
