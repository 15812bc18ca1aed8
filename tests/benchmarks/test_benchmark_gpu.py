"""benchmarks/gpu.py without a GPU: its dry run, and a runner that loses no result whatever a stage does."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def gpu(benchmarks):
    import gpu

    return gpu


# ---- the dry run ----------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def dry_run(out: Path, *arguments: str) -> list[str]:
    """What the command prints, line by line."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(out), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    log = out / "log.txt"
    assert run.returncode == 0, run.stdout + run.stderr + (log.read_text()[-4000:] if log.exists() else "")
    return run.stdout.splitlines()


@needs_triton
def test_a_dry_run_ends_in_one_line_and_gives_no_figures(tmp_path):
    lines = dry_run(tmp_path / "out", "--stages", "ceilings,graph")
    assert [line.split(":")[0] for line in lines[:-1]] == ["ceilings", "graph"]
    assert lines[-1].startswith("14 checks, worst error 0.0e+00, PASS")
    assert not any(word in "\n".join(lines) for word in ("ratio", "TFLOP", "GB/s"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows if row["case"] == "CUDA graph"} == {"started", "PASS"}
    assert not any("ms" in row for row in rows)


# ---- the verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spoil", "status"),
    [
        ("∂weight", lambda t: t, "PASS"),
        ("∂weight", lambda t: t * 1.001, "FAIL"),
        ("∂weight", lambda t: t.index_fill(0, torch.tensor([100]), 0.0), "FAIL"),
        ("∂hidden", lambda t: t.masked_fill(t == t.max(), torch.nan), "FAIL"),
        ("loss", lambda t: t + 1e-3, "FAIL"),
    ],
)
def test_an_operator_that_is_wrong_fails(benchmarks, monkeypatch, tmp_path, name, spoil, status):
    from gpu_stages import correctness
    from gpu_stages.bench import Bench

    bench = Bench("correctness", tmp_path, torch.device("cpu"), 60.0, tiny=True)
    bench.backend = "chunked"
    (case,) = [c for c in correctness.CASES if c.dtype == torch.float32 and c.operator == "linear_ppo_loss"]
    right = correctness.outputs

    def outputs(case, x, mask, backend):
        found = right(case, x, mask, backend)
        return found if backend == "reference" else found | {name: spoil(found[name])}

    monkeypatch.setattr(correctness, "outputs", outputs)
    row = correctness.check(correctness.shrink(case, bench), bench)
    assert (row["status"], row["checks"]) == (status, 5)
    assert status == "PASS" or row["worst_of"] == name


def test_no_more_is_asked_than_the_dtype_can_hold(benchmarks):
    from gpu_stages import correctness

    exact = 1e-7 * torch.randn(64, 64, dtype=torch.float64)  # float16's smallest number is 6e-8
    for rounding in correctness.measures(exact.half(), exact, None):
        assert rounding > correctness.NAIVE_AT_MOST
        assert rounding < correctness.allowed(0.5, rounding, 1e-4) < 1.5 * rounding
    assert correctness.allowed(0.5, 0.001, 1e-4) < 0.03


def test_an_operator_that_failed_is_left_out_and_what_was_begun_is_not_begun_again(benchmarks, tmp_path):
    from gpu_stages.bench import Bench

    checks = Bench("correctness", tmp_path, torch.device("cpu"), 60.0)
    about = {"dtype": "float32", "bars": True}
    checks.attempt("D 32", "wrong", lambda: {"status": "FAIL"}, operator="gae", **about)
    checks.attempt("D 32", "broken", lambda: 1 / 0, operator="ppo_loss", **about)
    checks.attempt("D 32", "right", lambda: {"status": "PASS"}, operator="linear_kl", **about)
    checks.attempt("D 32", "seldom used", lambda: {"status": "FAIL"}, operator="linear_logprob", dtype="float32")

    calls = []
    for _ in range(2):
        bench = Bench("loss", tmp_path, torch.device("cpu"), 60.0)
        for operator in ("gae", "ppo_loss", "linear_kl", "linear_logprob"):
            bench.time("shape", operator, lambda o=operator: lambda: calls.append(o), operator=operator)
    assert calls == ["linear_kl", "linear_logprob"]
    statuses = {row["name"]: row["status"] for row in bench.rows.read() if row["stage"] == "loss"}
    assert statuses == {"gae": "skipped", "ppo_loss": "skipped", "linear_kl": "ok", "linear_logprob": "ok"}


def test_a_time_becomes_a_verdict(benchmarks, tmp_path, monkeypatch):
    """The GPU's part is replaced: five times of 2 to 4 ms, 10 MiB, 3 launches."""
    from gpu_stages import bench as module

    bench = module.Bench("loss", tmp_path, torch.device("cpu"), 60.0)
    bench.on_gpu = True
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(bench, "milliseconds", lambda call: [4.0, 2.0, 3.0, 3.0, 3.5])
    monkeypatch.setattr(bench, "extra_memory", lambda call: 10.0)
    monkeypatch.setattr(module, "launches", lambda call: 3)
    for name, goal in (("near", 1.6), ("far", 1.4)):
        given = {"floor_ms": 2.0, "goal": goal, "flops": 6e12, "moved": 3e9}
        assert bench.time("shape", name, lambda: lambda: None, **given) == 3.0
    near, far = (row for row in bench.rows.read() if row["status"] != "started")
    assert (near["status"], far["status"]) == ("PASS", "FAIL")
    assert (near["ratio"], near["tflops"], near["gb_per_s"]) == (1.5, 2000.0, 1000.0)
    assert (near["min_ms"], near["max_ms"], near["extra_mib"], near["launches"]) == (2.0, 4.0, 10.0, 3)


ALONE = """
tests/test_few.py::test_right[a b] PASSED                                [ 25%]
tests/test_few.py::test_wrong FAILED                                     [ 50%]
tests/test_few.py::test_broken ERROR                                     [ 75%]
tests/test_few.py::test_left_out SKIPPED (no such chip)                  [100%]
"""
XDIST = """
tests/test_few.py::test_right[a b]
[gw0] [ 25%] PASSED tests/test_few.py::test_right[a b]
[gw1] [ 50%] FAILED tests/test_few.py::test_wrong
[gw0] [ 75%] ERROR tests/test_few.py::test_broken
[gw1] [100%] SKIPPED tests/test_few.py::test_left_out
"""
REPEATED = """
==================================== ERRORS ====================================
________________________ ERROR at setup of test_broken _________________________
=========================== short test summary info ============================
FAILED tests/test_few.py::test_wrong - assert 0
"""


@pytest.mark.parametrize("text", [ALONE, XDIST], ids=["alone", "xdist"])
def test_a_test_run_is_counted_from_what_it_printed(benchmarks, text):
    from gpu_stages import tests

    for code, printed in ((1, text + REPEATED), (None, text)):
        row = tests.judge(code, printed)
        assert (row["status"], row["passed"], row["failed"]) == ("FAIL", 1, 2)
        assert row["error"] == "tests/test_few.py::test_wrong; tests/test_few.py::test_broken"
        assert row["finished"] == (code is not None)
    right = "".join(line for line in text.splitlines(keepends=True) if "FAILED" not in line and "ERROR" not in line)
    assert tests.judge(0, right)["status"] == tests.judge(None, right)["status"] == "PASS"
    assert tests.judge(2, right)["status"] == "FAIL"
    assert tests.judge(None, "")["status"] == "skipped"


def test_what_a_program_printed_survives_its_end_and_its_children(benchmarks, tmp_path):
    """A child that holds the output open does not keep the stage waiting."""
    from gpu_stages.bench import run_within

    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])"
    begin = time.monotonic()
    assert run_within(15, [sys.executable, "-c", f"{child}; print('early'); sys.exit(3)"], tmp_path / "a") == (
        3,
        "early\n",
    )
    assert time.monotonic() - begin < 15
    code = "import time; print('early', flush=True); time.sleep(600)"
    assert run_within(4, [sys.executable, "-c", code], tmp_path / "b") == (None, "early\n")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_without_time_says_what_it_left_out(benchmarks, tmp_path):
    from gpu_stages.bench import Bench

    bench = Bench("loss", tmp_path, torch.device("cpu"), 0.0)
    bench.time("shape", "loss", lambda: pytest.fail("it was begun"))
    assert bench.late == ["shape: loss"]
    assert bench.rows.read() == []


# ---- whole steps ----------------------------------------------------------------------------------------------------


def test_a_random_model_has_the_published_shapes_and_never_ends_a_text(benchmarks, tmp_path):
    from gpu_stages import random_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert round(random_model.num_parameters(random_model.configuration("Llama-3.2-1B")) / 1e9, 3) == 1.236
    tree = random_model.configuration("Qwen3-8B", tiny=True)
    random_model.write_model(tmp_path, tree, device=torch.device("cpu"))
    random_model.write_prompts(tmp_path / "prompts.txt", 3, 11)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    weight = model.model.layers[1].mlp.up_proj.weight
    assert 0.5 < weight.std() / tree["initializer_range"] < 2.0
    assert model.generation_config.eos_token_id >= model.get_input_embeddings().num_embeddings
    ids = AutoTokenizer.from_pretrained(tmp_path)((tmp_path / "prompts.txt").read_text().splitlines())["input_ids"]
    assert [len(row) for row in ids] == [11, 11, 11]
    assert len(set(map(tuple, ids))) == 3


@pytest.mark.parametrize(("largest", "size", "too_large"), [(3, 2, [8, 4]), (8, 8, []), (0, None, None)])
def test_a_plain_step_takes_as_many_sequences_as_fit(benchmarks, tmp_path, monkeypatch, largest, size, too_large):
    from gpu_stages import training_step
    from gpu_stages.bench import Bench

    from fastppo.training.config import build_config

    class Step:
        optimizer = torch.optim.SGD([torch.zeros(1)])

        def __init__(self, *_):
            pass

        def __call__(self, size, new_tokens, phases):
            for name in ("rollout", "score", "update"):
                with phases(name):
                    pass
            if new_tokens == 32 and size > largest:
                raise torch.OutOfMemoryError("no room")
            return [0.0, -0.1]

    monkeypatch.setattr(training_step, "PlainStep", Step)
    bench = Bench("step", tmp_path, torch.device("cpu"), 60.0)
    given = {"model": {"name_or_path": "m"}, "data": {"train": "p"}}
    row = training_step.plain_step(bench, build_config(given), None, 8)
    assert (row.get("sequences_a_pass"), row.get("did_not_fit")) == (size, too_large)
    assert row["status"] == ("skipped" if size is None else "PASS")


def test_the_table_has_the_phases_of_a_step(gpu):
    phases = {
        "rollout": {"seconds": 5.25, "tokens_per_s": 3121.0, "peak_gib": 30.12, "planned_gib": 31.04},
        "update": {"seconds": 7.5, "tokens_per_s": 2184.0, "peak_gib": 40.25},
    }
    common = {"stage": "step_full", "case": "a model", "phases": phases, "seconds": 12.75, "tokens_per_s": 1285.0}
    rows = [
        common | {"name": "fastppo", "status": "FAIL", "error": "not so: finite"},
        common | {"name": "plain", "status": "PASS", "did_not_fit": [8, 4], "sequences_a_pass": 2},
    ]
    text = gpu.table({"device": "none", "rows": rows})
    assert "FAIL fastppo; not so: finite" in text
    assert "PASS plain, 8 did not fit, 4 did not fit, took 2" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  ")][-3:] == [
        ["rollout", "5.25", "3121", "30.12", "31.04"], ["update", "7.50", "2184", "40.25"], ["step", "12.75", "1285"],
    ]  # fmt: skip


@needs_triton
def test_a_dry_run_takes_both_steps_of_a_model_in_four_bits(tmp_path):
    for name in ("bitsandbytes", "peft"):
        pytest.importorskip(name)
    assert dry_run(tmp_path / "out", "--stages", "step_nf4")[-1].startswith("7 checks")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows if "phases" in row] == ["PASS", "PASS"]


# ---- the runner -----------------------------------------------------------------------------------------------------

STAGE = """
import os, pathlib, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu_stages.rows import Rows
rows = Rows(pathlib.Path({rows!r}))
begun = {{r["name"] for r in rows.read() if r["stage"] == {stage!r}}}
def row(name, status, **fields):
    rows.append({{"stage": {stage!r}, "case": "c", "name": name, "status": status, **fields}})
{body}
"""


def runner(gpu, out: Path, budget_s: float, **bodies: str):
    """A Runner of stages whose processes run these bodies: 15 s for each, 4 s without a row."""
    out.mkdir(exist_ok=True)

    def command(stage: str, seconds: float) -> list[str]:
        code = STAGE.format(benchmarks=str(BENCHMARKS), rows=str(out / "rows.jsonl"), stage=stage, body=bodies[stage])
        return [sys.executable, "-c", code]

    return gpu.Runner({name: gpu.Stage(15.0, 4.0, attempts=2) for name in bodies}, command, out, budget_s)


def results(run) -> dict[tuple[str, str], str]:
    return {(row["stage"], row["name"]): row["status"] for row in run.rows.read()}


def test_a_stage_that_hangs_is_killed_with_all_it_started(gpu, tmp_path):
    hang = """
row("first", "PASS")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({path!r}, "w").write(str(child.pid))
row("second", "started")
time.sleep(600)
""".format(path=str(tmp_path / "pid"))
    run = runner(gpu, tmp_path / "out", 60.0, hang=hang, after='row("fine", "PASS")')
    begin = time.monotonic()
    run.run()
    assert time.monotonic() - begin < 30
    found = results(run)
    assert found["hang", "first"] == "PASS"
    assert found["hang", "second"] == found["hang", "hang"] == "error"
    assert found["after", "fine"] == "PASS"
    assert not running(int((tmp_path / "pid").read_text()))
    text = gpu.table({"device": "none", "rows": [row for row in run.rows.read() if row["status"] != "started"]})
    assert "killed" in text
    assert "PASS c: fine" in text


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_stage_that_crashes_loses_nothing_and_goes_on_after_the_case(gpu, tmp_path):
    crash = """
for name in ("one", "two", "three"):
    if name not in begun:
        row(name, "started")
        if name == "two":
            os.kill(os.getpid(), 9)
        row(name, "PASS")
"""
    run = runner(gpu, tmp_path / "out", 60.0, crash=crash)
    run.run()
    found = results(run)
    assert [found["crash", name] for name in ("one", "two", "three")] == ["PASS", "error", "PASS"]
    (row,) = [row for row in run.rows.read() if row["name"] == "crash"]
    assert row["status"] == "error"
    assert "crashed with code -9" in row["error"]


def test_a_stage_that_does_not_even_start_is_not_tried_again(gpu, tmp_path):
    run = runner(gpu, tmp_path / "out", 60.0, broken=f'open({str(tmp_path / "tries")!r}, "a").write("x"); 1 / 0')
    run.run()
    assert (tmp_path / "tries").read_text() == "x"
    assert "ZeroDivisionError" in (tmp_path / "out" / "log.txt").read_text()


def test_the_budget_holds(gpu, tmp_path):
    sleeper = 'row("begun", "PASS"); time.sleep(600)'
    run = runner(gpu, tmp_path / "out", gpu.CLOSING_S + gpu.SHORTEST_S + 1.0, first=sleeper, second=sleeper)
    begin = time.monotonic()
    run.run()
    assert time.monotonic() - begin < gpu.SHORTEST_S + 4.0
    found = results(run)
    assert found["first", "begun"] == "PASS"
    assert found["second", "second"] == "skipped"


def test_a_line_that_was_cut_off_is_passed_over(benchmarks, tmp_path):
    from gpu_stages.rows import Rows

    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"name": "ε"})
    with open(rows.path, "ab") as file:
        file.write('{"name": "ε'.encode()[:-1])
    assert rows.read() == [{"name": "ε"}]
    rows.append({"name": "next"})
    assert rows.read()[-1] == {"name": "next"}


@needs_triton
def test_the_table_comes_even_when_the_run_is_told_to_stop(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(out), "--stages", "correctness"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not (out / "rows.jsonl").exists() or "PASS" not in log_of(out)):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=30)
    assert "checks, worst error" in text.splitlines()[-1]


def log_of(out: Path) -> str:
    return (out / "rows.jsonl").read_text()


# ---- the table ------------------------------------------------------------------------------------------------------


def full_report(shapes: int) -> dict:
    """As many rows as a whole run has, and more."""
    rows = [
        {"stage": stage, "case": "stage", "name": stage, "status": "error", "seconds": 61.0, "error": "e" * 400}
        for stage in ("compile", "correctness", "loss", "peers")
    ]
    rows += [
        {"stage": "correctness", "case": f"D {n}, V 50257, bfloat16", "name": f"linear_kl {n}", "status": "FAIL",
         "worst": float("nan"), "worst_of": "∂weight", "checks": 5, "error": "x" * 300}
        for n in range(shapes)
    ]  # fmt: skip
    for shape in range(shapes):
        for name in ("product h Wᵀ", "product dz W", "loss, entropy", "peer: somebody's kernel"):
            rows.append(
                {"stage": "loss", "case": f"shape {shape}", "name": name, "status": "PASS", "ms": 12.3456,
                 "min_ms": 12.0, "max_ms": 13.0, "ratio": 1.0812, "goal": 1.15, "tflops": 612.3, "extra_mib": 4096.0,
                 "launches": 7}
            )  # fmt: skip
        rows.append({"stage": "peers", "case": f"shape {shape}", "name": "p", "status": "error", "error": "y" * 300})
    return {"device": "a GPU", "date": "2026-01-01", "commit": "unknown", "rows": rows}


@pytest.mark.parametrize("shapes", [1, 5, 300])
def test_the_table_fits(gpu, shapes):
    text = gpu.table(full_report(shapes))
    assert len(text) <= 10_000
    assert "a GPU" in text.splitlines()[0]
    assert "PASS" in text
    assert "FAIL" in text
    assert "1.08" in text
    assert (shapes == 300) == ("more in rows.jsonl" in text)


def test_a_killed_run_can_be_summarized_and_drawn(gpu, benchmarks, tmp_path, capsys):
    import plot
    from gpu_stages.rows import Rows

    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"stage": "loss", "case": "machine", "name": "machine", "status": "ok", "device": "NVIDIA H100 80GB"})
    rows.append({"stage": "loss", "case": "shape 0", "name": "cut off", "status": "started"})
    for row in full_report(2)["rows"]:
        rows.append(row)
    assert gpu.main(["--out", str(tmp_path), "--summarize", "--commit", "abc"]) == 0
    assert "loss, entropy" in capsys.readouterr().out
    (path,) = tmp_path.glob("gpu-nvidia-h100-80gb-20*.json")
    report = json.loads(path.read_text())
    assert report["commit"] == "abc"
    assert len(report["rows"]) == len(full_report(2)["rows"]) + 1
    title, cases = plot.read(path)
    assert title == "NVIDIA H100 80GB"
    assert list(cases) == ["shape 0", "shape 1"]


# ---- other projects -------------------------------------------------------------------------------------------------


def test_verl_style_packages_are_imported_without_their_init(benchmarks, tmp_path, monkeypatch):
    import peers

    for folder in ("heavy", "heavy/inner"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('needs a cluster')")
    (tmp_path / "heavy" / "inner" / "kernel.py").write_text("from heavy.inner import other\nvalue = other.value + 1")
    (tmp_path / "heavy" / "inner" / "other.py").write_text("value = 41")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["heavy", "heavy.inner", "heavy.inner.kernel", "heavy.inner.other"]
    try:
        peers.with_bare_packages("heavy", "heavy.inner")
        assert importlib.import_module("heavy.inner.kernel").value == 42
    finally:
        for name in names:
            sys.modules.pop(name, None)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        peers.with_bare_packages("no_such_package")


def test_the_environment_of_a_stage_finds_this_tree_first(gpu, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    path = gpu.environment()["PYTHONPATH"].split(os.pathsep)
    assert path == [str(ROOT), str(ROOT / "kernels"), str(BENCHMARKS), "/wheels"]
