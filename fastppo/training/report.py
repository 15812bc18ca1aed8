"""The report of a run: plots as PNG files, and one self-contained HTML page.

It reads only what the run wrote to its folder (metrics.jsonl, alarms.jsonl, config.yaml, samples/), so it can be
written at any time, also during the run or after a kill. Missing files and metrics are left out. Every metric that
changes is plotted, in the group that its first word belongs to (`_GROUPS`).
"""

from __future__ import annotations

import base64
import contextlib
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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.style
import numpy as np
import torch
import yaml
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import fastppo
from fastppo.training.files import atomic_write
from fastppo.training.metrics import (
    METRICS_FILE,
    SAMPLES_FOLDER,
    read_alarms,
    read_metrics,
    read_samples,
)
from fastppo.training.progress import format_duration, format_number, printable

PLOTS_FOLDER = "plots"
REPORT_FILE = "report.html"

_MAX_SAMPLES = 100
_SMOOTH_FROM = 40  # points; fewer are joined as they are
_LOG_SCALE_FROM = 300  # largest value over the 5% quantile: a share that is rarely near zero stays linear

# Plots, in the page's order, and the first words of the metrics in each; report.html.j2 has their titles and what is
# healthy.
_GROUPS = {
    "reward_kl": (),
    "eval": ("eval",),
    "rewards": ("reward", "multiplier"),
    "kl": ("kl",),
    "policy": ("policy", "advantage", "cg", "cpi"),
    "value": ("value",),
    "completions": ("completion", "text"),
    "optimizer": ("grad_norm", "lr", "loss"),
    "speed": ("tokens_per_second", "time"),
    "other": (),
}
# Metrics that belong elsewhere than their first word says.
_GROUP_OF = {
    "reward/mean": "reward_kl",
    "kl/reference": "reward_kl",
    "reward/gain_per_sqrt_kl": "kl",
    "loss/value": "value",
}
# Metrics that are drawn into another one's panel.
_PANEL_OF = {
    "eval/reward": "reward/mean",
    "eval/kl": "kl/reference",
    "eval/length": "completion/length",
    "eval/perplexity_reference": "eval/perplexity",
}
_TITLES = {
    "reward/mean": "Reward",
    "kl/reference": "KL to the reference, nats per completion",
    "policy/entropy": "policy/entropy, nats per token",
    "policy/approx_kl": "policy/approx_kl, nats per token",
    "completion/length": "completion/length, tokens",
    "time/step": "Seconds by phase",
}

_FAINT = "#69707d"
_STYLE = {
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=["#2a6fb5", "#c7621a", "#2f8a5b", "#7b57b3", "#a8892a"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "#e6e8ec",
    "legend.frameon": False,
    "text.parse_math": False,  # a reward may be called "$x"
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
}

_Panel = tuple[str, Callable[[Axes], None]]  # title, what draws it
_Row = dict[str, Any]  # of samples


@dataclass
class _Run:
    """What the folder holds."""

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Finite values by metric and step, steps ascending."""
    nonfinite: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    steps: int = 0
    seconds: float = 0.0
    config: Any = None
    config_text: str = ""
    samples: list[list[_Row]] = field(default_factory=lambda: [[], []])
    """Before the first step, and the latest."""
    after_label: str = "After"

    def setting(self, dotted: str) -> Any:
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def write_report(output_dir: str | Path) -> Path:
    """Write ``output_dir/plots/*.png`` and ``output_dir/report.html``.

    The page embeds its plots and styles, has no script and fetches nothing. Everything that a model, a data set or a
    person wrote is escaped.

    Args:
        output_dir: a run's folder with metrics.jsonl, config.yaml, samples/before.jsonl and samples/after.jsonl; each
            may be missing. Without samples/after.jsonl, the latest samples/step-*.jsonl are shown.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: the folder has none of these.
    """
    output_dir = Path(output_dir)
    run = _load(output_dir)
    images = {name: _png(panels, 4.2 if name == "reward_kl" else 2.6) for name, panels in _panels(run).items()}
    for name, image in images.items():
        atomic_write(output_dir / PLOTS_FOLDER / f"{name}.png", image)
    samples = _pair_samples(*run.samples)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "printable": printable}
    template = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        run=run,
        model=str(run.setting("model.name_or_path") or ""),
        algorithm=str(run.setting("algorithm") or "trained"),
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=_tiles(run),
        total_steps=run.setting("total_steps"),
        alarms=read_alarms(output_dir),
        groups=[(name, base64.b64encode(image).decode("ascii")) for name, image in images.items()],
        smooth_from=_SMOOTH_FROM,
        samples=samples[:_MAX_SAMPLES],
        samples_left_out=max(0, len(samples) - _MAX_SAMPLES),
        metrics=[(name, list(values.values())) for name, values in sorted(run.series.items())],
        versions={
            "fastppo": fastppo.__version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {device}",
        },
    )
    atomic_write(output_dir / REPORT_FILE, page.encode("utf-8", "replace"))  # a lone surrogate has no UTF-8 form
    return output_dir / REPORT_FILE


def _load(output_dir: Path) -> _Run:
    metrics, config = output_dir / METRICS_FILE, output_dir / "config.yaml"
    samples = {path.stem for path in (output_dir / SAMPLES_FOLDER).glob("*.jsonl")}
    if not (metrics.exists() or config.exists() or samples):
        raise FileNotFoundError(
            f"{output_dir}: not the folder of a run (expected {METRICS_FILE}, config.yaml or {SAMPLES_FOLDER}/ in it)"
        )
    run = _Run(name=output_dir.resolve().name)
    # An evaluation's line and the step's own have the same step.
    for line in sorted(read_metrics(metrics), key=lambda line: line["step"]):
        run.steps = step = line.pop("step")
        run.seconds = max(run.seconds, line.pop("time", 0.0))
        for name, value in line.items():
            if abs(value) < 1e100:  # the plots' axes overflow near the largest float
                run.series[name][step] = value
            else:
                run.nonfinite[name] += 1
    if config.exists():
        run.config_text = config.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(yaml.YAMLError):  # then the text alone is shown
            run.config = yaml.safe_load(run.config_text)
    # step-000010 and the like: with their leading zeros, the latest sorts last. Steps that a rollback or a kill undid
    # have left samples too, and a run that was prolonged has those after its earlier end.
    steps = [name for name in samples if re.fullmatch(r"step-\d+", name)]
    if run.steps:
        steps = [name for name in steps if int(name.removeprefix("step-")) <= run.steps]
    total = run.setting("total_steps")
    unfinished = isinstance(total, int) and run.steps < total
    latest = "after" if "after" in samples and not (unfinished and steps) else max(steps, default="")
    run.samples = [read_samples(output_dir, name) for name in ("before", latest)]
    run.after_label = re.sub(r"^step-0*(?=\d)", "Step ", latest).capitalize()
    return run


# The plots


def _panels(run: _Run) -> dict[str, list[_Panel]]:
    """The panels of each group that there is data for, in the page's order."""
    parts = {name for name in run.series if name.startswith("reward/")}
    parts -= {"reward/mean", "reward/std", "reward/gain_per_sqrt_kl"}
    curves: dict[str, list[str]] = defaultdict(list)
    for name in sorted(run.series, key=lambda name: (name.startswith("eval/"), name)):  # held-out values are drawn last
        if re.match(r"watch/|eval/(.*_std|num_prompts)$", name):
            continue
        beside = f"reward/{name.removeprefix('eval/')}"
        key = _PANEL_OF.get(name, beside if beside in parts else name)
        key = "time/step" if name.startswith("time/") else key
        if parts != {key}:  # a single reward says no more than the total
            curves[key].append(name)

    groups: dict[str, list[_Panel]] = {name: [] for name in _GROUPS}
    for key, names in curves.items():
        prefix = key.partition("/")[0]
        by_prefix = next((name for name, words in _GROUPS.items() if prefix in words), "other")
        values = [value for name in names for value in run.series[name].values()]
        # A metric that never changes is in the table.
        if key in _GROUP_OF or len(values) == 1 or len(set(values)) > 1:
            draw = functools.partial(_draw_curves, run=run, names=names)
            groups[_GROUP_OF.get(key, by_prefix)].append((_TITLES.get(key, key), draw))
    groups["reward_kl"].sort(key=lambda panel: panel[0] != "Reward")
    if {"kl/reference", "reward/mean"} <= run.series.keys():
        groups["kl"].append(("Reward against KL", functools.partial(_draw_reward_against_kl, run=run)))
    return {name: panels for name, panels in groups.items() if panels}


def _draw_curves(axes: Axes, *, run: _Run, names: list[str]) -> None:
    held_out = [name for name in names if name.startswith("eval/")]
    for name in names:
        steps, values = list(run.series[name]), list(run.series[name].values())
        if name in held_out:
            deviations, counts = run.series.get(f"{name}_std", {}), run.series.get("eval/num_prompts", {})
            errors = [deviations.get(step, math.nan) / math.sqrt(counts.get(step, math.nan)) for step in steps]
            label = name if held_out == names else "held-out prompts"
            axes.errorbar(steps, values, errors, fmt="o", markersize=5, capsize=3, label=label, zorder=3)
        else:
            label = "training prompts" if held_out else name
            smooth = len(steps) >= _SMOOTH_FROM
            [line] = axes.plot(steps, _smooth(values), marker="" if smooth else "o", markersize=3, label=label)
            if smooth:
                axes.plot(steps, values, ".", color=line.get_color(), markersize=4, alpha=0.3, markeredgewidth=0)
    if len(names) > 1:
        axes.legend(**{"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(names) > 2 else {})
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    every = [value for name in names for value in run.series[name].values()]
    low, most, high = np.quantile(every, [0, 0.05, 1])
    if low > 0 and high / most > _LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default is mathematical text, which `_STYLE` turns off
    elif names[0].startswith("value/explained_variance") and low < -1 < high:
        axes.set_ylim(bottom=-1)  # the first steps may be far lower


def _smooth(values: Sequence[float]) -> Sequence[float]:
    """Centered moving mean over a twentieth of the points, narrower at both ends. Few points are returned unchanged."""
    if len(values) < _SMOOTH_FROM:
        return values
    window = np.ones(2 * max(2, len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw_reward_against_kl(axes: Axes, *, run: _Run) -> None:
    for label, kl, reward, marker in (
        ("training prompts", "kl/reference", "reward/mean", ".-"),
        ("held-out prompts", "eval/kl", "eval/reward", "o"),
    ):
        kl, reward = run.series.get(kl, {}), run.series.get(reward, {})
        if both := sorted(kl.keys() & reward.keys()):
            pair = (_smooth([values[step] for step in both]) for values in (kl, reward))
            axes.plot(*pair, marker, label=label)
    axes.legend()


def _png(panels: list[_Panel], height: float) -> bytes:
    """Up to three panels side by side, in rows of `height` inches that are as wide as the image."""
    rows = [list(row) for row in np.array_split(np.arange(len(panels)), math.ceil(len(panels) / 3))]
    # On a Figure of its own, without pyplot: the caller's backend and open figures stay as they are.
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A reward's name in a script that the font lacks: boxes in the plot, but the page's table has it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(12, height * len(rows)), layout="constrained")
        grid = figure.add_gridspec(len(rows), 6)
        for y, row in enumerate(rows):
            width = 6 // len(row)
            for x, index in enumerate(row):
                title, draw = panels[index]
                axes = figure.add_subplot(grid[y, x * width : (x + 1) * width])
                axes.set_title(_shorten(title))
                draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _shorten(text: str) -> str:
    text = printable(text).replace("\n", " ")
    return text if len(text) <= 44 else text[:43] + "…"


# The page's other parts


def _tiles(run: _Run) -> list[tuple[str, str, str]]:
    """The headline, as (label, value, note)."""
    tiles = []
    for metric, label in (("eval/reward", "Reward, held-out prompts"), ("reward/mean", "Reward, training prompts")):
        if metric in run.series and not tiles:
            values = list(run.series[metric].items())
            (first, start), (last, end) = values[0], values[-1]
            change = f"{end - start:+.3f} from step {first} to {last}" if first < last else f"step {last}"
            tiles.append((label, f"{start:.3f} → {end:.3f}" if first < last else f"{end:.3f}", change))
    # The later of the two; on a tie the held-out prompts, as for the reward.
    measured = [run.series[name] for name in ("eval/kl", "kl/reference") if name in run.series]
    if kl := max(measured, key=max, default=None):
        tiles.append(("KL to the reference", format_number(kl[max(kl)]), "nats/completion"))
    total = run.setting("total_steps")
    tiles.append(("Steps", str(run.steps), f"of {total}" if total else ""))
    if run.seconds:
        tiles.append(("Wall time", format_duration(run.seconds), ""))
    if speed := run.series.get("tokens_per_second"):
        tiles.append(("Tokens/s", format_number(statistics.median(speed.values())), "median of the steps"))
    return tiles


def _pair_samples(before: list[_Row], after: list[_Row]) -> list[tuple[str, _Row | None, _Row | None]]:
    """(prompt, row before, row after), in order; completions of one prompt are paired in their order."""
    waiting: dict[str, list[_Row]] = defaultdict(list)
    for row in after:
        waiting[row["prompt"]].append(row)
    pairs = [(row["prompt"], row, waiting[row["prompt"]].pop(0) if waiting[row["prompt"]] else None) for row in before]
    return pairs + [(row["prompt"], None, row) for rows in waiting.values() for row in rows]
