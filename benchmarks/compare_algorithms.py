"""Compare the algorithms on one task: held-out reward against KL to the reference, and against wall-clock time.

    python benchmarks/compare_algorithms.py --minutes 4 --output benchmarks/results/algorithms     # .json and .png
    python benchmarks/compare_algorithms.py --tiny --steps 6                                     # seconds, a dry run

Every algorithm trains on the task of examples/sentiment.yaml, from the same policy, with the same prompts in the same
order and the same number of completions a step, for `--minutes` of training or `--steps` steps; CONTENDERS lists what
differs. Only the time of steps counts, not that of loading, evaluations and checkpoints. Started again with the same
`--work`, the script resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import signal
import tempfile
from pathlib import Path

import torch
from arguments import amount, count, output, run_script
from cpu import describe_machine
from matplotlib.figure import Figure

import fastppo
from fastppo.training.config import Config, load_config
from fastppo.training.metrics import read_metrics
from fastppo.training.progress import ProgressDisplay
from fastppo.training.trainer import Trainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "sentiment.yaml"

# The example's own `ppo` section is dropped. All algorithms have the same KL penalty with a fixed coefficient, so that
# no KL controller affects the comparison.
COMMON = {"kl_coef": 0.05}
# In all cases 16 of the 32 completions go through the model at a time.
STEPS = {"num_mini_batches": 2}
NATURAL = {"gradient_accumulation_steps": 2, "max_kl": 0.02, "cg_iterations": 4, "fisher_fraction": 0.25}
CRITIC = {"num_value_epochs": 2, "lam": 1.0}
FIRST_ORDER = {"optim.learning_rate": 4e-5, "optim.value_learning_rate": 1e-3}
VALUES_ONLY = {"optim.value_learning_rate": 1e-3}
CONTENDERS: dict[str, tuple[str, dict, dict]] = {
    # label: (algorithm, its section, other keys)
    "REINFORCE (RLOO)": ("reinforce", {"baseline": "rloo"} | STEPS, FIRST_ORDER),
    "GRPO": ("ppo", {"adv_estimator": "grpo", "num_ppo_epochs": 1} | STEPS, FIRST_ORDER),
    "PPO": ("ppo", {"num_ppo_epochs": 1, "lam": 1.0} | STEPS, FIRST_ORDER),
    "TRPO": ("trpo", NATURAL | CRITIC, VALUES_ONLY),
    "NPG": ("npg", NATURAL | CRITIC, VALUES_ONLY),
}
COLORS = ("#2a6fb5", "#c7621a", "#2f8a5b", "#7b57b3", "#a8892a")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=amount, help="minutes of training of each algorithm")
    parser.add_argument("--steps", type=count, default=1000, help="maximum number of steps of each algorithm")
    parser.add_argument("--eval-every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="comma-separated labels; default: all")
    parser.add_argument("--tiny", action="store_true", help="a dry run with a tiny random model and task")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--output", type=output, help="write OUTPUT.json and OUTPUT.png")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.steps == 1000:
        parser.error("give --minutes, --steps or both")
    labels = arguments.only.split(",") if arguments.only else list(CONTENDERS)
    if unknown := set(labels) - set(CONTENDERS):
        parser.error(f"--only: {unknown.pop()!r} is none of {', '.join(CONTENDERS)}")

    machine = describe_machine()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        results = {}
        for label in labels:
            print(f"== {label}", flush=True)
            results[label] = run(label, work, arguments)
            gc.collect()  # frees the previous models
    machine["load_average_after"] = os.getloadavg()[0]

    print_table(results)
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("minutes", "steps", "eval_every", "seed", "tiny")}
        settings["task"] = "examples/make_tiny_run.py" if arguments.tiny else "examples/sentiment.yaml"
        everything = {
            "machine": machine | {"python": platform.python_version(), "fastppo": fastppo.__version__},
            "settings": settings,
            "results": results,
        }
        arguments.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        draw(results, arguments.output.with_suffix(".png"))


def run(label: str, work: Path, arguments: argparse.Namespace) -> dict:
    """Train one contender, or resume it, and return its path."""
    folder = work / "".join(letter if letter.isalnum() else "-" for letter in label.lower())
    config = make_config(label, folder, arguments)
    trainer = Trainer(config, resume=True)
    trainer.progress = StopWatch(
        config.total_steps, trainer.step, seconds_done(folder, trainer.step), arguments.minutes
    )
    if not trainer.progress.over():
        trainer.train()
    # A run that the clock stopped has no evaluation at its end.
    last, _ = trainer.scorer.evaluate(trainer.data.eval[: config.eval.num_prompts])
    return path_of(folder, last) | {"settings": vars(config.algorithm_config), "steps": trainer.step}


def make_config(label: str, folder: Path, arguments: argparse.Namespace) -> Config:
    algorithm, section, others = CONTENDERS[label]
    base = EXAMPLE
    if arguments.tiny:
        base = tiny_task(folder.parent / "tiny")
        others = dict.fromkeys(others, 3e-3)
    keys = {
        "ppo": {},
        "algorithm": algorithm,
        algorithm: COMMON | section,
        "output_dir": str(folder),
        "total_steps": arguments.steps,
        "eval.every": arguments.eval_every,
        "checkpoint.every": 4,
        "checkpoint.keep_last": 1,
        "report_to": "none",
        "seed": arguments.seed,
        **others,
    }
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
    return load_config(base, [f"--{key}={word}" for key, word in words.items()])


def tiny_task(folder: Path) -> Path:
    """The configuration of a tiny task; all contenders share its model."""
    import sys

    sys.path.insert(0, str(EXAMPLE.parent))
    from make_tiny_run import main as make

    if not (folder / "config.yaml").exists():
        torch.manual_seed(0)
        make(folder)
    return folder / "config.yaml"


class StopWatch(ProgressDisplay):
    """Prints one line a step; stops the trainer, as Ctrl-C does, once the steps have taken `minutes`."""

    def __init__(self, total_steps: int, step: int, seconds: float, minutes: float | None) -> None:
        super().__init__(total_steps, start_step=step, enabled=False)
        self._seconds, self._limit = seconds, None if minutes is None else 60 * minutes

    def update(self, step: int, metrics: dict[str, float]) -> None:
        super().update(step, metrics)
        self._seconds += metrics["time/step"]
        if self.over():
            signal.raise_signal(signal.SIGINT)

    def over(self) -> bool:
        """Whether the time is up."""
        return self._limit is not None and self._seconds >= self._limit


def seconds_done(folder: Path, step: int) -> float:
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return sum(row.get("time/step", 0.0) for row in rows if row["step"] <= step)


def path_of(folder: Path, last: dict[str, float]) -> dict[str, list]:
    """Step, seconds of training, KL and reward: of steps on training prompts, and of evaluations on held-out ones."""
    training, held_out, seconds = [], [], 0.0
    for row in read_metrics(folder / "metrics.jsonl"):
        if "time/step" in row:
            seconds += row["time/step"]
            training.append([row["step"], seconds, row["kl/reference"], row["reward/mean"]])
        if "eval/reward" in row:
            held_out.append([row["step"], seconds, row["eval/kl"], row["eval/reward"]])
    if held_out[-1][0] < training[-1][0]:
        held_out.append([*training[-1][:2], last["eval/kl"], last["eval/reward"]])
    return {"columns": ["step", "seconds", "kl", "reward"], "training": training, "held_out": held_out}


def print_table(results: dict) -> None:
    print(f"{'':26}{'steps':>6}{'s/step':>8}{'reward before':>15}{'after':>8}{'KL':>8}")
    for label, result in results.items():
        first, last = result["held_out"][0], result["held_out"][-1]
        pace = result["training"][-1][1] / result["steps"]
        print(f"{label:26}{result['steps']:6}{pace:8.1f}{first[3]:15.3f}{last[3]:8.3f}{last[2]:8.2f}")


def draw(results: dict, path: Path) -> None:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    against_kl, against_time = figure.subplots(1, 2, sharey=True)
    for (label, result), color in zip(results.items(), COLORS, strict=False):
        _, seconds, kl, reward = zip(*result["held_out"], strict=True)
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.6, "label": label}
        against_kl.plot(kl, reward, **style)
        against_time.plot([value / 60 for value in seconds], reward, **style)
    against_kl.set_xlabel("KL to the reference, nats a completion")
    against_time.set_xlabel("minutes of training")
    against_kl.set_ylabel("reward on held-out prompts")
    against_kl.legend(frameon=False)
    for axes in (against_kl, against_time):
        axes.grid(color="#e6e8ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_script(main)
