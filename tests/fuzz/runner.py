"""What runs the cases: a seed gives numbers, a number a case, and a process of its own runs it.

    fuzz ── number ──> Worker ── stdin ──> serve ── operators.run, commands.run or kills.run
         <─ finding ──        <─ stdout ──

A case depends on nothing but its number. One that crashes or hangs ends the worker's process, not the fuzzer, and the
next case gets a new one. A finding is one line of text; None means that all was as it should be.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = {"operators": 120, "commands": 120, "kills": 900}  # seconds after which a case counts as hanging
CASES_PER_PROCESS = 300  # what a process caches and leaks stays bounded


class Worker:
    """A process that runs one case after another."""

    def __init__(self, target: str, processes: int = 1) -> None:
        self.target, self.process, self.cases = target, None, 0
        self.options = ["--processes", str(processes)] if target == "kills" and processes > 1 else []

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fastppo-fuzz-", ignore_cleanup_errors=True)
        paths = [ROOT, ROOT / "kernels", ROOT / "tests"]
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--serve", self.target, *self.options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(Path(self.folder.name) / "stderr", "w"),  # noqa: SIM115
            text=True,
            cwd=self.folder.name,
            start_new_session=True,  # so that what it starts ends with it
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "TRITON_INTERPRET": "1" if self.target == "operators" else "0",
                "OMP_NUM_THREADS": "1",  # kills.py forks, which a process of several threads must not
                "HF_HUB_OFFLINE": "1",
                "COLUMNS": "80",
            },
        )
        self.cases = 0
        if self._answer(300) != "ready":
            raise RuntimeError(f"the {self.target} worker does not start: python -m tests.fuzz --serve {self.target}")

    def _answer(self, limit: float) -> str | None:
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        if not ready:
            return f"hangs: no end in {limit} s"
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        end = " ".join((Path(self.folder.name) / "stderr").read_text(errors="replace").split())[-300:]
        return f"crashes: the process ended by {signal.Signals(-status).name if status < 0 else status}: {end}"

    def run(self, case: int) -> str | None:
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        finding, self.cases = self._answer(TARGETS[self.target]), self.cases + 1
        if self.cases == CASES_PER_PROCESS or (finding and finding.startswith(("hangs", "crashes"))):
            self.close()
        return finding

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
            self.folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def serve(target: str, processes: int) -> None:
    """In the worker's process: answer each number on stdin by a line of JSON."""
    numbers, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")  # a reward's `exit()` closes sys.stdin
    os.dup2(2, 1)  # what a case prints does not mix with the answers
    run = importlib.import_module(f"tests.fuzz.{target}").run
    run = functools.partial(run, processes=processes) if target == "kills" else run

    def answer(value: str | None) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    for line in numbers:
        try:
            answer(run(int(line)))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            answer(f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})")


def fuzz(
    targets: Sequence[str],
    *,
    seconds: float,
    seed: int,
    processes: int = 1,
    max_cases: float = float("inf"),
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> list[str]:
    """Run cases of the targets for so many seconds, each target for an equal share, and at most `max_cases` of each.

    The runs that are killed have so many `processes`.

    Returns the findings; each ends with the command that runs its case again.
    """
    say(f"seed {seed}")
    workers = {target: Worker(target, processes) for target in targets}
    used, count = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0)
    findings, kinds = [], collections.Counter()
    try:
        while sum(used.values()) < seconds and min(count.values()) < max_cases:
            target = min(targets, key=lambda name: used[name] if count[name] < max_cases else float("inf"))
            digest = hashlib.sha256(f"{seed}/{target}/{count[target]}".encode()).digest()
            case = int.from_bytes(digest[:4], "little")
            if workers[target].process is None:
                workers[target].start()  # not on the clock: most of it is the import of torch
            began = time.monotonic()
            finding = workers[target].run(case)
            used[target] += time.monotonic() - began
            count[target] += 1
            if finding:
                again = " ".join([f"python -m tests.fuzz --only {target} --case {case}", *workers[target].options])
                findings.append(f"{target}: {finding}\n    {again}")
                kind = target + re.sub(r"[-+]?\d[\d.e+-]*|'[^']*'", "#", finding)[:90]
                kinds[kind] += 1
                if kinds[kind] <= 3:
                    say(findings[-1])
    finally:
        for worker in workers.values():
            worker.close()
    for kind, number in kinds.most_common():
        if number > 3:
            say(f"{number} times: {kind}")
    say(f"seed {seed}: " + ", ".join(f"{count[name]} {name}" for name in targets) + f"; {len(findings)} findings")
    return findings
