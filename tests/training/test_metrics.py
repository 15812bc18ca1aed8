"""The log of a run: strict JSON, exact after a resume, and durable."""

import itertools
import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastppo.training.metrics import (
    MetricsLogger,
    atomic_write,
    read_alarms,
    read_metrics,
    read_samples,
    write_alarms,
    write_samples,
)
from fastppo.training.report import write_report


def strict(line: bytes) -> dict:
    """JSON as every reader takes it: Python's own accepts NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line.decode("utf-8"), parse_constant=refuse)


def log_steps(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricsLogger(folder, resume_step=resume_step) as logger:
        for step in steps:
            logger.log(step, {"reward/mean": step + 0.5})


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    written = {f"m/{i}": random.uniform(-1e6, 1e6) for i in range(7)}
    logger = MetricsLogger(tmp_path / "new" / "folder", resume_step=None)
    logger.log(3, written)
    [line] = read_metrics(tmp_path / "new" / "folder" / "metrics.jsonl")
    assert line.pop("step") == 3
    assert 0 <= line.pop("time") < 60
    assert line == written
    logger.close()
    logger.close()


def test_nonfinite_values_are_null_in_strict_json_and_nan_when_read(tmp_path):
    import numpy as np
    import torch

    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(2.5), "e": np.float32(0.25), "f": 7}
    with MetricsLogger(tmp_path, resume_step=None) as logger:
        logger.log(1, values)
    line = strict((tmp_path / "metrics.jsonl").read_bytes())
    assert [line[name] for name in "abcdef"] == [None, None, None, 2.5, 0.25, 7.0]
    [read] = read_metrics(tmp_path / "metrics.jsonl")
    assert all(math.isnan(read[name]) for name in "abc")


def test_resume_from_a_file_cut_at_any_byte(tmp_path):
    """A kill may leave any prefix: whole lines up to the checkpoint stay as they are, byte for byte; the rest goes."""
    log_steps(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        log_steps(tmp_path, range(3, 4), resume_step=2)
        # A line that lacks but its newline is whole.
        kept = [
            line for line, end in zip(lines[:2], itertools.accumulate(map(len, lines)), strict=False) if cut >= end - 1
        ]
        written = path.read_bytes().splitlines(keepends=True)
        assert written[:-1] == kept, cut
        assert strict(written[-1])["step"] == 3
        assert all(line.endswith(b"\n") for line in written)


def test_time_goes_on_from_the_last_kept_line(tmp_path):
    rows = [{"step": 1, "time": 100.0}, {"step": 2, "time": 200.0}, {"step": 3, "time": 300.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log_steps(tmp_path, range(3, 4), resume_step=2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert 200.0 <= lines[-1]["time"] < 260.0


@pytest.mark.parametrize(
    "line", ['{"step": "3"}', '{"step": [1]}', '{"step": null}', '{"step": true}', '{"note": "mine"}', "[1]"]
)
def test_a_line_that_no_run_has_written_is_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{line}\n{{"step": 1, "time": "noon", "loss": 0.5, "note": "mine"}}\n{line}\n{{"step": 2}}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2}]
    with MetricsLogger(tmp_path, resume_step=1) as logger:
        logger.log(2, {"loss": 0.25})
    [first, second] = path.read_text().splitlines()
    assert first == '{"step": 1, "time": "noon", "loss": 0.5, "note": "mine"}'  # what a person added to a row stays
    assert json.loads(second)["loss"] == 0.25


def test_a_killed_process_leaves_whole_lines_and_is_resumed(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        logger = MetricsLogger(tmp_path, resume_step=None)
        for step in itertools.count(1):
            logger.log(step, {"reward/mean": float(step), "kl/reference": float("nan")})
            if step == 50:
                os.write(writer, b"x")
    assert os.read(reader, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    log_steps(tmp_path, range(41, 44), resume_step=40)
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 44))
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_a_resume_that_dies_while_truncating_loses_nothing(tmp_path, monkeypatch):
    log_steps(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        MetricsLogger(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    row = {"prompt": "p", "completion": "c", "reward": 1.0, "rewards": {}}
    contents = []
    for _ in range(3):
        logger = MetricsLogger(tmp_path, resume_step=None)
        logger.log(1, {"reward/mean": random.random()})
        logger.close()
        write_samples(tmp_path, "before", [row])
        contents.append((tmp_path / "metrics.jsonl").read_bytes())
    assert logger.earlier_run == tmp_path / "earlier-2"
    for number in (1, 2):
        assert (tmp_path / f"earlier-{number}" / "metrics.jsonl").read_bytes() == contents[number - 1]
        assert read_samples(tmp_path / f"earlier-{number}", "before") == [row]
    assert (tmp_path / "metrics.jsonl").read_bytes() == contents[2]


def test_nothing_is_set_aside_from_a_new_folder(tmp_path):
    with MetricsLogger(tmp_path, resume_step=None) as logger:
        assert logger.earlier_run is None
    with MetricsLogger(tmp_path, resume_step=0) as logger:  # killed before its first step
        assert logger.earlier_run is None


def test_rewinding_goes_on_as_if_later_steps_had_not_been_and_keeps_them_aside(tmp_path):
    with MetricsLogger(tmp_path, resume_step=None) as logger:
        for step in range(1, 8):
            logger.log(step, {"x": float(step)})
        aside = logger.keep_aside(4, 1)
        logger.rewind(4)
        for step in range(5, 7):
            logger.log(step, {"x": -float(step)})
    assert [row["x"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, -5, -6]
    assert [row["x"] for row in read_metrics(aside)] == [5, 6, 7]


def test_alarms_come_back(tmp_path):
    assert read_alarms(tmp_path) == []
    alarm = {"step": 3, "metric": "x", "value": math.inf, "reason": "x inf is above 2\u2028", "outcome": ""}
    write_alarms(tmp_path, [alarm, {**alarm, "value": 5.0}])
    first, second = read_alarms(tmp_path)
    assert math.isnan(first["value"])
    assert second == {**alarm, "value": 5.0}


TEXT = st.text() | st.sampled_from(["lone \ud800 surrogate", "a\u2028b\r\nc\x85", "\x00\x1b[2J"])
ROW = st.fixed_dictionaries(
    {
        "prompt": TEXT,
        "completion": TEXT,
        "reward": st.floats(allow_nan=False, allow_infinity=False),
        "rewards": st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    }
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, max_size=4))
def test_samples_come_back_as_written_whatever_the_model_wrote(tmp_path, rows):
    path = write_samples(tmp_path, "step-000010", rows)
    assert path == tmp_path / "samples" / "step-000010.jsonl"
    assert read_samples(tmp_path, "step-000010") == rows
    assert [strict(line)["completion"] for line in path.read_bytes().split(b"\n")[:-1]] == [
        row["completion"] for row in rows
    ]


def test_samples_with_nonfinite_rewards(tmp_path):
    row = {"prompt": "p", "completion": "c", "reward": math.inf, "rewards": {"x": math.nan}}
    path = write_samples(tmp_path, "before", [row])
    assert strict(path.read_bytes())["rewards"] == {"x": None}
    [read] = read_samples(tmp_path, "before")
    assert math.isnan(read["reward"])
    assert math.isnan(read["rewards"]["x"])


@pytest.mark.parametrize(
    "wrong",
    ['{"prompt": "p"}', "3", *(f'"{name}": [3]' for name in ("prompt", "completion", "reward", "rewards", "step"))],
)
def test_samples_and_alarms_that_no_run_has_written_are_passed_over(tmp_path, wrong):
    row = {"prompt": "p", "completion": "c", "reward": 1.0, "rewards": {"x": 1.0}}
    alarm = {"step": 1, "metric": "kl", "reason": "high", "outcome": "run stopped"}
    for path in (write_samples(tmp_path, "before", [row]), write_alarms(tmp_path, [alarm])):
        line = path.read_text().strip()
        path.write_text(f"{line}\n{wrong if wrong[0] in '{3' else line[:-1] + ', ' + wrong + '}'}\n")
    assert row in read_samples(tmp_path, "before")
    assert alarm in read_alarms(tmp_path)
    write_report(tmp_path)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    atomic_write(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
