"""The report of a run: plots as PNG files, and one HTML page that holds everything and needs nothing else.

It is made from what the run left in its folder (metrics.jsonl, config.yaml, samples/), so it can be written at any
time, also while the run goes on or after it was killed; what is missing is left out.
"""

from __future__ import annotations

import base64
import datetime
import functools
import importlib.metadata
import importlib.resources
import io
import math
import os
import platform
import re
import statistics
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.style
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

import fastppo
from fastppo.training.metrics import (
    METRICS_FILE,
    SAMPLES_FOLDER,
    atomic_write,
    read_alarms,
    read_metrics,
    read_samples,
)
from fastppo.training.progress import format_duration, format_number, printable

PLOTS_FOLDER = "plots"
REPORT_FILE = "report.html"

# Statistics of the total reward; every other reward/<name> is one of its parts.
_REWARD_STATISTICS = {"reward/mean", "reward/std", "reward/min", "reward/max"}
# Durations that contain the others.
_WHOLE_STEP = {"time/step", "time/total"}
_SMOOTH_FROM = 40  # points; fewer are drawn as they are
_LOG_SCALE_FROM = 300  # largest over smallest value
_MAX_SAMPLES = 100

Series = tuple[np.ndarray, np.ndarray]  # steps and values, both [n], finite, steps ascending
_Draw = Callable[[Figure, "_Theme"], None]


@dataclass(frozen=True)
class _Theme:
    background: str
    text: str
    faint: str  # ticks and axes
    grid: str
    palette: tuple[str, ...]


# The backgrounds are those of the page's cards (report.html.j2).
_LIGHT = _Theme("#ffffff", "#1f2430", "#69707d", "#e6e8ec", ("#2a6fb5", "#c7621a", "#2f8a5b", "#7b57b3", "#a8892a"))
_DARK = _Theme("#1b1e24", "#dfe2e7", "#969daa", "#31353d", ("#6fabe8", "#eb9a5e", "#6cc294", "#b398e6", "#d4b85a"))


@dataclass(frozen=True)
class _Curve:
    metric: str
    label: str
    color: int = 0  # of the palette
    sparse: bool = False
    """Values of some steps only, such as evaluations: joined points, never smoothed."""


@dataclass(frozen=True)
class _Panel:
    """One pair of axes."""

    ylabel: str
    curves: list[_Curve]
    height: float = 1.0
    percent: bool = False
    from_zero: bool = False
    floor: float | None = None
    """The axis ends here even where values go lower."""
    level: tuple[float, str] | None = None
    """A horizontal line and what it is."""


@dataclass(frozen=True)
class _Plot:
    """One image: panels above each other that share their steps."""

    name: str
    title: str
    panels: list[_Panel]


@dataclass
class _Run:
    """What the folder holds."""

    name: str
    series: dict[str, Series] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    before: list[dict[str, Any]] = field(default_factory=list)
    after: list[dict[str, Any]] = field(default_factory=list)
    after_label: str = "After"
    alarms: list[dict[str, Any]] = field(default_factory=list)

    def setting(self, dotted: str) -> Any:
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def write_report(output_dir: str | Path) -> Path:
    """Write ``output_dir/plots/*.png`` and ``output_dir/report.html`` from what the run left in the folder.

    The page is one self-contained file: plots embedded (for a light and a dark screen), styles inline, no script,
    nothing fetched. Everything that a model, a data set or a person wrote is escaped.

    Args:
        output_dir: a run's folder with metrics.jsonl, config.yaml, samples/before.jsonl and samples/after.jsonl; each
            may be missing, and so may any metric. Without samples/after.jsonl the latest samples/step-*.jsonl stand in.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: the folder holds nothing of a run.
    """
    output_dir = Path(output_dir)
    run = _load(output_dir)
    images = []
    for name, title, draw in _drawings(run):
        light, dark = _png(title, draw, _LIGHT), _png(title, draw, _DARK)
        atomic_write(output_dir / PLOTS_FOLDER / f"{name}.png", light)
        images.append({"title": title, "light": _base64(light), "dark": _base64(dark)})

    samples = _pair_samples(run.before, run.after)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "printable": printable}
    template = environment.from_string(
        importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        name=run.name,
        model=str(run.setting("model.name_or_path") or ""),
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=_tiles(run),
        notices=_notices(run),
        alarms=run.alarms,
        images=images,
        smoothed=max((len(steps) for steps, _ in run.series.values()), default=0) >= _SMOOTH_FROM,
        smooth_from=_SMOOTH_FROM,
        samples=samples[:_MAX_SAMPLES],
        samples_left_out=max(0, len(samples) - _MAX_SAMPLES),
        has_before=bool(run.before),
        has_after=bool(run.after),
        after_label=run.after_label,
        metrics=_metrics_table(run),
        config_text=run.config_text,
        versions=_versions(),
    )
    path = output_dir / REPORT_FILE
    # A lone surrogate has no UTF-8 form.
    atomic_write(path, page.encode("utf-8", "replace"))
    return path


def _load(output_dir: Path) -> _Run:
    metrics, config = output_dir / METRICS_FILE, output_dir / "config.yaml"
    samples = {path.stem for path in (output_dir / SAMPLES_FOLDER).glob("*.jsonl")}
    if not (metrics.exists() or config.exists() or samples):
        raise FileNotFoundError(
            f"{output_dir}: not the folder of a run (expected {METRICS_FILE}, config.yaml or {SAMPLES_FOLDER}/ in it)"
        )
    run = _Run(name=output_dir.resolve().name, alarms=read_alarms(output_dir))
    if metrics.exists():
        _load_metrics(run, metrics)
    if config.exists():
        run.config_text = config.read_text(encoding="utf-8", errors="replace")
        try:
            tree = yaml.safe_load(run.config_text)
        except yaml.YAMLError:
            tree = None  # then the text alone is shown
        run.config = tree if isinstance(tree, dict) else {}
    if "before" in samples:
        run.before = read_samples(output_dir, "before")
    # step-000010 and the like: with their leading zeros, the latest sorts last.
    latest = "after" if "after" in samples else max((name for name in samples if name.startswith("step-")), default="")
    if latest:
        run.after = read_samples(output_dir, latest)
        run.after_label = re.sub(r"^step-0*(?=\d)", "Step ", latest).capitalize()
    return run


def _load_metrics(run: _Run, path: Path) -> None:
    columns: dict[str, dict[int, float]] = defaultdict(dict)
    for line in read_metrics(path):
        step = line.pop("step")
        run.steps = max(run.steps, step)
        run.seconds = max(run.seconds, line.pop("time", 0.0))
        for name, value in line.items():
            if math.isfinite(value):
                columns[name][step] = value  # two lines of one step (an evaluation's and the step's) become one
            else:
                run.nonfinite[name] = run.nonfinite.get(name, 0) + 1
    for name, values in columns.items():
        steps = sorted(values)
        run.series[name] = np.array(steps), np.array([values[step] for step in steps], dtype=np.float64)


# The plots


def _plots(run: _Run) -> list[_Plot]:
    def both(training: str, held_out: str) -> list[_Curve]:
        return [_Curve(training, "training prompts"), _Curve(held_out, "held-out prompts", 1, sparse=True)]

    parts = sorted(name for name in run.series if name.startswith("reward/") and name not in _REWARD_STATISTICS)
    part_curves = [_Curve(name, name.removeprefix("reward/"), color) for color, name in enumerate(parts)]
    reward_parts = [_Panel("reward", part_curves if len(parts) > 1 else [], height=2)]
    if multipliers := _named(run, "multiplier/"):
        reward_parts.append(_Panel("multiplier", multipliers, from_zero=True))
    explained = _named(run, "value/explained_variance/") or [
        _Curve("value/explained_variance", "explained variance", 2)
    ]
    kl = [_Panel("nats/completion", both("kl/reference", "eval/kl"), height=2)]
    if _varies(run, "kl/coef"):
        kl.append(_Panel("coefficient", [_Curve("kl/coef", "coefficient", 3)]))
    value = [
        _Panel("value loss", [_Curve("loss/value", "value loss")], height=2),
        _Panel("expl. variance", explained, floor=-1.0),
    ]
    clip_fraction = _Curve("policy/clip_fraction", "clip fraction")
    clipping = [
        _Panel("clipped tokens", [clip_fraction], height=2, percent=True, from_zero=True),
        _Panel("nats/token", [_Curve("policy/approx_kl", "KL to the rollout policy", 3)]),
    ]
    limit = run.setting("rollout.max_new_tokens")
    level = (limit, "max_new_tokens") if isinstance(limit, int) else None
    optimizer = [_Panel("gradient norm", [_Curve("grad_norm", "gradient norm")], height=2)]
    if _varies(run, "lr"):
        optimizer.append(_Panel("learning rate", [_Curve("lr", "learning rate", 3)]))
    throughput = _Panel("tokens/s", [_Curve("tokens_per_second", "tokens/s")], from_zero=True)
    not_trained = [reward.get("name") for reward in run.setting("eval.rewards") or [] if isinstance(reward, dict)]
    held_out = [_Curve(f"eval/{name}", str(name), color + 2, sparse=True) for color, name in enumerate(not_trained)]
    if any(curve.metric in run.series for curve in held_out):
        held_out.insert(0, _Curve("eval/reward", "what is trained", 1, sparse=True))
    perplexity = [
        _Curve("eval/perplexity", "policy", 1, sparse=True),
        _Curve("eval/perplexity_reference", "reference", 3, sparse=True),
    ]
    text = [
        _Panel("different", [_Curve("text/distinct_1", "1-grams"), _Curve("text/distinct_2", "2-grams", 1)], height=2),
        _Panel("repeated 4-grams", [_Curve("text/repetition", "repeated", 2)], percent=True, from_zero=True),
    ]
    extremes = [
        _Panel("largest ratio", [_Curve("policy/ratio_max", "largest ratio")]),
        _Panel("advantage, std", [_Curve("advantage/extreme", "farthest advantage", 3)]),
    ]
    return [
        _Plot("reward", "Reward", [_Panel("reward", both("reward/mean", "eval/reward"))]),
        # One part alone says no more than the total.
        _Plot("reward_parts", "Parts of the reward", reward_parts),
        _Plot("kl", "KL to the reference", kl),
        _Plot("entropy", "Policy entropy", [_Panel("nats/token", [_Curve("policy/entropy", "entropy")])]),
        _Plot("value", "Value function", value),
        _Plot("clipping", "Clipping and KL of an update", clipping),
        _Plot("held_out", "Held-out rewards, not trained on", [_Panel("reward", held_out)]),
        _Plot("perplexity", "Perplexity on ordinary text", [_Panel("perplexity", perplexity)]),
        _Plot("text", "Variety and repetition", text),
        _Plot("extremes", "Extremes", extremes),
        _Plot("length", "Completion length", [_Panel("tokens", both("completion/length", "eval/length"), level=level)]),
        _Plot("optimizer", "Optimizer", optimizer),
        _Plot("throughput", "Throughput", [throughput]),
    ]


def _named(run: _Run, prefix: str) -> list[_Curve]:
    """The curves that there are for each of several rewards."""
    names = sorted(name for name in run.series if name.startswith(prefix))
    return [_Curve(name, name.removeprefix(prefix), color) for color, name in enumerate(names)]


def _varies(run: _Run, metric: str) -> bool:
    return metric in run.series and len(set(run.series[metric][1])) > 1


def _drawings(run: _Run) -> list[tuple[str, str, _Draw]]:
    """(file name, title, what draws it) of every plot that there is data for."""
    drawings: list[tuple[str, str, _Draw]] = []
    for plot in _plots(run):
        panels = [panel for panel in plot.panels if any(curve.metric in run.series for curve in panel.curves)]
        if panels:
            drawings.append((plot.name, plot.title, functools.partial(_draw_panels, panels=panels, series=run.series)))
    if paths := _reward_against_kl(run):
        drawings.append(("frontier", "Reward against KL", functools.partial(_draw_paths, paths=paths)))
    if seconds := _seconds_by_phase(run):
        drawings.append(("time", "Time in a step", functools.partial(_draw_time, seconds=seconds)))
    return drawings


def _reward_against_kl(run: _Run) -> dict[str, Series]:
    """(KL, reward) of the steps that have both, in their order, for the training and the held-out prompts."""
    paths = {}
    for label, kl, reward in (
        ("training prompts", "kl/reference", "reward/mean"),
        ("held-out prompts", "eval/kl", "eval/reward"),
    ):
        if kl in run.series and reward in run.series:
            steps, at_kl, at_reward = np.intersect1d(run.series[kl][0], run.series[reward][0], return_indices=True)
            if len(steps) > 1:
                paths[label] = (run.series[kl][1][at_kl], run.series[reward][1][at_reward])
    return paths


def _draw_paths(figure: Figure, theme: _Theme, *, paths: dict[str, Series]) -> None:
    axes = figure.subplots()
    for color, (label, (kl, reward)) in enumerate(paths.items()):
        axes.plot(kl, reward, color=theme.palette[color], linewidth=1, marker="o", markersize=3, label=label)
        axes.plot(kl[-1:], reward[-1:], color=theme.palette[color], marker="o", markersize=7)  # where it ended
    axes.set_xlabel("KL to the reference, nats/completion")
    axes.set_ylabel("reward")
    if len(paths) > 1:
        axes.legend()


def _draw_panels(figure: Figure, theme: _Theme, *, panels: list[_Panel], series: dict[str, Series]) -> None:
    rows = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=[panel.height for panel in panels])
    steps: set[int] = set()
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        curves = [curve for curve in panel.curves if curve.metric in series]
        lines = [_draw_curve(axes, series[curve.metric], curve, theme) for curve in curves]
        steps.update(*(series[curve.metric][0] for curve in curves))
        _scale(axes, panel, np.concatenate([series[curve.metric][1] for curve in curves]))
        if panel.level:
            height, text = panel.level
            axes.axhline(height, color=theme.faint, linewidth=1, linestyle=(0, (3, 3)))
            label = axes.annotate(text, (1, height), (0, 4), axes.get_yaxis_transform(), "offset points", ha="right")
            label.set_color(theme.faint)
        axes.set_ylabel(panel.ylabel)
        if len(panel.curves) > 1:
            axes.legend(lines, [_shorten(curve.label) for curve in curves])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, max(steps) + 1)
    figure.align_ylabels()


def _draw_curve(axes: Axes, series: Series, curve: _Curve, theme: _Theme) -> Line2D:
    steps, values = series
    color = theme.palette[curve.color % len(theme.palette)]
    if curve.sparse or len(steps) < _SMOOTH_FROM:
        [line] = axes.plot(steps, values, color=color, linewidth=1.5, marker="o", markersize=4 if curve.sparse else 3)
    else:
        axes.plot(
            steps, values, color=color, linestyle="none", marker="o", markersize=2.5, alpha=0.3, markeredgewidth=0
        )
        [line] = axes.plot(steps, _smooth(values), color=color, linewidth=1.6)
    return line


def _scale(axes: Axes, panel: _Panel, values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    elif low > 0 and high / low > _LOG_SCALE_FROM:
        axes.set_yscale("log")
    if panel.floor is not None and low < panel.floor < high:
        axes.set_ylim(bottom=panel.floor)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving mean over a twentieth of the points, over what there is of it at both ends; [n] -> [n]."""
    half = max(2, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _seconds_by_phase(run: _Run) -> dict[str, float]:
    """Mean seconds of a step by phase, longest first."""
    phases = {name: series for name, series in run.series.items() if name.startswith("time/")}
    whole = next((phases[name] for name in ("time/step", "time/total") if name in phases), None)
    phases = {name: series for name, series in phases.items() if name not in _WHOLE_STEP}
    if not phases:
        return {}
    # A phase that some steps lack (an evaluation, a checkpoint) is spread over all of them.
    steps = len(whole[0]) if whole else max(len(series[0]) for series in phases.values())
    seconds = {name.removeprefix("time/"): float(values.sum()) / steps for name, (_, values) in phases.items()}
    if whole and (rest := float(whole[1].sum()) / steps - sum(seconds.values())) > 0.01 * sum(seconds.values()):
        seconds["other"] = rest
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _draw_time(figure: Figure, theme: _Theme, seconds: dict[str, float]) -> None:
    axes = figure.subplots()
    total = sum(seconds.values())
    bars = axes.barh(range(len(seconds)), list(seconds.values()), height=0.6, color=theme.palette[0])
    texts = [f"{value:.3g} s   {value / total if total else 0:.0%}" for value in seconds.values()]
    axes.bar_label(bars, texts, padding=4, color=theme.text, fontsize=9)
    axes.set_yticks(range(len(seconds)), [_shorten(name) for name in seconds])
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("mean seconds in a step")


def _png(title: str, draw: _Draw, theme: _Theme) -> bytes:
    style = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "text.color": theme.text,
        "text.parse_math": False,  # a reward may be called "$x"
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    # On a Figure of its own, without pyplot: the caller's backend and open figures stay as they are.
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        # A reward's name in a script that the font lacks: boxes in the plot, but the page's table has it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        draw(figure, theme)
        figure.suptitle(title, x=0.015, ha="left", fontsize=11, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=180)
    return buffer.getvalue()


# The page's other parts


def _tiles(run: _Run) -> list[tuple[str, str, str]]:
    """The headline, as (label, value, note)."""
    tiles = []
    for metric, label in (("eval/reward", "Reward, held-out prompts"), ("reward/mean", "Reward, training prompts")):
        if metric in run.series:
            steps, values = run.series[metric]
            first, last = values[0], values[-1]
            if len(steps) > 1:
                change = f"{last - first:+.3f} from step {steps[0]} to {steps[-1]}"
                tiles.append((label, f"{_fixed(first)} → {_fixed(last)}", change))
            else:
                tiles.append((label, _fixed(last), f"step {steps[0]}"))
            break
    # The later of the two; on a tie the held-out prompts, as for the reward.
    if kl := max(
        (run.series[name] for name in ("eval/kl", "kl/reference") if name in run.series),
        key=lambda series: series[0][-1],
        default=None,
    ):
        tiles.append(("KL to the reference", format_number(kl[1][-1]), "nats/completion"))
    total = run.setting("total_steps")
    tiles.append(("Steps", str(run.steps), f"of {total}" if total else ""))
    if run.seconds:
        tiles.append(("Wall time", format_duration(run.seconds), ""))
    if "tokens_per_second" in run.series:
        median = statistics.median(run.series["tokens_per_second"][1])
        tiles.append(("Tokens/s", format_number(median), "median of the steps"))
    return tiles


def _notices(run: _Run) -> list[str]:
    notices = []
    total = run.setting("total_steps")
    if isinstance(total, int) and run.steps < total:
        notices.append(f"Written after step {run.steps} of {total}: the run was stopped early or still goes on.")
    if run.nonfinite:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(run.nonfinite.items()))
        notices.append(f"Values that are NaN or infinite, left out of the plots: {listed}.")
    return notices


def _pair_samples(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """(prompt, row before, row after), in order; completions of one prompt are paired as they come."""
    waiting: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
    for row in after:
        waiting[row["prompt"]].append(row)
    pairs = []
    for row in before:
        partners = waiting[row["prompt"]]
        pairs.append((row["prompt"], row, partners.popleft() if partners else None))
    return pairs + [(row["prompt"], None, row) for rows in waiting.values() for row in rows]


def _metrics_table(run: _Run) -> list[tuple[str, list[float]]]:
    """(name, [first, last, lowest, highest]) of every metric."""
    return [
        (name, [values[0], values[-1], values.min(), values.max()]) for name, (_, values) in sorted(run.series.items())
    ]


def _versions() -> dict[str, str]:
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "fastppo": fastppo.__version__,
        "torch": torch.__version__,
        "transformers": transformers,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _fixed(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def _shorten(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 28 else text[:27] + "…"
