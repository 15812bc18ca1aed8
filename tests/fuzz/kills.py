"""A tiny `fastppo train`, killed at random instants and resumed until it ends, against the same run never killed.

Everything that a run leaves must be the same to the bit: the final weights, metrics (but for times), samples, alarms
and what rollbacks kept aside. The instants are moments of time, or, where a number must give the same one again, calls
into the file system: the n-th of the run, counted by an audit hook.

The runs are forks of this process, which has imported everything and started no thread, and their reports have empty
plots, which take nine tenths of so small a run: one takes a second, not ten.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import yaml

from fastppo.cli import main
from fastppo.training import report, trainer  # noqa: F401  (so that no fork need)
from tests.tiny import make_tiny_model, metrics_of, same, weights_of

torch.set_num_threads(1)
report._png = lambda *_: b""

REWARDS = """
def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
def brevity(completions, **_):
    return [-float(len(text)) for text in completions]
def sometimes(completions, **_):
    return [float("nan") if sum(map(ord, text)) % 9 == 0 else 1.0 for text in completions]
"""
ALWAYS = {"metric": "completion/length", "above": -1.0}
VARIANTS = {
    "ppo": {"eval": {"every": 2}, "watch": {"rules": [ALWAYS]}},
    "one checkpoint": {"checkpoint": {"every": 3, "keep_last": 1}, "algorithm": "reinforce"},
    "no checkpoint": {"checkpoint": {"every": 0}, "eval": {"every": 1}},
    "lower rate": {"eval": {"every": 1}, "watch": {"rules": [ALWAYS | {"action": "lower_lr", "patience": 2}]}},
    "rollback": {"watch": {"max_rollbacks": 1, "rules": [ALWAYS | {"action": "rollback", "patience": 3}]}},
    "rollback by evaluation": {
        "eval": {"every": 1}, "watch": {"max_rollbacks": 1, "rules": [
            {"metric": "eval/length", "above": -1.0, "action": "rollback", "patience": 3}]},
    },
    "skip": {
        "on_nonfinite": "skip", "eval": {"every": 1}, "optim": {"learning_rate": 1e-3}, "watch": {"rules": [
            {"metric": "policy/skipped_steps", "above": 0.0, "action": "lower_lr"},
            {"metric": "eval/skipped", "above": 0.0, "action": "lower_lr"}]},
    },
    "tracker": {"report_to": "tensorboard", "eval": {"every": 1}},
    "stop": {"watch": {"rules": [ALWAYS | {"action": "stop", "patience": 3}]}},
    "trpo": {"algorithm": "trpo"},
    "cpi": {"algorithm": "cpi", "checkpoint": {"every": 1}},
    "refresh": {"ppo": {"reference_refresh_steps": 2}, "model": {"value_model": "separate"}},
}  # fmt: skip
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def run(case: int) -> str | None:
    draw = random.Random(case)
    variant = draw.choice(list(VARIANTS))
    folder, events, seconds, status = whole_run(variant)
    out, history, log, ended = Path(f"killed-{case}"), [], Path(f"log-{case}").absolute(), None
    shutil.rmtree(out, ignore_errors=True)
    config = write_config(variant, out)
    try:
        for number in range(draw.choice([1, 1, 2, 4])):
            name = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice"])
            at = {"event": draw.randrange(events)} if draw.random() < 0.5 else {"after": draw.random() * 1.1 * seconds}
            history.append(f"{name} {'at call' if 'event' in at else 'after'} {next(iter(at.values())):.6g}")
            ended, _ = train(config, ["--resume"] if number else [], log, name, **at)
            number = getattr(signal, name.split()[0])
            text = log.read_text()
            # Python itself reports a KeyboardInterrupt that falls into a weak reference's callback, and drops it.
            if ended not in (0, status, -number, 128 + number, 130) or (
                "Traceback" in text and "Exception ignored" not in text
            ):
                return finding(variant, history, f"ends with {ended}: {text[-300:]}")
            if "run stopped" in text and ended != status:
                return None  # killed on its way out: whoever resumes a run that an alarm stopped goes on with it
            if ended == status:
                break
        if ended != status:
            ended, _ = train(config, ["--resume"], log)
        if ended != status:
            return finding(variant, history, f"resumed, it ends with {ended}: {log.read_text()[-300:]}")
        different = compare(folder, out)
        return finding(variant, history, different) if different else None
    finally:
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)


def finding(variant: str, history: list[str], what: str) -> str:
    return f"{variant}, {', '.join(history)}: {' '.join(what.split())}"


@functools.cache
def whole_run(variant: str) -> tuple[Path, int, float, int]:
    """The run that nobody killed: its folder, calls into the file system, seconds and status."""
    warm()
    out = Path(f"whole-{variant.replace(' ', '-')}").absolute()
    status, (events, seconds) = train(write_config(variant, out), [], out.with_suffix(".log"))
    if status != ("stop" in json.dumps(VARIANTS[variant]) or "rollback" in variant):  # which stops in the end
        raise RuntimeError(f"{variant}: the run ends with {status}: {out.with_suffix('.log').read_text()[-300:]}")
    return out, events, seconds, status


@functools.cache
def world() -> Path:
    folder = Path("world").absolute()
    make_tiny_model(folder / "model", hidden_size=16, layers=1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Number {n} is"}) + "\n" for n in range(24)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@functools.cache
def warm() -> None:
    """One run, whose imports every later one has from the start: else they are most of its calls and seconds."""
    train(write_config("ppo", Path("warm").absolute()), [], Path("warm.log").absolute())


def write_config(variant: str, out: Path) -> Path:
    files, rewards = world(), world() / "rewards.py"
    tree = {
        "output_dir": str(out), "total_steps": 5, "report_to": "none",
        "model": {"name_or_path": str(files / "model")},
        "data": {"train": str(files / "prompts.jsonl"), "eval_size": 4},
        "rewards": [{"name": "vowels", "function": f"{rewards}:vowels", "normalize": True},
                    {"name": "brevity", "function": f"{rewards}:brevity", "threshold": -9.0, "weight": 0.1}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 6},
        "optim": {"learning_rate": 1e-2, "lr_scheduler_type": "linear"}, "checkpoint": {"every": 2},
    }  # fmt: skip
    if variant == "skip":
        tree["rewards"].append({"name": "sometimes", "function": f"{rewards}:sometimes"})
    for key, value in VARIANTS[variant].items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def train(
    config: Path, words: list[str], log: Path, name: str = "", *, event: int = -1, after: float = -1.0
) -> tuple[int, tuple[int, float]]:
    """Run `fastppo train` in a fork. Returns its status, negative for a signal; its calls and its seconds."""
    log.write_text("")  # the child may be killed before it opens it
    read, write = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        run_child(["train", str(config), "--plain", *words], log, write, name, event)
    os.close(write)
    if after >= 0:
        time.sleep(after)
        for _ in range(1 + name.endswith("twice")):
            os.kill(child, getattr(signal, name.split()[0]))
    with os.fdopen(read, "rb") as pipe:  # ends when the child does
        calls, *modules = pipe.read().decode().split() or ["0"]
    _, status = os.waitpid(child, 0)
    for module in modules:  # what the run imported on its way, the next fork has from the start
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    return os.waitstatus_to_exitcode(status), (int(calls), time.monotonic() - began)


def run_child(argv: list[str], log: Path, pipe: int, name: str, event: int) -> None:
    """Never returns. The audit hook counts calls, and kills at the one numbered `event`."""
    status, count, modules = 70, 0, set(sys.modules)

    def hook(what: str, _arguments: object) -> None:
        nonlocal count
        if what in EVENTS:
            count += 1
            if count == event + 1 and name:
                for _ in range(1 + name.endswith("twice")):
                    os.kill(os.getpid(), getattr(signal, name.split()[0]))

    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.addaudithook(hook)
        status = main(argv)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        with os.fdopen(pipe, "w") as file:
            print(count, *sorted(set(sys.modules) - modules), file=file, flush=True)
        os._exit(status)


def compare(whole: Path, killed: Path) -> str | None:
    """What differs between the two folders, or None."""
    if (whole / "final").exists() != (killed / "final").exists():
        return "only one has a final policy"
    if (whole / "final").exists():
        if not same(weights_of(whole), weights_of(killed)):
            return "the final weights differ"
        files = [sorted(folder.glob("final-value/*.safetensors")) for folder in (whole, killed)]
        if [(path.name, path.read_bytes()) for path in files[0]] != [
            (path.name, path.read_bytes()) for path in files[1]
        ]:
            return "the final value models differ"
    if metrics_of(whole) != metrics_of(killed):
        steps = [[row["step"] for row in metrics_of(folder)] for folder in (whole, killed)]
        return f"the metrics differ; steps {steps[0]} and {steps[1]}"
    for pattern in ("samples/*.jsonl", "alarms.jsonl", "abandoned-*.jsonl"):
        files = [sorted(path.relative_to(folder) for path in folder.glob(pattern)) for folder in (whole, killed)]
        if files[0] != files[1]:
            return f"{pattern}: {[str(path) for path in files[0]]} and {[str(path) for path in files[1]]}"
        if pattern.startswith("abandoned"):
            continue  # lines with times in them
        for path in files[0]:
            if (whole / path).read_bytes() != (killed / path).read_bytes():
                return f"{path} differs"
    # A signal may add a checkpoint, and plots of steps that a rollback undoes later; a start from the beginning keeps
    # what there was in earlier-1.
    may, rest = ("checkpoints", "plots/", "earlier-", "tensorboard/"), []
    for folder in (whole, killed):
        rest.append({str(path.relative_to(folder)) for path in folder.rglob("*")})
    extra = sorted(path for path in rest[1] - rest[0] if "/." in f"/{path}" or not path.startswith(may))
    return f"left behind: {', '.join(extra[:5])}" if extra else None
