"""A tiny `fastppo train`, killed at random instants and resumed until it ends, against the same run never killed.

Everything that a run leaves must be the same to the bit: the final weights, metrics (but for times), samples, alarms
and what rollbacks kept aside. The instants are moments of time, or, where a number must give the same one again, calls
into the file system: the n-th of the run, counted by an audit hook.

The runs are forks of this process, which has imported everything and started no thread, and their reports have empty
plots, which take nine tenths of so small a run: one takes a second, not ten.

With several processes torchrun is such a fork too, and starts ranks that it forked before its first thread: a fork of
several threads may hang at a lock that another of them held. The signal comes to one rank, to torchrun, or kills all of
them. The last resume may be on another number of ranks, and then ends close by.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file

from fastppo.cli import main
from fastppo.training import report, trainer  # noqa: F401  (so that no fork need)
from fastppo.training.checkpoint import load_checkpoint
from tests.tiny import make_tiny_model, metrics_of, same

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
    "nf4": {  # of some adapters with this rank the optimizer's moments are in 8 bits
        "model": {"quantization": "nf4", "lora": {"r": 128}, "value_model": "adapter"}, "eval": {"every": 2},
        "optim": {"name": "paged_adamw_8bit", "learning_rate": 1e-3}, "checkpoint": {"every": 1},
    },
}  # fmt: skip
SEVERAL = {
    "fsdp2": {
        "checkpoint": {"every": 1, "keep_last": 9}, "model": {"value_model": "separate"}, "eval": {"every": 2},
        "optim": {"learning_rate": 2e-4},
    },
    "replicate": {"model": {"lora": {"r": 4}}, "eval": {"every": 1}, "optim": {"learning_rate": 2e-4}},
}  # fmt: skip
LOST = "fastppo: another process of this run has ended"
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


class Strike(NamedTuple):
    """A signal to a run: to the process of a rank, to torchrun, or to all of them."""

    name: str
    target: int | str
    at: float | tuple[int, int]  # seconds after the start; or a rank, and the number of a call of its own

    def hit(self, launcher: int, processes: int, pipe: int) -> None:
        ranks = [launcher]
        if processes > 1:
            ranks = [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
        if self.target == "all":
            ranks.sort(key=os.getpid().__eq__)  # the one that runs this is the last to go
            targets = [launcher, *ranks]
        else:
            targets = [launcher if self.target == "torchrun" or self.target >= len(ranks) else ranks[self.target]]
        os.write(pipe, f"struck {time.monotonic()}\n".encode())
        for pid in targets * (1 + self.name.endswith("twice")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.number)

    @property
    def number(self) -> int:
        return getattr(signal, self.name.split()[0])

    def __str__(self) -> str:
        at = f"at call {self.at[1]} of rank {self.at[0]}" if isinstance(self.at, tuple) else f"after {self.at:.6g} s"
        return f"{self.name} to {self.target} {at}"


class End(NamedTuple):
    """How a run ended."""

    status: int  # negative for a signal
    calls: dict[int, int]  # into the file system, by rank
    seconds: float
    after_strike: float  # seconds that some process was still there
    orphaned: float  # seconds that a rank was there after torchrun


def run(case: int, processes: int = 1) -> str | None:
    draw = random.Random(case)
    variant = draw.choice(list(VARIANTS if processes == 1 else SEVERAL))
    folder, whole = whole_run(variant, processes)
    out, history, log, ended = Path(f"killed-{case}"), [], Path(f"log-{case}").absolute(), None
    last = processes
    shutil.rmtree(out, ignore_errors=True)
    config = write_config(variant, out)
    try:
        for number in range(draw.choice([1, 1, 2, 4])):
            names = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", *["SIGINT twice"][: processes == 1]]
            name, target, rank = draw.choice(names), 0, 0
            if processes > 1:
                target = draw.choice([draw.randrange(processes), "all" if name == "SIGKILL" else "torchrun"])
                rank = draw.randrange(processes)
            in_call = draw.random() < 0.5
            at = (rank, draw.randrange(whole.calls[rank])) if in_call else draw.random() * 1.1 * whole.seconds
            history.append(str(strike := Strike(name, target, at)))
            end = train(config, ["--resume"] if number else [], log, processes, strike)
            ended, text = end.status, log.read_text()
            if wrong := wrong_end(end, text, strike, processes, whole.status):
                return finding(variant, history, wrong)
            if "run stopped" in text and ended != whole.status:
                return None  # killed on its way out: whoever resumes a run that an alarm stopped goes on with it
            if processes > 1 and (different := compare_checkpoints(folder, out)):
                return finding(variant, history, different)
            if ended == whole.status:
                break
        if ended != whole.status:
            last = draw.choice([processes, processes, 1, 4]) if processes > 1 else 1
            history.append(f"resumed on {last}")
            ended = train(config, ["--resume"], log, last).status
        if ended != whole.status:
            return finding(variant, history, f"resumed, it ends with {ended}: {log.read_text()[-300:]}")
        different = compare(folder, out, exact=last == processes)
        return finding(variant, history, different) if different else None
    finally:
        shutil.rmtree(out, ignore_errors=True)
        for path in (log, beside(log)):
            path.unlink(missing_ok=True)


def wrong_end(end: End, text: str, strike: Strike, processes: int, status: int) -> str | None:
    # Python itself reports a KeyboardInterrupt that falls into a weak reference's callback, and drops it.
    trace = "Traceback" in text and "Exception ignored" not in text
    may_be = (0, status, -strike.number, 128 + strike.number, 130) if processes == 1 else (0, 1, -strike.number)
    told = [line for line in text.splitlines() if line.startswith("fastppo:")]
    if processes > 1 and (len(told) > 1 or not all(line.startswith(LOST) for line in told)):
        return f"tells {len(told)} errors: {told}"
    if end.status not in may_be or trace:
        return f"ends with {end.status}: {text[-300:]}"
    if processes > 1 and (end.after_strike > 60 or end.orphaned > 5):
        return f"ends {end.after_strike:.0f} s after the signal, ranks {end.orphaned:.0f} s after torchrun"
    return None


def finding(variant: str, history: list[str], what: str) -> str:
    return f"{variant}, {', '.join(history)}: {' '.join(what.split())}"


@functools.cache
def whole_run(variant: str, processes: int) -> tuple[Path, End]:
    """The folder of the run that nobody killed, and how it ended."""
    warm(processes)
    out = Path(f"whole-{variant.replace(' ', '-')}").absolute()
    end = train(write_config(variant, out), [], log := out.with_suffix(".log"), processes)
    if end.status != ("stop" in json.dumps(VARIANTS.get(variant)) or "rollback" in variant):  # which stops in the end
        raise RuntimeError(f"{variant}: the run ends with {end.status}: {log.read_text()[-300:]}")
    return out, end


@functools.cache
def world() -> Path:
    folder = Path("world").absolute()
    make_tiny_model(folder / "model", hidden_size=16, layers=1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Number {n} is"}) + "\n" for n in range(24)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@functools.cache
def warm(processes: int) -> None:
    """One run, whose imports every later one has from the start: else they are most of its calls and seconds."""
    train(write_config("ppo", Path("warm").absolute()), [], Path("warm.log").absolute(), processes)


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
    for key, value in (VARIANTS | SEVERAL)[variant].items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, words: list[str], log: Path, processes: int = 1, strike: Strike | None = None) -> End:
    """Run `fastppo train` in a fork, under torchrun if in several processes. The log is that of the ranks."""
    log.write_text("")  # the child may be killed before it opens it
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)  # else who writes to it would wait for this process
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        argv, start = ["train", str(config), "--plain", *words], run_child if processes == 1 else launch
        start(argv, log, write, strike, processes)
    if strike and not isinstance(strike.at, tuple):
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], strike.at)[0]:
            strike.hit(child, processes, write)
        os.close(ended)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:  # ends when the last process does
        lines = [line.split() for line in pipe.read().decode().splitlines()]
    now = time.monotonic()
    _, status = os.waitpid(child, 0)
    for module in (words[1] for words in lines if words[0] == "module"):  # the next fork has them from the start
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    times = {words[0]: now - float(words[1]) for words in lines if words[0] in ("struck", "launcher")}
    calls = {int(words[1]): int(words[2]) for words in lines if words[0] == "calls"}
    code = os.waitstatus_to_exitcode(status)
    return End(code, calls, now - began, times.get("struck", 0.0), times.get("launcher", 0.0))


def launch(argv: list[str], log: Path, pipe: int, strike: Strike | None, processes: int) -> None:
    """torchrun, whose children the ranks are; never returns."""
    status, modules, launcher = 1, set(sys.modules), os.getpid()
    ranks = [fork_rank(argv, log, pipe, strike, processes, launcher) for _ in range(processes)]
    from torch.distributed import run as torchrun  # which not every PyTorch has
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    class Rank(subprocess.Popen):
        def __init__(self, environment: dict[str, str]) -> None:
            self.environment = environment
            super().__init__("rank")

        def _execute_child(self, *_arguments: Any) -> None:
            (self.pid, start), self._child_created = ranks.pop(0), True
            with contextlib.suppress(BrokenPipeError), os.fdopen(start, "w") as file:  # it may have been killed
                json.dump(self.environment, file)

    try:
        write_to(beside(log), os.O_TRUNC)
        SubprocessHandler._popen = lambda self, arguments, environment: Rank(environment)
        torchrun.main(["--nproc-per-node", str(processes), "--log-dir", f"{log.parent}/torchrun", "-m", "fastppo"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        report_modules(pipe, modules)
        os.write(pipe, f"launcher {time.monotonic()}\n".encode())
        os._exit(status)


def fork_rank(
    argv: list[str], log: Path, pipe: int, strike: Strike | None, processes: int, launcher: int
) -> tuple[int, int]:
    """A rank that waits for its environment, and the file to write that to. It ends if that is closed empty."""
    read, write = os.pipe()
    signals = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in the rank until it starts
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(read, 0)
        os.closerange(3, pipe), os.closerange(pipe + 1, 1024)
        environment = b"".join(iter(lambda: os.read(0, 1 << 16), b""))
        if not environment:
            os._exit(0)
        os.environ |= json.loads(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        run_child(argv, log, pipe, strike, processes, launcher)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.close(read)
    return pid, write


def run_child(
    argv: list[str], log: Path, pipe: int, strike: Strike | None, processes: int, launcher: int | None = None
) -> None:
    """Never returns. The audit hook counts calls, and strikes at the one that `strike` names."""
    status, count, modules = 70, 0, set(sys.modules)
    rank, launcher = int(os.environ.get("RANK", 0)), launcher or os.getpid()

    def hook(what: str, _arguments: object) -> None:
        nonlocal count
        if what in EVENTS:
            count += 1
            if strike and strike.at == (rank, count - 1):
                strike.hit(launcher, processes, pipe)

    try:
        write_to(log, os.O_APPEND)
        sys.addaudithook(hook)
        status = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.write(pipe, f"calls {rank} {count}\n".encode())
        report_modules(pipe, modules)
        os._exit(status)


def beside(log: Path) -> Path:
    """The log of torchrun itself."""
    return log.with_name(f"{log.name}.torchrun")


def write_to(log: Path, flag: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | flag)
    os.dup2(file, 1), os.dup2(file, 2)


def report_modules(pipe: int, before: set[str]) -> None:
    for module in sorted(set(sys.modules) - before):
        os.write(pipe, f"module {module}\n".encode())


def compare_checkpoints(whole: Path, killed: Path) -> str | None:
    """What differs between a run's checkpoints, each of which must be whole, and those of the run never killed."""
    for path in sorted(killed.glob("checkpoints/step-*")):
        reference = whole / "checkpoints" / path.name.partition(".")[0]
        if reference.exists():
            here, there = load_checkpoint(path), load_checkpoint(reference)
            if here.files != there.files:
                return f"{path.name}: has the files {sorted(here.files)}, not {sorted(there.files)}"
            for group in {re.sub(r"(-\d+)?\.safetensors", "", name) for name in here.files if "safe" in name}:
                if not same(here.tensors(group), there.tensors(group)):
                    return f"{path.name}: {group} differs"
    return None


def compare(whole: Path, killed: Path, *, exact: bool) -> str | None:
    """What differs between the two folders, or None. Unless `exact`, weights may by 1e-4, and other numbers do."""
    if (whole / "final").exists() != (killed / "final").exists():
        return "only one has a final policy"
    rows = [metrics_of(folder) for folder in (whole, killed)]
    steps = [[row["step"] for row in each] for each in rows]
    if steps[0] != steps[1] or (exact and rows[0] != rows[1]):
        return f"the metrics differ; steps {steps[0]} and {steps[1]}"
    for pattern in ("final*/*.safetensors", "samples/*.jsonl", "alarms.jsonl", "abandoned-*.jsonl"):
        files = [sorted(path.relative_to(folder) for path in folder.glob(pattern)) for folder in (whole, killed)]
        if files[0] != files[1]:
            return f"{pattern}: {[str(path) for path in files[0]]} and {[str(path) for path in files[1]]}"
        for path in files[0]:
            if pattern.startswith("final") and not exact:
                a, b = load_file(whole / path), load_file(killed / path)
                different = a.keys() != b.keys() or any((a[name] - b[name]).abs().max() > 1e-4 for name in a)
            elif pattern.startswith("abandoned"):
                different = False  # lines with times in them
            else:
                different = exact and (whole / path).read_bytes() != (killed / path).read_bytes()
            if different:
                return f"{path} differs"
    # A signal may add a checkpoint, and plots of steps that a rollback undoes later; a start from the beginning keeps
    # what there was in earlier-1.
    may, rest = ("checkpoints", "plots/", "earlier-", "tensorboard/"), []
    for folder in (whole, killed):
        rest.append({str(path.relative_to(folder)) for path in folder.rglob("*")})
    extra = sorted(path for path in rest[1] - rest[0] if "/." in f"/{path}" or not path.startswith(may))
    return f"left behind: {', '.join(extra[:5])}" if extra else None
