"""What a run leaves behind for a person to look at: metrics a line a step, TensorBoard curves, and samples.

Everything is strict JSON, one object a line. A run may be killed at any instant and resumed: the log then goes on as if
it had never been killed.

The names that the report (report.py) and the progress display (progress.py) know (any other is logged all the same):

    reward/mean  reward/std  reward/<name of a reward>       eval/reward  eval/kl  eval/length (on held-out prompts)
    kl/reference (nats a completion)  kl/coef                policy/entropy (nats a token)  policy/clip_fraction
    policy/approx_kl (nats a token)  loss/policy  loss/value  value/explained_variance  completion/length (tokens)
    text/distinct_1  text/distinct_2  text/repetition        policy/ratio_max  advantage/extreme
    eval/perplexity  eval/perplexity_reference               eval/<name of a held-out reward>
    grad_norm  lr  tokens_per_second  time/<phase> and time/step (seconds)
    multiplier/<name of a constraint>  value/explained_variance/<name of a reward>
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
ALARMS_FILE = "alarms.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SAMPLES_FOLDER = "samples"

# What a run shows of itself; all of it moves together, so that a report never mixes two runs.
_SHOWN = (METRICS_FILE, ALARMS_FILE, TENSORBOARD_FOLDER, SAMPLES_FOLDER, "plots", "report.html")
_SAMPLES_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class MetricsLogger:
    """Appends a JSON line a step to ``output_dir/metrics.jsonl`` and scalars to ``output_dir/tensorboard``.

    Args:
        output_dir: the run's folder; made if missing.
        tensorboard: also write TensorBoard event files.
        resume_step: None begins a run; metrics that an earlier one left in the folder are moved to ``earlier-<n>/``
            (see `earlier_run`), never overwritten. An int goes on from the checkpoint of that step: later lines, which
            a run wrote that was killed after its last checkpoint, and a torn last line are dropped.

    Raises:
        ImportError: `tensorboard` is asked for but not installed.
        ValueError: `resume_step` is negative.
    """

    earlier_run: Path | None
    """Where an earlier run's metrics, samples and report were moved to, if there were any."""

    def __init__(self, output_dir: str | Path, *, tensorboard: bool, resume_step: int | None) -> None:
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step: expected None or a step >= 0, got {resume_step}")
        summary_writer = _import_summary_writer() if tensorboard else None
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / METRICS_FILE

        elapsed = 0.0
        self.earlier_run = None
        if resume_step is None:
            self.earlier_run = _set_aside(output_dir)
        elif path.exists():
            elapsed = _truncate(path, resume_step)
        self._start = time.monotonic() - elapsed
        self._path, self._file = path, path.open("ab")
        self._summary_writer, self._writer = summary_writer, None
        self._open_tensorboard(purge_step=None if resume_step is None else resume_step + 1)

    def _open_tensorboard(self, purge_step: int | None) -> None:
        # TensorBoard hides what earlier event files hold at this step and later.
        if self._summary_writer is not None:
            folder = self._path.with_name(TENSORBOARD_FOLDER)
            self._writer = self._summary_writer(str(folder), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics; they are on their way to the disk when this returns.

        Args:
            step: the step they belong to (0: before the first).
            metrics: name to number; anything `float` takes. NaN and Inf become null in the JSON line.

        Raises:
            ValueError: a metric is called "step" or "time", which the line uses itself.
            TypeError: a metric is not a number.
        """
        line: dict[str, Any] = {"step": int(step), "time": round(time.monotonic() - self._start, 3)}
        values = {}
        for name, value in metrics.items():
            if name in ("step", "time"):
                raise ValueError(f"metrics: {name!r} is a name of the line itself; call the metric something else")
            try:
                values[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"metrics[{name!r}]: expected one number, got {type(value).__name__}") from None
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(_json_line(line))
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, int(step))
            self._writer.flush()

    def keep_aside(self, step: int, number: int) -> Path:
        """Copy the lines later than `step` into ``abandoned-<number>.jsonl``, before `rewind` drops them.

        Returns:
            The file.
        """
        lines = [(line, _parse_metrics_line(line)) for line in self._path.read_bytes().split(b"\n")]
        later = [line + b"\n" for line, values in lines if values is not None and values["step"] > step]
        path = self._path.with_name(f"abandoned-{number}.jsonl")
        atomic_write(path, b"".join(later))
        return path

    def rewind(self, step: int) -> None:
        """Drop the lines later than `step`, as a resume does; the clock goes on."""
        self._file.close()
        _truncate(self._path, step)
        self._file = self._path.open("ab")
        if self._writer is not None:
            self._writer.close()
            self._open_tensorboard(purge_step=step + 1)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file, in order; "step" is an int and null reads as NaN.

    A line that is not a whole JSON object, torn by a kill or a power cut, is passed over.
    """
    lines = (_parse_metrics_line(line) for line in Path(path).read_bytes().split(b"\n"))
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in lines
        if line is not None
    ]


def write_samples(output_dir: str | Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write completions to ``output_dir/samples/<name>.jsonl``, whole or not at all.

    Args:
        output_dir: the run's folder.
        name: "before", "after" or "step-000010": of the policy before the first step, after the last, after step 10.
        rows: each {"prompt": str, "completion": str, "reward": float, "rewards": {reward name: float}}.

    Returns:
        The file.

    Raises:
        ValueError: `name` is not a plain file name, or a row lacks a key or has another.
    """
    if not _SAMPLES_NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, '_', '.' and '-', such as 'before', got {name!r}")
    lines = []
    for index, row in enumerate(rows):
        if set(row) != {"prompt", "completion", "reward", "rewards"}:
            raise ValueError(f"rows[{index}]: expected keys prompt, completion, reward and rewards, got {sorted(row)}")
        line = {
            "prompt": row["prompt"],
            "completion": row["completion"],
            "reward": _finite_or_none(row["reward"]),
            "rewards": {key: _finite_or_none(value) for key, value in row["rewards"].items()},
        }
        lines.append(_json_line(line))
    path = Path(output_dir) / SAMPLES_FOLDER / f"{name}.jsonl"
    atomic_write(path, b"".join(lines))
    return path


def read_samples(output_dir: str | Path, name: str) -> list[dict[str, Any]]:
    """The rows that `write_samples` wrote; a reward that was not finite reads as NaN."""
    path = Path(output_dir) / SAMPLES_FOLDER / f"{name}.jsonl"
    rows = []
    # Not splitlines(): text may hold U+2028 and other separators that JSON leaves as they are.
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        row["reward"] = _nan_if_none(row["reward"])
        row["rewards"] = {key: _nan_if_none(value) for key, value in row["rewards"].items()}
        rows.append(row)
    return rows


def write_alarms(output_dir: str | Path, alarms: Sequence[Mapping[str, Any]]) -> Path:
    """Write every alarm of a run so far to ``output_dir/alarms.jsonl``, whole or not at all.

    Args:
        output_dir: the run's folder.
        alarms: each with the fields of `watch.Alarm`.

    Returns:
        The file.
    """
    path = Path(output_dir) / ALARMS_FILE
    atomic_write(path, b"".join(_json_line({**alarm, "value": _finite_or_none(alarm["value"])}) for alarm in alarms))
    return path


def read_alarms(output_dir: str | Path) -> list[dict[str, Any]]:
    """The alarms that `write_alarms` wrote; none if there is no such file. A value that was infinite reads as NaN."""
    path = Path(output_dir) / ALARMS_FILE
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    alarms = [json.loads(line) for line in lines if line]
    return [{**alarm, "value": _nan_if_none(alarm["value"])} for alarm in alarms]


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file so that, after a kill or a power cut, either all of it is there or what was there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a killed write left behind is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # a folder cannot be synced everywhere; the file itself is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _json_line(value: dict[str, Any]) -> bytes:
    # Text stays readable, and a lone surrogate becomes backslash-u and four digits: just how JSON escapes it.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parse_metrics_line(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _truncate(path: Path, last_step: int) -> float:
    """Keep the whole lines up to `last_step`; returns the seconds the run had taken by then."""
    kept, elapsed = [], 0.0
    for line in path.read_bytes().split(b"\n"):
        values = _parse_metrics_line(line)
        if values is not None and values["step"] <= last_step:
            kept.append(line + b"\n")
            elapsed = max(elapsed, values.get("time") or 0.0)
    atomic_write(path, b"".join(kept))
    return elapsed


def _set_aside(output_dir: Path) -> Path | None:
    path = output_dir / METRICS_FILE
    if not path.exists() or path.stat().st_size == 0:
        return None
    number = 1
    while (output_dir / f"earlier-{number}").exists():
        number += 1
    folder = output_dir / f"earlier-{number}"
    folder.mkdir()
    # The metrics go last: as long as they stand, a move that was killed halfway is finished by the next start.
    abandoned = [path.name for path in output_dir.glob("abandoned-*.jsonl")]
    for name in (*abandoned, *reversed(_SHOWN)):
        if (output_dir / name).exists():
            os.replace(output_dir / name, folder / name)
    return folder


def _import_summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"tensorboard: true needs the package tensorboard ({error}); "
            "pip install 'fastppo[train]', or set tensorboard: false"
        ) from None
    return SummaryWriter


def _finite_or_none(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value
