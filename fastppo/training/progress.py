"""The run as its owner watches it: a live display on a terminal, one plain `key=value` line a step elsewhere.

A display never ends a run: once its terminal or pipe is gone, it falls silent.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What is shown of a step: (metric, label on a terminal, key of the plain line). The first ones have precedence where
# the terminal is narrow.
_SHOWN = (
    ("reward/mean", "reward", "reward"),
    ("kl/reference", "KL", "kl"),
    ("policy/entropy", "entropy", "entropy"),
    ("policy/clip_fraction", "clip", "clip"),
    ("tokens_per_second", "tokens/s", "tokens_per_second"),
)
_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 24
# The time left follows the latest steps; a median, so that an evaluation or a checkpoint among them doesn't count.
_RECENT_STEPS = 20
# C0 and C1 control characters, except tab and newline, as \x1b and so on: text that a model wrote must not move the
# cursor or clear the screen.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


class ProgressDisplay:
    """Shows how a run goes; a context manager.

    Args:
        total_steps: steps of the whole run.
        start_step: the step it resumes from.
        console: where to show it; standard output if not given.
        enabled: True shows the live display, False writes one plain line a step, without control characters; None
            decides by whether `console` writes to a terminal.

    Raises:
        ValueError: total_steps < 1, or start_step outside [0, total_steps].
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, console: Console | None = None, enabled: bool | None = None
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step: expected 0 to total_steps ({total_steps}), got {start_step}")
        self._console = console if console is not None else Console()
        self._total_steps = total_steps
        self._step = start_step
        self._metrics: dict[str, float] = {}
        self._rewards: list[float] = []
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last_update = self._phase_began = time.monotonic()
        self._phase = "starting"
        self._unwritten: deque[str] = deque()
        self._writing = self._silent = False
        # The file's own word: FORCE_COLOR and the like make rich take a CI log for a terminal.
        on_terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        if enabled if enabled is not None else on_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (counted from 1) is done and these are its metrics; see metrics.py for the names."""
        now = time.monotonic()
        if step > self._step:
            self._step_seconds.append((now - self._last_update) / (step - self._step))
        self._last_update = now
        self._step = step
        self._metrics.update({name: float(value) for name, value in metrics.items()})
        if math.isfinite(reward := float(metrics.get("reward/mean", math.nan))):
            self._rewards.append(reward)
        if self._live is None:
            self._write(self._plain_line())

    def phase(self, text: str) -> None:
        """What the trainer does from now on: "rollout", "reward", "update 1/2", "evaluate", "checkpoint"."""
        self._phase, self._phase_began = text, time.monotonic()

    def print(self, message: str) -> None:
        """A line above the bar: a warning, an evaluation's result. Control characters in it are made visible."""
        self._write(printable(message))

    def __enter__(self) -> ProgressDisplay:
        self._last_update = self._phase_began = time.monotonic()
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            self.phase("done" if self._step >= self._total_steps else "stopped")
        else:
            self.phase("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
        if self._live is not None:
            try:
                self._live.stop()  # also shows the cursor again
            except OSError:
                self._silent = True

    def _write(self, text: str) -> None:
        self._unwritten.append(text)
        # A signal handler may print amid a write, which files refuse: the write it interrupted then takes care of both.
        if self._writing:
            return
        self._writing = True
        try:
            while self._unwritten and not self._silent:
                self._write_now(self._unwritten.popleft())
        except OSError:
            self._silent = True
        finally:
            self._writing = False

    def _write_now(self, text: str) -> None:
        file = self._console.file
        text = _encodable(text, getattr(file, "encoding", None) or "utf-8")
        if self._live is None:
            print(text, file=file, flush=True)
        else:
            self._console.print(Text(text), soft_wrap=True)

    def _plain_line(self) -> str:
        fields = [f"step={self._step}/{self._total_steps}"]
        fields += [f"{key}={format_number(self._metrics.get(name))}" for name, _, key in _SHOWN]
        fields += [f"step_time={_seconds(self._step_seconds[-1] if self._step_seconds else None)}"]
        fields += [f"left={format_duration(self._seconds_left())}"]
        return " ".join(fields)

    def _seconds_left(self) -> float | None:
        if self._step >= self._total_steps:
            return 0.0
        if not self._step_seconds:
            return None
        return statistics.median(self._step_seconds) * (self._total_steps - self._step)

    def _render(self) -> Group:
        # Called by the refresh thread too: only reads, and never fails for want of a value.
        width = self._console.width
        return Group(self._bar_line(width), self._metrics_line(width))

    def _bar_line(self, width: int) -> Table:
        cells: list[Text | ProgressBar] = [Text(f"step {self._step}/{self._total_steps}", style="bold")]
        if width >= 50:
            bar = ProgressBar(
                total=self._total_steps,
                completed=self._step,
                style="bright_black",
                complete_style="cyan",
                finished_style="green",
            )
            cells.append(bar)
        if width >= 80:
            step_time = statistics.median(self._step_seconds) if self._step_seconds else None
            cells.append(Text(f"{_seconds(step_time)}/step", style="dim"))
        if self._step < self._total_steps:
            cells.append(Text(f"{format_duration(self._seconds_left())} left"))
        phase = Text(_encodable(printable(self._phase), self._console.encoding), style="cyan")
        if self._phase not in ("done", "stopped", "interrupted", "failed"):
            phase.append(f" {time.monotonic() - self._phase_began:.0f}s", style="dim")
        cells.append(phase)

        table = Table.grid(padding=(0, 2, 0, 0), expand=width >= 50)
        for cell in cells:
            if isinstance(cell, ProgressBar):
                table.add_column(ratio=1, min_width=8)
            else:  # wide enough for "update 1/2 10s", so that the bar keeps its length from phase to phase
                table.add_column(no_wrap=True, min_width=14 if cell is phase and width >= 80 else None)
        table.add_row(*cells)
        return table

    def _metrics_line(self, width: int) -> Text:
        """As many of the metrics as fit into `width` cells, the reward's history behind the reward."""
        parts = []
        for name, label, _ in _SHOWN:
            value = self._metrics.get(name)
            broken = value is not None and not math.isfinite(value)
            part = Text.assemble((f"{label} ", "dim"), (format_number(value), "bold red" if broken else "bold"))
            parts.append(part)
        needed = sum(cell_len(part.plain) for part in parts) + 3 * (len(parts) - 1)
        spare = min(width - needed - 1, _SPARKLINE_WIDTH)
        if spare >= 8 and len(self._rewards) > 1 and not self._console.options.ascii_only:
            parts[0].append(" ").append(_sparkline(self._rewards, spare), style="cyan")
        line = Text(no_wrap=True, overflow="crop")
        for part in parts:
            separator = "   " if line else ""
            if cell_len(line.plain) + len(separator) + cell_len(part.plain) > width:
                break
            line.append(separator).append_text(part)
        return line


def printable(text: str) -> str:
    """The text with its control characters, tab and newline apart, written out as \\x1b and so on."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _sparkline(values: list[float], width: int) -> str:
    """The history in at most `width` bars; each stands for the mean of its share of the steps."""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BARS[3] * width
    return "".join(_BARS[min(int((mean - low) / (high - low) * 8), 7)] for mean in means)


def format_number(value: float | None) -> str:
    """Four digits or so, in as little room as they need; "-" if not known."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.0f}s"


def format_duration(seconds: float | None) -> str:
    """3725 -> 1h02m, 125 -> 2m05s, 5 -> 5s; "-" if not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
