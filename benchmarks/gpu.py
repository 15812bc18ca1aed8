"""The operators on one GPU, in stages: correctness first, then times against floors, choices, other projects, tests.

    python benchmarks/gpu.py --out results                        everything, in at most seven minutes
    python benchmarks/gpu.py --out results --stages loss,logits   some stages
    python benchmarks/gpu.py --dry-run                            tiny sizes on a CPU: does it run, and is it right
    python benchmarks/plot.py results/gpu-….json                  draws it

Every stage (gpu_stages/) runs in its own process, which is killed with its children at its time limit, so that a fault
in one stage does not affect the others. Every result is appended to OUT/rows.jsonl at once. At the end, also after
faults, OUT/gpu-DEVICE-DATE.json contains all of them, and a table of at most 10,000 characters is printed last. Stages
print to OUT/log.txt. See device.md for how to run this on a machine without a package index.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

from arguments import amount  # noqa: E402
from gpu_stages import STAGES, Stage  # noqa: E402
from gpu_stages.rows import Rows  # noqa: E402

BEGIN = time.monotonic()  # imports come off a stage's time
CLOSING_S = 5.0  # kept for the summary and the table
SHORTEST_S = 5.0  # a stage is not started with less
TABLE_CHARACTERS = 10_000
Command = Callable[[str, float], list[str]]


# ---- the runner -----------------------------------------------------------------------------------------------------


class Runner:
    """Runs stages one after the other within a total time.

    Args:
        command: (stage, seconds it has) -> the command line of its process.
        out: folder of rows.jsonl and log.txt.
    """

    def __init__(self, stages: dict[str, Stage], command: Command, out: Path, budget_s: float) -> None:
        self.stages, self.command, self.budget_s = stages, command, budget_s
        self.rows, self.log_path = Rows(out / "rows.jsonl"), out / "log.txt"
        self.begin = time.monotonic()
        self.process: subprocess.Popen | None = None

    def left(self) -> float:
        return self.budget_s - (time.monotonic() - self.begin) - CLOSING_S

    def run(self) -> None:
        with open(self.log_path, "ab", buffering=0) as log:
            for name, stage in self.stages.items():
                log.write(f"\n==== {name}, {self.left():.0f} s left\n".encode())
                begin = time.monotonic()
                fields = self.run_stage(name, stage, log)
                seconds = round(time.monotonic() - begin, 1)
                row = {"stage": name, "case": "stage", "name": name, "seconds": seconds, **fields}
                self.rows.append(row)
                print(f"{name}: {row['status']} {row.get('error', '')} ({seconds} s)", flush=True)

    def run_stage(self, name: str, stage: Stage, log: BinaryIO) -> dict:
        """Start the stage, again where it crashed or a case of it hung: it goes on after the case that did."""
        end = time.monotonic() + min(stage.seconds, self.left())
        trouble = []
        for attempt in range(stage.attempts):
            seconds = end - time.monotonic()
            if seconds < SHORTEST_S:
                if attempt == 0:
                    return {"status": "skipped", "error": "no time left"}
                break
            begin, size = time.monotonic(), self.rows.size()
            self.process = subprocess.Popen(
                self.command(name, seconds), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            reason = self.wait(seconds, stage.case_seconds)
            self.kill()
            if reason is None:
                return {"status": "ok"} if not trouble else {"status": "error", "error": "; ".join(trouble)}
            trouble.append(f"{reason} after {time.monotonic() - begin:.0f} s")
            if self.rows.size() == size:  # it did not even begin a case: it would not the next time either
                break
            self.close_case(name, reason)
        return {"status": "error", "error": "; ".join(trouble)}

    def wait(self, seconds: float, case_seconds: float) -> str | None:
        """None when the process ended well; else why it did not, and then it may still run."""
        begin = last_row = time.monotonic()
        size = self.rows.size()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(timeout=0.1)
                return None if code == 0 else f"crashed with code {code}"
            now = time.monotonic()
            if self.rows.size() != size:
                size, last_row = self.rows.size(), now
            if now - begin > seconds:
                return "killed at its time limit"
            if now - last_row > case_seconds:
                return f"killed, no row for {case_seconds:.0f} s"

    def kill(self) -> None:
        """The stage's process and all that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def close_case(self, stage: str, reason: str) -> None:
        """The case that the stage was at when it crashed gets its row."""
        last: dict[tuple[str, str], dict] = {}
        for row in self.rows.read():
            if row["stage"] == stage:
                last[row["case"], row["name"]] = row
        for row in last.values():
            if row["status"] == "started":
                self.rows.append({**row, "status": "error", "error": reason})


def environment() -> dict[str, str]:
    """Of the stages: one compiler cache for all, and this source tree first on the path."""
    path = [str(ROOT), str(ROOT / "kernels"), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    cache = Path(tempfile.gettempdir()) / f"fastppo-benchmark-cache-{os.getuid()}"
    return {
        "TRITON_CACHE_DIR": str(cache),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


# ---- one stage ------------------------------------------------------------------------------------------------------


def run_one_stage(options: argparse.Namespace) -> None:
    """In the stage's own process."""
    import importlib

    import torch
    from gpu_stages.bench import Bench, WarmUp

    device = torch.device("cpu" if options.dry_run else "cuda")
    arguments = (options.stage, options.out, device, options.seconds - (time.monotonic() - BEGIN))
    module = importlib.import_module(f"gpu_stages.{options.stage}")
    if options.worker is not None:
        module.work(WarmUp(*arguments, tiny=options.tiny, worker=options.worker, workers=options.workers))
        return
    bench = Bench(*arguments, tiny=options.tiny)
    if not any(row["name"] == "machine" for row in bench.rows.read()):
        bench.row("machine", "machine", "ok", **machine(device))
    module.run(bench)
    if bench.late:
        bench.row("stage", "left out", "skipped", error=f"no time for {len(bench.late)}: {'; '.join(bench.late)}"[:300])


def machine(device) -> dict:
    import torch

    try:
        import triton
    except ImportError:
        triton = None
    found = {
        "device": platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "not installed",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return found


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# ---- the table ------------------------------------------------------------------------------------------------------


def table(report: dict, limit: int = TABLE_CHARACTERS) -> str:
    """The report in at most `limit` characters: the longest sections are cut from their ends, then whole ones go."""
    rows = report["rows"]
    sections = [heading(report), *verdict_sections(rows), *step_sections(rows), *timed_sections(rows)]
    lengths = [len(section) for section in sections]

    def text() -> str:
        parts = []
        for section, length in zip(sections, lengths, strict=False):
            parts += section + [f"… {length - len(section)} more in rows.jsonl"] * (len(section) < length)
        return "\n".join(parts + ["… more in rows.jsonl"] * (len(sections) < len(lengths)))

    while len(text()) > limit:
        longest = max(sections, key=lambda section: sum(map(len, section)) if len(section) > 3 else 0)
        if len(longest) > 3:
            longest.pop()
        else:
            sections.pop()
    return text()


def heading(report: dict) -> list[str]:
    names = ("device", "date", "torch", "triton", "python", "cuda", "driver", "commit", "seconds")
    stages = [row for row in report["rows"] if row["case"] == "stage"]
    lines = [", ".join(f"{name} {report[name]}" for name in names if report.get(name))]
    for row in stages:
        seconds = f"{row['seconds']:.0f} s" if "seconds" in row else ""
        lines.append(clip(f"{row['stage']:12} {row['name'] if row['name'] != row['stage'] else ''}{row['status']:8} "
                          f"{seconds:>5} {row.get('error', '')}", 150))  # fmt: skip
    return lines


def verdict_sections(rows: list[dict]) -> Iterable[list[str]]:
    """Correctness by operator and dtype, then every other row with nothing but a verdict."""
    checked = [row for row in rows if row["stage"] == "correctness" and row["case"] not in ("stage", "machine")]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in checked:
        groups.setdefault((row["name"].split()[0], row["case"].split(", ")[-1]), []).append(row)
    lines = []
    for (operator, dtype), found in groups.items():
        bad = [row for row in found if row["status"] != "PASS"]
        worst = max((row["worst"] for row in found if "worst" in row), default=float("nan"))
        verdict = "FAIL" if bad else "PASS"
        lines.append(f"{verdict} {operator:22} {dtype:9} {len(found) - len(bad)} of {len(found)}, {worst:.2f}")
        lines += [clip(f"  {describe(row)}", 170) for row in bad]
    if lines:
        yield ["-- correctness against float64: cases passed, worst error as a share of what is allowed", *lines]
    lines = []
    order = {"FAIL": 0, "PASS": 1, "ok": 2, "error": 3, "skipped": 4}  # what may be cut off stands last
    for row in sorted(rows, key=lambda row: order[row["status"]]):
        told = row["stage"] == "correctness" or row["case"] in ("stage", "machine") or row.get("trial")
        told = told or "phases" in row
        if not told and ("ms" not in row or "code" in row):
            lines.append(clip(describe(row), 170 if "code" in row else 130))
    if lines:
        yield ["-- besides", *lines]


def describe(row: dict) -> str:
    extra = {k: row[k] for k in ("worst", "worst_of", "checks", "passed", "failed", "finished", "cases", "before",
             "after", "seconds", "tokens_per_s") if k in row}  # fmt: skip
    words = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in extra.items()]
    if "code" in row:
        words = [f"{row['ms']:.3f} ms, the shipped one {row['floor_ms']:.3f}" if "ms" in row else "", row["code"]]
    return f"{row['status']} {row['case']}: {row['name']}; {row.get('error') or ' '.join(words)}"


def step_sections(rows: list[dict]) -> Iterable[list[str]]:
    """Whole training steps: seconds, sampled tokens a second and peak memory of each phase."""
    cases: dict[str, list[dict]] = {}
    for row in rows:
        if "phases" in row:
            cases.setdefault(row["case"], []).append(row)
    for case, found in cases.items():
        lines = [f"-- {case}", f"{'':48}{'s':>8}{'tokens/s':>10}{'GiB':>8}{'planned':>9}"]
        for row in found:
            more = "".join(f", {n} did not fit" for n in row.get("did_not_fit", ()))
            taken = f", took {row['sequences_a_pass']}" if more else ""
            lines.append(clip(f"{row['status']} {row['name']}{more}{taken}{'; ' if 'error' in row else ''}"
                              f"{row.get('error', '')}", 150))  # fmt: skip
            step = {key: row.get(key) for key in ("seconds", "tokens_per_s", "peak_gib", "planned_gib")}
            for phase, cells in (row["phases"] | {"step": step}).items():
                figures = (cells.get("seconds"), cells.get("tokens_per_s"), cells.get("peak_gib"))
                text = "".join(number(v, form) for v, form in zip(figures, ("8.2f", "10.0f", "8.2f"), strict=True))
                lines.append(f"  {phase:46}{text}{number(cells.get('planned_gib'), '9.2f')}".rstrip())
        yield lines


COLUMNS = f"{'':42}{'ms':>9}{'±%':>4}{'ratio':>6}     {'TFLOP/s':>8}{'GB/s':>6}{'+MiB':>7}  launches"


def timed_sections(rows: list[dict]) -> Iterable[list[str]]:
    """A section for each shape: time, spread, ratio to the floor, verdict, rates, memory beyond inputs, launches.

    What others are compared with, products or a copy, stands in the section's first line.
    """
    cases: dict[str, list[dict]] = {}
    for row in rows:
        if "ms" in row and not row.get("trial") and "code" not in row:
            cases.setdefault(row["case"], []).append(row)
    if cases:
        yield [COLUMNS]
    for case, found in cases.items():
        floors = [row for row in found if row["name"].startswith(("product ", "copy "))]
        if len(floors) == len(found):
            floors = []
        yield [title(case, floors), *(timed_line(row) for row in found if row not in floors)]


def title(case: str, floors: list[dict]) -> str:
    if not floors:
        return f"-- {case}"
    times = " + ".join(f"{row['ms']:.3f}" for row in floors)
    total, flops = sum(row["ms"] for row in floors), [row["ms"] * row["tflops"] for row in floors if "tflops" in row]
    rate = f" = {total:.3f} ms, {sum(flops) / total:.0f} TFLOP/s" if flops else f" ms, {floors[0]['gb_per_s']:.0f} GB/s"
    return f"-- {case}; {'products' if flops else 'copy'} {times}{rate}"


def timed_line(row: dict) -> str:
    spread = 50 * (row["max_ms"] - row["min_ms"]) / row["ms"] if "max_ms" in row else None
    verdict = f" {row['status']}" if "goal" in row else ""
    cells = [
        f"{clip(row['name'].removeprefix('peer: '), 42):42}{row['ms']:9.3f}{number(spread, '4.0f')}",
        f"{number(row.get('ratio'), '6.2f')}{verdict:5}{number(row.get('tflops'), '8.0f')}",
        f"{number(row.get('gb_per_s'), '6.0f')}{number(row.get('extra_mib'), '7.0f')}",
        f"{number(row.get('launches'), '6.0f')}",
    ]
    return "".join(cells).rstrip()


def number(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0]) if value is None else format(value, form)


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def verdict_of_dry_run(rows: list[dict]) -> tuple[str, bool]:
    """'N checks, worst error X, PASS', and whether it passed."""
    checks = sum(row.get("checks", 1) for row in rows if row["status"] in ("PASS", "FAIL"))
    errors = [e["error"][0] for row in rows for e in row.get("errors", {}).values()]
    differences = [row["difference"] for row in rows if "difference" in row]
    worst = max([*errors, *differences], default=0.0)
    bad = [
        row
        for row in rows
        if row["status"] == "FAIL" or (row["status"] == "error" and not row["name"].startswith("peer: "))
    ]
    lines = [clip(describe(row), 300) for row in bad[:20]]
    lines.append(f"{checks} checks, worst error {worst:.1e}, {'FAIL' if bad or not checks else 'PASS'}")
    return "\n".join(lines), not bad and checks > 0


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; default: a new temporary one")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all of them, in order")
    parser.add_argument("--budget-s", type=amount, default=420, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    parser.add_argument("--commit", help="what is measured, where the source tree has no git")
    parser.add_argument("--summarize", action="store_true", help="only write OUT's summary, of a run that was killed")
    inner = parser.add_argument_group("used by the stages' processes")
    inner.add_argument("--stage", choices=STAGES)
    inner.add_argument("--seconds", type=float, default=60.0)
    inner.add_argument("--tiny", action="store_true")
    inner.add_argument("--workers", type=int)
    inner.add_argument("--worker", type=int)
    options = parser.parse_args(arguments)
    if unknown := set(options.stages.split(",")) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.stage:
        run_one_stage(options)
        return 0
    out = options.out or Path(tempfile.mkdtemp(prefix="fastppo-gpu-"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: {out}: {error.strerror}") from None
    if options.summarize:
        conclude(Rows(out / "rows.jsonl"), out, options, "")
        return 0
    if (out / "rows.jsonl").exists():
        raise SystemExit(f"{out}: has the rows of another run; give another folder")
    os.environ.update(environment() | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if options.dry_run else {}))
    flags = ["--dry-run", "--tiny"] if options.dry_run else []

    def command(stage: str, seconds: float) -> list[str]:
        own = [sys.executable, str(BENCHMARKS / "gpu.py"), "--stage", stage, "--seconds", f"{seconds:.1f}"]
        return [*own, "--out", str(out), *flags]

    chosen = options.stages.split(",")
    stages = {name: stage for name, stage in STAGES.items() if name in chosen}
    runner = Runner(stages, command, out, options.budget_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ok = True
    try:
        runner.run()
    finally:
        runner.kill()
        seconds = f"{time.monotonic() - runner.begin:.0f} of {runner.budget_s:.0f}"
        ok = conclude(runner.rows, out, options, seconds)
    return 0 if ok else 1


def conclude(results: Rows, out: Path, options: argparse.Namespace, seconds: str) -> bool:
    """Write the summary and print the table, from what there is; whether a dry run passed."""
    rows = [row for row in results.read() if row["status"] != "started"]
    about = next((row for row in rows if row["name"] == "machine"), {})
    about = {k: v for k, v in about.items() if k not in ("stage", "case", "name", "status")}
    date = datetime.date.today().isoformat()
    report = {"device": "unknown device", **about, "date": date, "commit": options.commit or commit()}
    report |= {"seconds": seconds, "rows": rows}
    if options.dry_run:
        text, passed = verdict_of_dry_run(rows)
        print(text, flush=True)
        return passed
    device = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = out / f"gpu-{device}-{date}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    print(f"written: {path}\n\n{table(report)}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
