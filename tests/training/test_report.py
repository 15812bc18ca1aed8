"""The report: one self-contained page, with everything that others wrote escaped, also for incomplete runs."""

import base64
import importlib.resources
import io
import json
import os
import random
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

import fastppo
from fastppo.training import report
from fastppo.training.metrics import MetricsLogger, write_alarms, write_samples
from fastppo.training.report import write_report

TEMPLATE = importlib.resources.files("fastppo.training").joinpath("report.html.j2")
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'&amp;"


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.style = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "style" and "{" in data:
            self.style += data
        else:
            self.text += f" {data}"

    def images(self) -> list[np.ndarray]:
        values = [value for name, value in self.attributes if name in ("src", "srcset")]
        prefix = "data:image/png;base64,"
        assert all(value.startswith(prefix) for value in values)
        return [matplotlib.image.imread(io.BytesIO(base64.b64decode(value.removeprefix(prefix)))) for value in values]


def log(folder: Path, lines: list[tuple[int, dict[str, float]]]) -> None:
    with MetricsLogger(folder, resume_step=None) as logger:
        for step, metrics in lines:
            logger.log(step, metrics)


def step_metrics(step: int) -> dict[str, float]:
    return {
        "reward/mean": random.random(),
        "reward/std": 0.1,
        "reward/sentiment": random.random(),
        f"reward/{HOSTILE}": random.random(),
        "kl/reference": 0.01 * step,
        "kl/coef": 0.05 + 0.001 * step,
        "policy/entropy": 3 - 0.01 * step,
        "policy/clip_fraction": 0.1,
        "policy/approx_kl": 0.01,
        "loss/value": 1000.0 / step**2,
        "value/explained_variance": 1 - 40 / step,
        "reward/gain_per_sqrt_kl": random.random(),
        "unheard/of": float(step),
        "completion/length": 20.0,
        "tokens_per_second": 400.0,
        "time/rollout": 1.0,
        "time/update": 0.1 * step,
        "time/step": 4.0,
        "lr": 1e-5 / step,
        "grad_norm": 1.0,
        "text/distinct_1": 0.5,
        "text/distinct_2": 0.75,
        "text/repetition": 0.01 * step,
        "policy/ratio_max": 1.5,
        "advantage/extreme": 4.0,
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A run that has everything, much of it hostile."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>run"
    held_out = {"eval/num_prompts": 16, "eval/reward_std": 0.5}
    lines = [(0, {"eval/reward": 0.125, "eval/length": 21.0, **held_out})]
    lines += [(step, step_metrics(step)) for step in range(1, 61)]
    lines += [
        (30, {"eval/reward": 0.25, f"eval/{HOSTILE}": 0.5, "eval/perplexity": 20.0}),
        (60, {"eval/reward": 0.75, "eval/perplexity": 21.0, **held_out}),
    ]
    log(folder, lines)
    alarm = {"step": 41, "metric": HOSTILE, "value": float("inf"), "reason": f"{HOSTILE} is above 3"}
    alarm |= {"action": "rollback", "good_step": 39, "outcome": f"rolled back {HOSTILE}"}
    write_alarms(folder, [alarm])
    (folder / "config.yaml").write_text(
        f"total_steps: 60\nmodel: {{name_or_path: {json.dumps(HOSTILE)}}}\nrollout: {{max_new_tokens: 24}}\n"
        f"eval: {{rewards: [{{name: {json.dumps(HOSTILE)}}}]}}\n"
    )
    rewards = {"sentiment": 0.5, HOSTILE: -0.5}
    before = [
        {"prompt": "one", "completion": HOSTILE, "reward": 0.1, "rewards": rewards},
        {"prompt": HOSTILE, "completion": "\x1b[2J \ud800 lone\x00", "reward": float("nan"), "rewards": rewards},
        {"prompt": "only before", "completion": " ", "reward": 0.3, "rewards": {}},
    ]
    after = [
        {"prompt": HOSTILE, "completion": "</td></table>", "reward": 0.9, "rewards": rewards},
        {"prompt": "one", "completion": "second of one", "reward": 0.0, "rewards": rewards},
        {"prompt": "only after", "completion": "late", "reward": 0.4, "rewards": {}},
    ]
    write_samples(folder, "before", before)
    write_samples(folder, "step-000030", before)
    write_samples(folder, "after", after)
    assert write_report(folder) == folder / "report.html"
    return folder


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(full):
    page = Page(full / "report.html")
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "object", "embed", "base", "a", "form"})
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on")]
    assert names.isdisjoint({"href", "action", "formaction", "background", "poster", "xlink:href"})
    assert len(page.images()) > 0  # every src and srcset is embedded data
    assert not re.search(r"url\(|@import|//", page.style)
    assert not [value for name, value in page.attributes if name not in ("src", "srcset") and "://" in value]


def test_what_others_wrote_is_text(full):
    page = Page(full / "report.html")
    assert "<script" not in page.source
    # Title and heading aside: model, config, reward part (in two rows twice) and metric, prompt, completion.
    assert page.text.count("<script>alert('x')</script>") >= 7
    assert "</td></table>" in page.text
    assert page.source.count("<table") == page.source.count("</table>") == 3
    assert "a <b>run" in page.text
    assert r"\x1b[2J" in page.text
    assert r"\x00" in page.text
    assert "\x1b" not in page.source


def test_the_headline(full):
    text = " ".join(Page(full / "report.html").text.split())
    assert "Reward, held-out prompts 0.125 → 0.750 +0.625 from step 0 to 60" in text
    assert "KL to the reference 0.6 nats/completion" in text
    assert "Steps 60 of 60" in text
    assert "Tokens/s 400 median" in text
    assert "stopped early" not in text


def test_alarms_say_what_was_wrong_and_what_was_done(full, tmp_path):
    page = Page(full / "report.html")
    assert f"{HOSTILE} is above 3" in page.text
    assert f"rolled back {HOSTILE}" in page.text
    assert not {"script", "b"} & set(page.tags)
    log(tmp_path, [(1, {"lr": 1.0})])
    assert "Alarms" not in Page(write_report(tmp_path)).text


def test_samples_stand_side_by_side_by_prompt(full):
    text = Page(full / "report.html").text
    samples = " ".join(text[text.index("Samples") : text.index("Details")].split())
    order = ["Before", "After", "one", "onerror", "reward 0.1", "second of one", "reward 0", "reward nan",
             "</td></table>", "only before", "(empty)", "–", "only after", "–", "late"]  # fmt: skip
    position = 0
    for word in order:
        position = samples.index(word, position) + len(word)


def test_versions_and_configuration(full):
    import torch
    import transformers

    text = " ".join(Page(full / "report.html").text.split())
    assert f"fastppo {fastppo.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert f"transformers {transformers.__version__}" in text
    assert re.search(r"python 3\.\d+\.\d+", text)
    assert "max_new_tokens: 24" in text


def test_plots_on_disk_are_those_of_the_page_in_its_order(full):
    expected = ["reward_kl", "eval", "rewards", "kl", "policy", "value", "completions", "optimizer", "speed", "other"]
    assert {path.name for path in (full / "plots").iterdir()} == {f"{name}.png" for name in expected}
    page = Page(full / "report.html")
    images = page.images()
    assert {image.shape[1] for image in images} == {images[0].shape[1]}
    for name, image in zip(expected, images, strict=True):
        np.testing.assert_array_equal(matplotlib.image.imread(full / "plots" / f"{name}.png"), image)
    # A dark screen inverts them, to the color of the card they are on.
    assert "img { filter: invert(0.9) hue-rotate(180deg); }" in page.style
    assert images[0][0, 0, :3].min() == 1.0
    assert "--card: #1a1a1a" in page.style


def test_every_group_says_what_is_healthy(full):
    page = Page(full / "report.html")
    assert page.source.count('<p class="faint healthy">') == len(list((full / "plots").iterdir()))
    assert all(f'"{name}": (' in TEMPLATE.read_text() for name in report._GROUPS)


def test_metrics_are_grouped_by_prefix_and_held_out_values_are_drawn_beside_their_twin(full):
    groups = {name: dict(panels) for name, panels in report._panels(report._load(full)).items()}
    assert list(groups["reward_kl"]) == ["Reward", "KL to the reference, nats per completion"]
    assert {name: set(panels) for name, panels in list(groups.items())[1:]} == {
        "eval": {"eval/perplexity"},
        "rewards": {"reward/sentiment", f"reward/{HOSTILE}"},  # not the gain per KL, nor the constant deviation
        "kl": {"kl/coef", "reward/gain_per_sqrt_kl", "Reward against KL"},
        "policy": {"policy/entropy, nats per token"},
        "value": {"loss/value", "value/explained_variance"},
        "completions": {"completion/length, tokens", "text/repetition"},
        "optimizer": {"lr"},
        "speed": {"Seconds by phase"},
        "other": {"unheard/of"},
    }
    for group, title, names in (
        ("reward_kl", "Reward", ["reward/mean", "eval/reward"]),
        ("completions", "completion/length, tokens", ["completion/length", "eval/length"]),
        ("rewards", f"reward/{HOSTILE}", [f"reward/{HOSTILE}", f"eval/{HOSTILE}"]),
    ):
        assert groups[group][title].keywords["names"] == names


def test_held_out_points_have_bars_of_one_standard_error(full):
    axes = Figure().add_subplot()
    report._draw_curves(axes, run=report._load(full), names=["reward/mean", "eval/reward"])
    [container] = axes.containers
    bars = [np.array(segment)[:, 1].tolist() for segment in container.lines[2][0].get_segments() if len(segment)]
    assert bars == [pytest.approx([mean - 0.5 / 4, mean + 0.5 / 4]) for mean in (0.125, 0.75)]
    assert container.lines[0].get_xdata().tolist() == [0, 30, 60]  # the point between has no deviation, so no bar
    assert container.lines[0].get_linestyle() == "None"


def test_a_logarithmic_axis_has_plain_labels(full):
    figure = Figure()
    axes = figure.add_subplot()
    report._draw_curves(axes, run=report._load(full), names=["loss/value"])
    figure.draw_without_rendering()
    assert axes.get_yscale() == "log"
    assert {"1", "10", "100"} <= {label.get_text() for label in axes.get_yticklabels()}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10])
def test_rows_of_panels_are_as_wide_as_the_image_and_none_stands_alone(count, monkeypatch):
    drawn = []
    panels = [(str(i), lambda axes: drawn.append(axes.get_subplotspec())) for i in range(count)]
    report._png(panels, 1.0)
    rows = defaultdict(list)
    for spec in drawn:
        rows[spec.rowspan.start].append((spec.colspan.start, spec.colspan.stop))
    for row in rows.values():
        assert [row[0][0], *(stop for _, stop in row)] == [*(start for start, _ in row), 6]
        assert len(row) > 1 or count == 1


def test_a_run_of_one_step(tmp_path):
    log(tmp_path, [(0, {"eval/reward": 0.5}), (1, {"reward/mean": 0.25})])
    (tmp_path / "config.yaml").write_text("total_steps: 8\n")
    text = " ".join(Page(write_report(tmp_path)).text.split())
    assert "Reward, held-out prompts 0.500 step 0" in text
    assert "Steps 1 of 8" in text
    assert "Written after step 1 of 8: the run was stopped early or is still going on." in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["reward_kl.png"]
    axes = Figure().add_subplot()
    report._draw_curves(axes, run=report._load(tmp_path), names=["reward/mean"])
    assert all(tick == round(tick) for tick in axes.get_xticks())  # steps are whole, also around a single one


def test_only_what_was_measured_stands_in_the_legend_of_reward_against_kl(tmp_path):
    log(tmp_path, [(step, {"reward/mean": 1.0, "kl/reference": 0.1 * step}) for step in (1, 2)])
    axes = Figure().add_subplot()
    report._draw_reward_against_kl(axes, run=report._load(tmp_path))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training prompts"]


def test_one_value_near_zero_does_not_make_an_axis_logarithmic(tmp_path):
    log(tmp_path, [(step, {"policy/clip_fraction": 1e-6 if step == 7 else 0.1 + 0.001 * step}) for step in range(30)])
    axes = Figure().add_subplot()
    report._draw_curves(axes, run=report._load(tmp_path), names=["policy/clip_fraction"])
    assert axes.get_yscale() == "linear"


def test_nonfinite_values_are_left_out_and_named(tmp_path):
    nan, inf = float("nan"), float("inf")
    log(tmp_path, [(1, {"policy/entropy": 2.0, "loss/value": nan}), (2, {"policy/entropy": inf, "loss/value": nan})])
    page = Page(write_report(tmp_path))
    assert "left out of the plots: loss/value (2), policy/entropy (1)." in page.text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"policy"}


@pytest.mark.parametrize(
    "config", ["- a list\n", "a: [1, 2\n", "", "model: text\ntotal_steps: many\n", "model: {name_or_path: 5}\n", "\xff"]
)
def test_a_config_that_is_not_one_is_shown_as_text(tmp_path, config):
    (tmp_path / "config.yaml").write_bytes(config.encode("latin-1"))
    page = Page(write_report(tmp_path))
    assert config.strip().replace("\xff", "\ufffd") in page.text
    assert "img" not in page.tags


def test_samples_alone_and_the_latest_stand_in_for_the_last(tmp_path):
    row = {"prompt": "p", "completion": "first", "reward": 0.1, "rewards": {}}
    write_samples(tmp_path, "before", [row])
    for step in (9, 100, 20):
        write_samples(tmp_path, f"step-{step:06}", [row | {"completion": f"at {step}"}])
    text = Page(write_report(tmp_path)).text
    assert "Step 100" in text
    assert "at 100" in text
    assert "at 9" not in text
    assert "After" not in text


@pytest.mark.parametrize(
    ("steps", "total", "shown"), [(30, 40, "Step 20"), (15, 40, "Step 10"), (5, 40, "After"), (40, 40, "After")]
)
def test_samples_of_steps_that_were_undone_or_of_an_earlier_end_are_not_the_latest(tmp_path, steps, total, shown):
    """A run of 20 steps that was prolonged to 40, or one that was rolled back."""
    log(tmp_path, [(steps, {"lr": 1.0})])
    (tmp_path / "config.yaml").write_text(f"total_steps: {total}\n")
    row = {"prompt": "p", "completion": "first", "reward": 0.1, "rewards": {}}
    for name in ("before", "step-000010", "step-000020", "after"):
        write_samples(tmp_path, name, [row])
    text = Page(write_report(tmp_path)).text
    assert shown in text
    assert not [name for name in ("Step 10", "Step 20", "After") if name != shown and name in text]


def test_training_reward_stands_in_where_nothing_is_held_out(tmp_path):
    log(tmp_path, [(1, {"reward/mean": 0.25}), (2, {"reward/mean": 0.125})])
    text = " ".join(Page(write_report(tmp_path)).text.split())
    assert "Reward, training prompts 0.250 → 0.125 -0.125 from step 1 to 2" in text


@pytest.mark.filterwarnings("error")
def test_reward_names_that_mean_something_to_a_plotting_library(tmp_path):
    names = [r"$\frac$", "$x_{", "_hidden", "%d {0}", "a" * 200, "\n", "長さ"]
    log(tmp_path, [(step, {f"reward/{name}": 0.5 * step for name in names}) for step in (1, 2)])
    page = Page(write_report(tmp_path))
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"rewards"}
    assert "長さ" in page.text


def test_multipliers_and_critics_of_single_rewards_have_curves(tmp_path):
    lines = [(n, {f"multiplier/{HOSTILE}": 0.1 * n, "value/explained_variance/a": 0.5 * n}) for n in (1, 2)]
    log(tmp_path, lines)
    groups = report._panels(report._load(tmp_path))
    assert [[title for title, _ in groups[name]] for name in ("rewards", "value")] == [
        [f"multiplier/{HOSTILE}"],
        ["value/explained_variance/a"],
    ]
    write_report(tmp_path)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"rewards", "value"}


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="not the folder of a run"):
            write_report(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    before = write_report(tmp_path).read_bytes()
    (tmp_path / "config.yaml").write_text("seed: 2\n")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_callers_matplotlib_stays_as_it_is(tmp_path):
    log(tmp_path, [(1, {"tokens_per_second": 1.0})])
    with matplotlib.rc_context({"figure.dpi": 77, "axes.grid": False}):
        settings = dict(matplotlib.rcParams)
        write_report(tmp_path)
        assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("n", [40, 41, 83, 200, 1001])
def test_the_smoothed_curve_is_the_moving_mean(n):
    values = np.array([random.gauss(1e3) for _ in range(n)])
    half = max(2, n // 40)
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(n)]
    np.testing.assert_allclose(report._smooth(values), expected, rtol=1e-12)


def test_the_template_is_where_the_installed_package_looks_for_it():
    assert TEMPLATE.is_file()
