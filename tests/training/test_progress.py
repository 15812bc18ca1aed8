"""The progress display: on a terminal, in a pipe, and after either was closed."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import unicodedata
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from fastppo.training.progress import ProgressDisplay, format_duration, format_number, printable

REPOSITORY = Path(__file__).resolve().parents[2]
METRICS = {
    "reward/mean": 0.412,
    "kl/reference": 0.00021,
    "policy/entropy": 2.5,
    "policy/clip_fraction": 0.081,
    "tokens_per_second": 1412.7,
    "time/step": 2.5,
}


def plain(**kwargs) -> tuple[ProgressDisplay, io.StringIO]:
    file = io.StringIO()
    return ProgressDisplay(console=Console(file=file), **kwargs), file


def on_terminal(width: int, **kwargs) -> tuple[ProgressDisplay, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system="truecolor", legacy_windows=False)
    return ProgressDisplay(console=console, enabled=True, **kwargs), file


def fields(line: str) -> dict[str, str]:
    return dict(field.split("=") for field in line.split(" "))


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_plain_is_one_parseable_line_a_step():
    display, file = plain(total_steps=3)
    with display:
        for step in (1, 2, 3):
            for phase in ("rollout", "reward", "update 1/2"):
                display.phase(phase)
            display.update(step, METRICS)
            display.note({"eval/reward": 0.1 * step, "alarms": step - 1})  # the trainer prints a line of its own
    lines = [fields(line) for line in file.getvalue().splitlines()]
    assert [line["step"] for line in lines] == ["1/3", "2/3", "3/3"]
    assert [line["left"] for line in lines] == ["0:00:05", "0:00:02", "0:00:00"]
    assert {line["step_time"] for line in lines} == {"2.50s"}
    assert lines[0]["reward"] == "0.412"
    assert [line["held_out"] for line in lines] == ["-", "0.1", "0.2"]
    assert [line["alarms"] for line in lines] == ["-", "0", "1"]
    assert float(lines[0]["kl"]) == 0.00021
    assert lines[0]["tokens_per_second"] == "1413"


def test_plain_has_no_control_characters_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    display, file = plain(total_steps=5)
    with display:
        display.print("evaluation: [bold]reward[/bold] \x1b[2J\x1b]0;title\x07 " + "long " * 60 + "\x9b31m end")
        display.phase("rollout \x1b[31m")
        display.update(1, METRICS)
    text = file.getvalue()
    assert len(text.splitlines()) == 2
    assert [char for char in text if unicodedata.category(char) == "Cc" and char != "\n"] == []
    assert text.startswith(r"evaluation: [bold]reward[/bold] \x1b[2J\x1b]0;title\x07 long")


def test_unknown_values_are_a_dash_and_nan_is_shown():
    display, file = plain(total_steps=9)
    with display:
        display.update(1, {"kl/reference": float("nan")})
    line = fields(file.getvalue().strip())
    assert line["reward"] == line["entropy"] == line["clip"] == line["tokens_per_second"] == "-"
    assert line["kl"] == "nan"


def test_time_left_follows_the_recent_median_of_the_steps_own_seconds():
    """A slow first step doesn't count, and after a change of pace the old steps are forgotten."""
    display, file = plain(total_steps=1000)
    with display:
        for step in range(1, 101):
            display.update(step, {"time/step": 120.0 if step == 1 else 4.0})
        assert fields(file.getvalue().splitlines()[-1])["left"] == "1:00:00"  # 900 steps of 4 s
        for step in range(101, 131):
            display.update(step, {"time/step": 1.0})
    assert fields(file.getvalue().splitlines()[-1])["left"] == "0:14:30"  # 870 steps of 1 s


def test_a_resumed_run_counts_from_its_step():
    display, file = plain(total_steps=100, start_step=90)
    with display:
        display.update(91, METRICS | {"time/step": 3.0})
    line = fields(file.getvalue().strip())
    assert (line["step"], line["step_time"], line["left"]) == ("91/100", "3.00s", "0:00:27")


def test_after_a_rollback_the_steps_are_counted_again():
    display, file = plain(total_steps=100)
    with display:
        for step in (1, 2, 3, 2):
            display.update(step, METRICS)
    assert [fields(line)["step"] for line in file.getvalue().splitlines()] == ["1/100", "2/100", "3/100", "2/100"]
    assert fields(file.getvalue().splitlines()[-1])["left"] == "0:04:05"


@pytest.mark.parametrize("width", [20, 39, 50, 66, 79, 80, 100, 200])
def test_the_live_display_fits_the_terminal(width):
    display, file = on_terminal(width, total_steps=100_000)
    with display:
        display.phase("a phase with a rather long name, longer than the terminal may be wide")
        for step in range(99_000, 99_050):
            display.update(step, METRICS)
            display.note({"eval/reward": -0.125, "alarms": step - 99_000})
    frames = without_escapes(file.getvalue()).replace("\r", "\n").split("\n")
    assert max(cell_len(line) for line in frames) <= width
    # What has room is shown whole, the most important first.
    line = next(line for line in reversed(frames) if "step" in line)
    assert line.startswith("step 99049/100000")
    for least, shown in {
        39: "reward 0.412",
        50: " left",
        66: "0:39:38 left 49 alarms",
        100: "held-out -0.125",
        200: "tokens/s 1413",
    }.items():
        assert (shown in line) == (width >= least)


def test_the_live_display_shows_everything_where_there_is_room():
    display, file = on_terminal(160, total_steps=40)
    with display:
        for step in range(1, 33):
            display.update(step, METRICS | {"reward/mean": step / 32, "time/step": 2.0})
        display.note({"eval/reward": 0.25, "alarms": 1})
        display.phase("sample 8/32")
    shown = without_escapes(file.getvalue()).rstrip().replace("\r", "\n").split("\n")
    metrics = "reward 1 KL 0.00021 held-out 0.25 entropy 2.5 clip 0.081 tokens/s 1413"
    assert re.fullmatch(rf"step 32/40 ━+╸?╺?━+ {metrics} 0:00:16 left 1 alarm stopped +\d:\d\d:\d\d", shown[-1])


def test_messages_go_above_the_bar_as_plain_text():
    display, file = on_terminal(80, total_steps=4)
    with display:
        display.print("evaluation [red]0.5[/red] \x1b[2J")
        print("a stray print")
    text = file.getvalue()
    assert "evaluation [red]0.5[/red] \\x1b[2J" in without_escapes(text)
    assert "a stray print" in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize(
    ("error", "word"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed"), (None, "stopped")]
)
def test_leaving_shows_the_cursor_and_gives_stdout_back(error, word):
    stdout, stderr = sys.stdout, sys.stderr
    display, file = on_terminal(80, total_steps=4)
    try:
        with display:
            assert "\x1b[?25l" in file.getvalue()
            if error:
                raise error
    except (KeyboardInterrupt, RuntimeError):
        pass
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    assert word in file.getvalue()
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def test_ctrl_c_on_a_real_terminal():
    program = textwrap.dedent(
        """
        import signal, time
        from fastppo.training.progress import ProgressDisplay
        # A shell that runs the tests in the background has SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with ProgressDisplay(10) as display:
            display.phase("rollout")
            display.update(1, {"reward/mean": 0.5})
            display.print("ready")
            time.sleep(60)
        """
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color"}, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    try:
        while b"ready" not in output:
            output += os.read(controller, 65536)
        process.send_signal(signal.SIGINT)
        while True:
            output += os.read(controller, 65536)
    except OSError:  # the terminal's other end is closed: the process has ended
        pass
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert b"interrupted" in output
    assert output.count(b"\x1b[?25l") == output.count(b"\x1b[?25h") == 1
    assert output.index(b"\x1b[?25h") < output.index(b"KeyboardInterrupt")  # the traceback is on a sane terminal


class Gone(io.StringIO):
    """A pipe whose reader has left, or a terminal that was hung up."""

    broken: OSError | None = None

    def write(self, text):
        if self.broken:
            raise self.broken
        return super().write(text)


@pytest.mark.parametrize(
    ("enabled", "error"), [(False, BrokenPipeError(32, "Broken pipe")), (True, OSError(5, "Input/output error"))]
)
def test_a_run_outlives_whoever_was_watching(enabled, error):
    stdout = sys.stdout
    file = Gone()
    display = ProgressDisplay(3, console=Console(file=file, force_terminal=enabled), enabled=enabled)
    with display:
        display.update(1, METRICS)
        file.broken = error
        display.update(2, METRICS)
        display.print("nobody sees this")
        display.update(3, METRICS)
        display.print("nor this")
    assert "step" in file.getvalue()
    assert "nobody" not in file.getvalue()
    assert sys.stdout is stdout


@pytest.mark.parametrize("enabled", [False, True])
def test_a_signal_handler_may_print_amid_a_write(enabled):
    class Interrupted(io.StringIO):
        """A file that a signal hits while it writes; a second write into it then fails as that of a real file does."""

        writing = False

        def write(self, text):
            if self.writing:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter>")
            self.writing = True
            if "first" in text:
                display.print("from the handler")
            super().write(text)
            self.writing = False

    file = Interrupted()
    display = ProgressDisplay(3, console=Console(file=file, force_terminal=enabled), enabled=enabled)
    with display:
        display.print("first")
        display.print("second")
    lines = without_escapes(file.getvalue()).replace("\r", "\n").split("\n")
    assert [line for line in lines if line in ("first", "from the handler", "second")] == [
        "first",
        "from the handler",
        "second",
    ]


@pytest.mark.parametrize("enabled", [False, True])
def test_a_terminal_that_knows_only_ascii(enabled):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=enabled, width=100)
    with ProgressDisplay(3, console=console, enabled=enabled) as display:
        display.print("reward 0.1 → 0.2")
        display.phase("évaluation")
        display.update(1, METRICS)
        display.update(2, METRICS)
    console.file.flush()
    assert rb"reward 0.1 \u2192 0.2" in raw.getvalue()
    assert b"2/3" in raw.getvalue()


def test_durations_and_numbers_are_one_word():
    assert [format_duration(t) for t in (None, 5.4, 3725, 400_000)] == ["-", "0:00:05", "1:02:05", "111:06:40"]
    numbers = (None, 0.412, 0.00021, 123456.7, -float("inf"), 0.0, 1 / 3)
    assert [format_number(x) for x in numbers] == ["-", "0.412", "0.00021", "123457", "-inf", "0", "0.3333"]


def test_printable_leaves_text_alone():
    text = "naïve — 東京 😀\n\tשלום"
    assert printable(text) == text
    assert printable("a\r\nb\rc\x7f\x85") == "a\nb\\x0dc\\x7f\\x85"
