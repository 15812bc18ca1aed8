"""What a run writes for a person to look at: one line of metrics per step, samples and alarms.

Everything is strict JSON, one object per line. A run may be killed at any instant and resumed; its log then continues
as that of a run that was never killed.

Metrics with a unit or a meaning that the name does not say; any others may be logged too:

    reward/mean, reward/std, reward/<name>     weighted sum of the rewards; each as its function returned it
    eval/reward, eval/kl, eval/length, ...     the same on held-out prompts; eval/<name>_std and eval/num_prompts
    kl/reference, kl/reference_per_token       nats per completion, nats per token
    policy/entropy, policy/approx_kl           nats per token
    policy/skipped_steps, value/skipped_steps  optimizer steps, or 1 for a whole step, left out for a NaN or Inf
    completion/length                          tokens
    rollout/logprob_gap_mean, _min, _max       log π − log μ of the sampled tokens, μ being what the engine sampled with
    rollout/corrected_fraction                 share of tokens whose importance weight a bound has changed
    time/<phase>, time/step                    seconds
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.training.files import atomic_write, make_folder, naming

if TYPE_CHECKING:
    from fastppo.training.trackers import Trackers

METRICS_FILE = "metrics.jsonl"
ALARMS_FILE = "alarms.jsonl"
SAMPLES_FOLDER = "samples"
TRACKERS_FILE = "trackers.json"

# What is moved aside together, so that a report never mixes two runs. The metrics go last: as long as they stand, the
# next start finishes a move that was killed halfway.
_RUN_FILES = ("report.html", "plots", SAMPLES_FOLDER, "tensorboard", TRACKERS_FILE, ALARMS_FILE, METRICS_FILE)


class MetricsLogger:
    """Appends one JSON line per step to ``output_dir/metrics.jsonl``, and reports it to the trackers.

    Args:
        output_dir: the run's folder; created if missing.
        resume_step: None starts a run: what an earlier one wrote is moved to ``earlier-<n>/``, never overwritten. An
            int continues from the checkpoint of that step: later lines, which a run wrote that was killed after its
            last checkpoint, and a torn last line are dropped.
        trackers: where else to report to.
    """

    earlier_run: Path | None
    """Where an earlier run's metrics, samples and report were moved to, if there were any."""

    def __init__(self, output_dir: str | Path, *, resume_step: int | None, trackers: Trackers | None = None) -> None:
        output_dir = Path(output_dir)
        make_folder(output_dir)
        self._path, self._trackers = output_dir / METRICS_FILE, trackers
        self.earlier_run = _set_aside(output_dir) if resume_step is None else None
        self._start = time.monotonic() - self._open(resume_step or 0)

    def _open(self, last_step: int) -> float:
        """Drop the lines later than `last_step`; returns the seconds until the last line that is kept."""
        _truncate(self._path, last_step)
        self._file = self._path.open("ab", buffering=0)  # a buffer that a full disk refused would fail again on closing
        rows = read_metrics(self._path)
        if self._trackers is not None:
            self._trackers.open(rows)
        return max((row.get("time", 0.0) for row in rows), default=0.0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics. The line in the file is on disk on return, and says that all is done.

        Args:
            step: the step they belong to; 0 is before the first.
            metrics: name to number, anything that `float` takes. NaN and infinities become null in the JSON line.
        """
        values = {name: float(value) for name, value in metrics.items()}
        line = _json_line({"step": step, "time": round(time.monotonic() - self._start, 3), **values})
        with naming(self._path):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        if self._trackers is not None:
            self._trackers.log(step, values)

    def keep_aside(self, step: int, number: int) -> Path:
        """Copy the lines later than `step`, before `rewind` drops them, to ``abandoned-<number>.jsonl``; returns it."""
        path = self._path.with_name(f"abandoned-{number}.jsonl")
        later = [line for line, row in _read_rows(self._path) if row["step"] > step]
        atomic_write(path, b"".join(later))
        return path

    def rewind(self, step: int) -> None:
        """Drop the lines later than `step`, as a resume does; the clock goes on."""
        self.close()
        self._open(step)

    def close(self, *, failed: bool = False) -> None:
        """Close the file, and the trackers' runs, which `failed` marks as failed; a second call does nothing."""
        self._file.close()
        if self._trackers is not None:
            self._trackers.close(failed=failed)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file, in order; null reads as NaN. [] without such a file.

    A line that a kill or a power cut tore is skipped, and so is what a hand has written that is no number.
    """
    return [row for _, row in _read_rows(path)]


def samples_name(step: int, total_steps: int) -> str:
    """Name of an evaluation's samples: "before" the first step, "after" the last, or "step-000010" after step 10."""
    return "before" if step == 0 else "after" if step == total_steps else f"step-{step:06d}"


def write_samples(output_dir: str | Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write completions to ``output_dir/samples/<name>.jsonl`` atomically.

    Args:
        output_dir: the run's folder.
        name: see `samples_name`.
        rows: each {"prompt": str, "completion": str, "reward": float, "rewards": {reward name: float}}.

    Returns:
        The file.
    """
    return _write_lines(Path(output_dir) / SAMPLES_FOLDER / f"{name}.jsonl", rows)


def read_samples(output_dir: str | Path, name: str) -> list[dict[str, Any]]:
    """The rows that `write_samples` wrote; a reward that was not finite reads as NaN."""
    fields = {"prompt": str, "completion": str, "reward": float | int, "rewards": dict}
    rows = _read_objects(Path(output_dir) / SAMPLES_FOLDER / f"{name}.jsonl", fields)
    return [row for row in rows if all(isinstance(value, float | int) for value in row["rewards"].values())]


def write_alarms(output_dir: str | Path, alarms: Sequence[Mapping[str, Any]]) -> Path:
    """Write every alarm of the run so far, each with the fields of `watch.Alarm`, to ``output_dir/alarms.jsonl``."""
    return _write_lines(Path(output_dir) / ALARMS_FILE, alarms)


def read_alarms(output_dir: str | Path) -> list[dict[str, Any]]:
    """The alarms that `write_alarms` wrote; [] without such a file. A value that was infinite reads as NaN."""
    return _read_objects(Path(output_dir) / ALARMS_FILE, {"step": int, "reason": str, "outcome": str})


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(value: Mapping[str, Any]) -> bytes:
    # Text stays readable, and a lone surrogate becomes backslash-u and four digits: just how JSON escapes it.
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _write_lines(path: Path, values: Sequence[Mapping[str, Any]]) -> Path:
    atomic_write(path, b"".join(map(_json_line, values)))
    return path


def _read_lines(path: str | Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line, with its newline, and its object with NaN for null."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    # Not splitlines(): text may hold U+2028 and other separators that JSON leaves as they are.
    for line in data.split(b"\n"):
        try:
            values = json.loads(line, object_hook=_nan_for_null)
        except ValueError:  # a kill or a power cut tore the line
            continue
        if isinstance(values, dict):
            yield line + b"\n", values


def _read_objects(path: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects that have these fields of these types, and not what a hand has written instead."""
    objects = [values for _, values in _read_lines(path)]
    return [values for values in objects if all(isinstance(values.get(name), kind) for name, kind in fields.items())]


def _read_rows(path: str | Path) -> Iterator[tuple[bytes, dict[str, float]]]:
    """Every whole line of a metrics file, and its numbers."""
    for line, values in _read_lines(path):
        row = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if type(row.get("step")) is int:
            yield line, row


def _nan_for_null(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}


def _truncate(path: Path, last_step: int) -> None:
    """Keep the whole lines up to `last_step`, byte for byte."""
    kept = [line for line, row in _read_rows(path) if row["step"] <= last_step]
    atomic_write(path, b"".join(kept))


def _set_aside(output_dir: Path) -> Path | None:
    """Move what an earlier run wrote to a folder of its own, if it got as far as its first metrics."""
    path = output_dir / METRICS_FILE
    if not path.exists() or path.stat().st_size == 0:
        return None
    folders = (output_dir / f"earlier-{number}" for number in itertools.count(1))
    folder = next(folder for folder in folders if not folder.exists())
    folder.mkdir()
    for path in (*output_dir.glob("abandoned-*.jsonl"), *(output_dir / name for name in _RUN_FILES)):
        if path.exists():
            path.replace(folder / path.name)
    return folder
