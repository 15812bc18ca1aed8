"""Draws what cpu.py and gpu.py measured: each contender's time as a ratio to the floor, a panel a case.

    python benchmarks/plot.py results/gpu-h100-2026-01-01.json   writes the .png beside it
    python benchmarks/plot.py results/cpu.json --output cpu.svg

Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from arguments import output, run_script


def read(path: Path) -> tuple[str, dict[str, list[tuple[str, float]]]]:
    """(title, case -> [(contender, time / floor)]) from the JSON of either script."""
    report = json.loads(path.read_text())
    if "rows" in report:
        title, rows = report["device"], report["rows"]
    elif "results" in report:
        settings, machine = report["settings"], report["machine"]
        case = f"N {settings['tokens']}, D {settings['dim']}, V {settings['vocab']}, {settings['dtype']}"
        title, rows = machine["processor"], [{"case": case, **row} for row in report["results"]]
    else:
        raise SystemExit(f"{path}: neither of benchmarks/cpu.py nor of benchmarks/gpu.py")
    cases: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row.get("ratio"):
            cases.setdefault(row["case"], []).append((row["name"], row["ratio"]))
    if not cases:
        raise SystemExit(f"{path}: no measured ratio in it")
    return title, cases


def draw(title: str, cases: dict[str, list[tuple[str, float]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) + 2 for rows in cases.values()]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(9, 0.28 * sum(heights) + 1), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axes, (case, rows) in zip(panels[:, 0], cases.items(), strict=True):
        names, ratios = zip(*rows, strict=True)
        bars = axes.barh(names, ratios, color=["0.7" if name.startswith("peer") else "C0" for name in names])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        axes.axvline(1.0, color="black", linewidth=0.8)
        if max(ratios) > 10:
            axes.set_xscale("log")
        axes.invert_yaxis()
        axes.margins(x=0.1, y=0.01)
        axes.tick_params(labelsize=7)
        axes.set_title(case, fontsize=9)
    panels[-1, 0].set_xlabel("time / floor")
    figure.suptitle(title, fontsize=10)
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=output, help="image; default: beside the report, as .png")
    options = parser.parse_args()
    try:
        measured = read(options.report)
    except (LookupError, TypeError, ValueError) as error:
        raise SystemExit(f"{options.report}: not a report of either script ({error})") from None
    image = options.output or options.report.with_suffix(".png")
    draw(*measured, image)
    print(image)


if __name__ == "__main__":
    run_script(main)
