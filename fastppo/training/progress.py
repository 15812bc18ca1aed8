"""Show a run's progress: a live display on a terminal, one plain `key=value` line per step elsewhere.

A display never ends a run: it goes silent once its terminal or pipe is closed.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

# What is shown of a step: key of the plain line and of the columns -> metric.
_SHOWN = {
    "reward": "reward/mean",
    "held_out": "eval/reward",
    "kl": "kl/reference",
    "entropy": "policy/entropy",
    "clip": "policy/clip_fraction",
    "tokens_per_second": "tokens_per_second",
    "alarms": "alarms",
}
_RECENT_STEPS = 20  # the time left follows their median
# C0 and C1 control characters, except tab and newline, as \x1b and so on: text that a model wrote must not move the
# cursor or clear the screen.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


_ONE_LINE = Column(no_wrap=True, overflow="crop", max_width=12)
# (columns that a terminal must have, what is then shown)
_COLUMNS = (
    (0, TextColumn("[bold]step {task.completed}/{task.total}")),
    (78, BarColumn(bar_width=None, complete_style="cyan")),
    (32, TextColumn("[dim]reward[/] {task.fields[reward]}")),
    (56, TextColumn("[dim]KL[/] {task.fields[kl]}")),
    (98, TextColumn("[dim]held-out[/] {task.fields[held_out]}")),
    (114, TextColumn("[dim]entropy[/] {task.fields[entropy]}")),
    (126, TextColumn("[dim]clip[/] {task.fields[clip]}")),
    (142, TextColumn("[dim]tokens/s[/] {task.fields[tokens_per_second]}")),
    (44, TextColumn("{task.fields[left]} left")),
    (66, TextColumn("{task.fields[alarms]}", style="bold yellow")),
    (78, TextColumn("{task.fields[phase]}", style="cyan", markup=False, table_column=_ONE_LINE)),
    (86, TimeElapsedColumn(Column(no_wrap=True))),
)


class ProgressDisplay:
    """Shows how a run goes; a context manager.

    Args:
        total_steps: steps of the whole run.
        start_step: the step that the run resumes from.
        console: where to show it; standard output if not given.
        enabled: True shows the live display; False writes one plain line per step, without control characters; None
            shows the live display if `console` writes to a terminal.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, console: Console | None = None, enabled: bool | None = None
    ) -> None:
        self._console = console or Console()
        self._total_steps, self._step = total_steps, start_step
        self._metrics: dict[str, float] = {}
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._unwritten: deque[str] = deque()
        self._writing = self._silent = False
        # Not console.is_terminal: FORCE_COLOR and the like make rich take a CI log for a terminal.
        on_terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._bar: Progress | None = None
        if enabled if enabled is not None else on_terminal:
            columns = [column for width, column in _COLUMNS if self._console.width >= width]
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4, expand=True)
            self._bar.add_task("", total=total_steps, phase="starting", **self._facts())
            self.note({})

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that step `step`, counted from 1, is done, with its metrics; see metrics.py for their names.

        The time left follows `time/step`, in which no evaluation or checkpoint is.
        """
        self._step = step
        if "time/step" in metrics:
            self._step_seconds.append(metrics["time/step"])
        self.note(metrics)
        if self._bar is None:
            line = {"step": f"{step}/{self._total_steps}", **self._facts()}
            self._write(" ".join(f"{key}={value}" for key, value in line.items()))

    def note(self, metrics: Mapping[str, float]) -> None:
        """Show what is known besides a step's own metrics: those of an evaluation, and the number of `alarms`."""
        self._metrics.update({name: float(value) for name, value in metrics.items()})
        if self._bar is not None:
            facts = self._facts()
            broken = {key: f"[bold red]{value}[/]" for key, value in facts.items() if value in ("nan", "inf", "-inf")}
            count = facts["alarms"]
            broken["alarms"] = "" if count == "-" else "1 alarm" if count == "1" else f"{count} alarms"
            self._bar.update(0, completed=self._step, **facts | broken)

    def phase(self, text: str) -> None:
        """Set what the trainer does now: "rollout 25%", "reward", "update 1/2", "sample 8/32", "checkpoint"."""
        if self._bar is not None:
            self._bar.update(0, phase=_encodable(printable(text), self._console.encoding))

    def print(self, message: str) -> None:
        """Print a line above the bar, such as a warning. Control characters in it are escaped."""
        self._write(printable(message))

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            self.phase("done" if self._step >= self._total_steps else "stopped")
        else:
            self.phase("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()  # also shows the cursor again

    def _facts(self) -> dict[str, str]:
        facts = {key: format_number(self._metrics.get(metric)) for key, metric in _SHOWN.items()}
        facts["step_time"] = f"{self._step_seconds[-1]:.2f}s" if self._step_seconds else "-"
        steps = self._total_steps - self._step
        seconds = steps and (statistics.median(self._step_seconds) * steps if self._step_seconds else None)
        return facts | {"left": format_duration(seconds)}

    def _write(self, text: str) -> None:
        self._unwritten.append(text)
        # A signal handler may print during a write, which files refuse: then the interrupted write does both.
        if self._writing:
            return
        self._writing = True
        try:
            while self._unwritten and not self._silent:
                file = self._console.file
                text = _encodable(self._unwritten.popleft(), getattr(file, "encoding", None) or "utf-8")
                if self._bar is None:
                    print(text, file=file, flush=True)
                else:
                    self._console.print(Text(text), soft_wrap=True)
        except OSError:
            self._silent = True
        finally:
            self._writing = False


def printable(text: str) -> str:
    """The text with its control characters, tab and newline apart, written out as \\x1b and so on."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


def format_number(value: float | None) -> str:
    """Four digits, or all before the decimal point; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float | None) -> str:
    """3725 -> 1:02:05; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
