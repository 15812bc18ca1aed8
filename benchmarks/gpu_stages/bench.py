"""What a stage of benchmarks/gpu.py works with: rows, times, memory, launches."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpu_stages.rows import Rows

Call = Callable[[], object]

# A stage leaves this much of its time unused: for the last case to end in.
RESERVE_S = 3.0
POISONED = 70  # exit code after an error that leaves the CUDA context unusable: the runner starts the stage again


class Bench:
    """Runs the cases of one stage; every result is a row.

    Attributes:
        device: where to measure. On a CPU (the dry run) nothing is timed.
        tiny: use sizes that the interpreter and compute-sanitizer get through in seconds.
        dtype: of hidden states and weights, where a case does not say.
        seconds: how long the stage may take.
    """

    def __init__(self, stage: str, out: Path, device: torch.device, seconds: float, *, tiny: bool = False) -> None:
        self.stage, self.out, self.device, self.tiny = stage, out, device, tiny
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.backend = "triton"
        self.end = time.monotonic() + seconds
        self.rows = Rows(out / "rows.jsonl")
        before = self.rows.read()
        # What an earlier process of this stage began, by (case, name), with its milliseconds if it got so far.
        self.earlier = {(r["case"], r["name"]): r.get("ms") for r in before if r["stage"] == stage}
        self.failed = {
            (r["operator"], r["dtype"]) for r in before if r.get("bars") and r["status"] in ("FAIL", "error")
        }
        self.late: list[str] = []
        self._flush: torch.Tensor | None = None

    def left(self) -> float:
        """Seconds until the stage should end."""
        return self.end - time.monotonic() - RESERVE_S

    def shape(self, tokens: int, dim: int, vocab: int) -> tuple[int, int, int]:
        """What to use where a case has so many tokens, hidden size and vocabulary."""
        return (37, 32, 101) if self.tiny else (tokens, dim, vocab)

    def budget(self, mebibytes: float) -> int:
        """Scratch memory in bytes, to go with `shape`."""
        return int(mebibytes * 2**20) if not self.tiny else 2**14

    # ---- rows -------------------------------------------------------------------------------------------------------

    def row(self, case: str, name: str, status: str, **fields: object) -> None:
        """Append a row; status: ok, PASS, FAIL, error, skipped, or started."""
        row = {"stage": self.stage, "case": case, "name": name, "status": status, **fields}
        self.rows.append(row)
        if status != "started":
            print(json.dumps(row, ensure_ascii=False), flush=True)

    def attempt(self, case: str, name: str, function: Callable[[], dict], **about: object) -> None:
        """Append the row that function() returns, with its `status`; an error becomes a row and the stage goes on.

        A case that an earlier process of this stage began (and perhaps crashed in) is not begun again. `about` is in
        the row whatever happens.
        """
        if (case, name) in self.earlier:
            return
        if self.left() <= 0:
            self.late.append(f"{case}: {name}")
            return
        self.row(case, name, "started", **about)
        try:
            fields = {"status": "ok", **function()}
        except Exception as error:
            fields = {"status": "error", "error": describe(error)}
        self.row(case, name, **about, **fields)
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"the CUDA context is unusable: {describe(error)}", flush=True)
            sys.stdout.flush()
            os._exit(POISONED)

    def allowed(self, case: str, name: str, operator: str | None, dtype: torch.dtype | None = None) -> bool:
        """False, with a row that says so, if the operator failed its correctness checks in this dtype."""
        if operator is None or (operator, short(dtype or self.dtype)) not in self.failed:
            return True
        if (case, name) not in self.earlier:
            self.row(case, name, "skipped", error=f"{operator} failed correctness")
        return False

    # ---- times ------------------------------------------------------------------------------------------------------

    def time(
        self,
        case: str,
        name: str,
        make: Callable[[], Call],
        *,
        operator: str | None = None,
        dtype: torch.dtype | None = None,
        floor_ms: float | None = None,
        goal: float | None = None,
        flops: float | None = None,
        moved: float | None = None,
        trial: bool = False,
    ) -> float | None:
        """A row for the call that make() returns: time, spread, memory, launches. Returns milliseconds, if measured.

        Args:
            operator, dtype: what the call needs to be correct; the dtype is the bench's if not given.
            floor_ms, goal: what no implementation can be faster than, and the greatest ratio to it that is a PASS.
            flops, moved: work and bytes that the result needs at least, for TFLOP/s and GB/s.
            trial: one of several, of which the table shows the best alone.
        """
        if (case, name) in self.earlier:
            return self.earlier[case, name]
        if not self.allowed(case, name, operator, dtype):
            return None
        measured: dict[str, float] = {}

        def measure() -> dict:
            call = make()
            call()
            if not self.on_gpu:
                return {}
            found: dict = {"extra_mib": round(self.extra_memory(call), 1)}
            times = self.milliseconds(call)
            ms = measured["ms"] = statistics.median(times)
            found |= {"ms": ms, "min_ms": min(times), "max_ms": max(times), "rounds": len(times)}
            if floor_ms:
                found |= {"floor_ms": floor_ms, "ratio": ms / floor_ms}
            if floor_ms and goal:
                found |= {"goal": goal, "status": "PASS" if ms <= goal * floor_ms else "FAIL"}
            if flops:
                found["tflops"] = flops / ms / 1e9
            if moved:
                found["gb_per_s"] = moved / ms / 1e6
            if trial:
                found["trial"] = True
            if ms < 1000:
                found["launches"] = launches(call)
            return found

        self.attempt(case, name, measure)
        return measured.get("ms")

    def milliseconds(self, call: Call, seconds: float = 0.5, rounds: int = 30) -> list[float]:
        """Device time of one call, several times, L2 overwritten before each; about `seconds` in all.

        The device is kept busy until the call is enqueued, so that the host's part of a short call is not measured.
        """
        call()
        if self._flush is None:
            self._flush = torch.empty(2**28, dtype=torch.int8, device=self.device)
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 3 or (len(times) < rounds and time.monotonic() - begin < seconds):
            self._flush.random_(0, 127)
            torch.cuda._sleep(1_000_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return times

    def extra_memory(self, call: Call) -> float:
        """MiB at a call's peak beyond what is allocated before it: inputs, and the gradients of the call before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def products(self, case: str, tokens: int, dim: int, vocab: int) -> tuple[float, float] | tuple[None, None]:
        """Milliseconds of the product h Wᵀ alone, and of it with dz W and dzᵀ h: three rows, each a product of cuBLAS.

        They are the floor of a forward and of a loss. In float32 or bfloat16, whatever the bench has.
        """

        def make(which: int) -> Callable[[], Call]:
            def prepare() -> Call:
                h, w = (torch.randn(n, dim, device=self.device).to(self.dtype) for n in (tokens, vocab))
                z = h @ w.t()
                if which == 0:
                    return lambda: torch.mm(h, w.t(), out=z)
                a, b = (z, w) if which == 1 else (z.t(), h)
                out = torch.empty(a.shape[0], dim, dtype=self.dtype, device=self.device)
                return lambda: torch.mm(a, b, out=out)

            return prepare

        flops = 2.0 * tokens * dim * vocab
        times = [
            self.time(case, name, make(which), flops=flops)
            for which, name in enumerate(("product h Wᵀ", "product dz W", "product dzᵀ h"))
        ]
        return (None, None) if None in times else (times[0], sum(times))


class WarmUp(Bench):
    """Runs a share of the cases once, with few tokens and no row, so that the compiler's cache has their kernels.

    Token counts and budgets shrink together, so that an operator tiles as it does at full size.
    """

    SHRINK = 8
    ROOM = 12 * 2**30  # bytes that are free before a case begins

    def __init__(self, *arguments, worker: int, workers: int, **options) -> None:
        super().__init__(*arguments, **options)
        self.worker, self.workers, self.number, self.share, self.compiled = worker, workers, 0, 0, 0
        self.earlier, self.failed = {}, set()

    def shape(self, tokens: int, dim: int, vocab: int) -> tuple[int, int, int]:
        return super().shape(tokens, dim, vocab) if self.tiny else (tokens // self.SHRINK, dim, vocab)

    def budget(self, mebibytes: float) -> int:
        return super().budget(mebibytes) if self.tiny else super().budget(mebibytes) // self.SHRINK

    def attempt(self, case: str, name: str, function: Callable[[], dict], **_: object) -> None:
        self.number += 1
        if self.number % self.workers != self.worker:
            return
        self.share += 1
        while self.on_gpu and torch.cuda.mem_get_info()[0] < self.ROOM and self.left() > 0:
            time.sleep(0.2)  # the other processes use it
        if self.left() <= 0:
            return
        try:
            function()
            self.compiled += 1
        except Exception as error:  # the stage itself will say so in its row
            print(f"{case}: {name}: {describe(error)}", flush=True)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time(self, case: str, name: str, make: Callable[[], Call], **_: object) -> None:
        def once() -> dict:
            make()()
            return {}

        self.attempt(case, name, once)

    def row(self, *arguments: object, **fields: object) -> None:
        pass

    def products(self, *arguments: object) -> tuple[None, None]:
        return None, None


def launches(call: Call) -> int | None:
    """Kernels that one call launches; None if the profiler does not work here."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profiled.events() if e.device_type == DeviceType.CUDA]
    except Exception:
        return None
    return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels)


def run_within(seconds: float, command: list[str], path: Path, **options) -> tuple[int | None, str]:
    """The exit code, None if it had to be killed, and what it printed.

    Through a file: a pipe stays open for as long as any process that was started holds it. The runner kills those.
    """
    with open(path, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            code = process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    text = path.read_text(errors="replace")
    path.unlink()
    print(text[-100_000:], flush=True)
    return code, text


def describe(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}"[:200]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
