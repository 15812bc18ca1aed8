"""Random command lines, configurations, data, rewards, models and checkpoints, good and bad, for the `fastppo` command.

What must hold of every one: no traceback; a failure says why in a line or two of at most 400 characters, names the key
or the file, and its exit status is not 0; no case takes a minute; and nothing is left behind that was not asked for.
`main` runs in this process, which costs a tenth of a second; now and then a process of its own does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fastppo.cli import main
from fastppo.training.config import Config, to_dict
from tests.tiny import make_tiny_model

resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))  # a size that is believed must not take the machine

REWARD = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
PATHS = ["", "/", ".", "nothing.jsonl", "a\0b.jsonl", "~nosuchuser/x.jsonl", "x" * 300 + ".txt", "c.yaml", "\udcff.txt",
         "/dev/null", "a/b", "package:x/y"]  # fmt: skip
WORDS = ["banana", "é", "[1, 2]", "{a: 1}", "x" * 5000, ""]  # no numbers
STRANGE = [
    *WORDS, " ", "null", "true", "no", "~", "0", "-1", "1.5", "1e300", "-1e300", ".inf", ".nan", "1e-320", "9" * 400,
    "0x10", "1_000", "\udcff", "a\0b", "\n", "\u2028", "{", "[", "[]", "{}", "!!python/object:os.x {}", "*a", "&a b",
    "2026-01-01", "10:20", "'", '"', "%", "|", "package:x", "package:__main__/x", "~nosuchuser/x", "/proc/self/mem",
    "/dev/null",
]  # fmt: skip
OBJECTS = [None, True, 10**30, -1, 0.5, float("nan"), float("inf"), 1e300, "", "x" * 3000, [], {}, [[]],
           {"a": {"b": 1}}, [None], "\x07"]  # fmt: skip
# Valid and merely long: 10**12 steps are what was asked for.
LONG = {"total_steps", "num_ppo_epochs", "num_value_epochs", "num_greedy_epochs", "num_distill_epochs", "cg_iterations",
        "line_search_steps"}  # fmt: skip
YAML = [
    b"\0", b"[]", b"42", b"a", b"- 1", b"{" * 3000, b"[" * 100_000, b"a: " + b"[" * 3000 + b"]" * 3000, b"\xff\xfe\0",
    b"? [a]\n: 1", b"%YAML 9", b"1: 2", b"null: 1", b"a: &a [*a]", b"<<: 3", b"x: !!python/object/apply:os.system [ls]",
    b"total_steps: 1\ntotal_steps: 2", b"a:\n\t- b", b"{a: &a [x, x], b: &b [*a, *a], c: [*b, *b]}", b"=: 1",
    b"? {a: 1}\n: 2", b"seed: 2026-99-99", b"seed: " + b"9" * 6000, b"",
]  # fmt: skip
BAD_LINES = [
    b'{"prompt": 3}', b'{"prompt": ""}', b'{"prompt": null}', b"{prompt}", b"[1]", b"3", b'{"Prompt": "x"}', b"{}",
    b'{"prompt": "\\ud83d"}', b"\xff\xfe", b'{"prompt": "x"', b"[" * 3000 + b"]" * 3000, b'{"prompt": "x"} {}', b'"x"',
    b'{"prompt": "' + b"x " * 3000 + b'"}', b'{"prompt": "x", "prompts": 1}', b'{"prompt": []}', b'{"prompt": NaN}',
    b'{"prompt": [{"role": "user"}]}', b'{"prompt": [{"role": 3, "content": "x"}]}', b'{"prompt": "a\0b"}',
    b'{"prompt": "x", "n": ' + b"9" * 6000 + b"}", b'{"prompt": {"a": 1}}',
    b'{"prompt": [' + b"[" * 3000 + b"]" * 3000 + b"]}",
]  # fmt: skip
GOOD_LINES = [
    '{"prompt": "é \\u0000 \u2028 \U0001f600"}'.encode(), b'{"prompt": "x", "answer": [1, {"a": null}]}', b"", b"   ",
    b'{"prompt": [{"role": "user", "content": "hello"}]}', b'{"prompt": "x"}\r',
]  # fmt: skip
TABLES = {"csv": b"prompt,answer\n" + b'"Number 1, is",2\n' * 6, "txt": b"Number one is\n" * 6}
BAD_TABLES = [b"", b"\n\n", b"\0", b"prompt\n", b"a,a\n1,2\n", b"prompt,b\n1\n", "prompt\na\n".encode("utf-16")]
RAISED = [
    "ValueError('x')", "ValueError('a\\nb\\nc')", "ValueError('x' * 100000)", "ValueError()", "SystemExit(0)",
    "SystemExit(3)", "asyncio.CancelledError()", "GeneratorExit()", "StopIteration()", "MemoryError()",
    "RecursionError()", "BaseException('x')", "Exception(Broken())", "OSError(28, 'No space left on device')",
    "UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')", "BrokenPipeError()", "ExceptionGroup('g', [ValueError(1)])",
    "AssertionError()", "ImportError('x')", "FloatingPointError('x')", "'not an exception'",
    "ValueError('\\udcff \\x1b[31m \\r')", "KeyboardInterrupt()",
]  # fmt: skip
# What a reward returns, for every completion or as it is.
EACH_BAD = ["float('nan')", "float('inf')", "'1'", "1e39", "10**400", "None", "[]", "1j", "[1.0] * 999", "Broken()",
            "torch.ones(2)", "-3e38"]  # fmt: skip
EACH_FINE = ["1", "True", "numpy.float32(1)", "torch.tensor(1.0)"]
BAD = ["None", "3", "'abc'", "[]", "[1.0]", "{t: 1.0 for t in completions}", "torch.ones(len(completions), 2)",
       "(1 / 0 for _ in completions)", "iter([])", "object()", "itertools.repeat(1.0, 99)", "completions"]  # fmt: skip
FINE = ["(1.0 for _ in completions)", "torch.ones(len(completions))", "numpy.zeros(len(completions))",
        "tuple(0.5 for _ in completions)"]  # fmt: skip
HEAD = """import asyncio, itertools, numpy, torch
class Broken:
    def __str__(self):
        raise ValueError('no text')
    __repr__ = __str__
def vowels(completions, **_):
    """
FILES = [
    "async def vowels(completions):\n    return [1.0] * len(completions)", "vowels = 3", "", "def vowels(:", "1 / 0",
    "raise SystemExit(0)", "raise KeyboardInterrupt", "import nothing_of_this_name", "exit()", "raise BaseException",
    "def vowels(completions, answer):\n    return []", "def vowels():\n    return [1.0]", "\0", "\udcff",
    "def vowels(*a, b):\n    return 1", "class vowels:\n    pass", "import os; vowels = os.getcwd", "x = (" * 200,
    "def vowels(completions):\n    yield 1.0\n    raise ValueError('late')", "import sys; sys.exit('x')",
    "vowels = lambda completions: vowels(completions)", "raise ValueError('a\\nb')",
]  # fmt: skip
FUNCTIONS = ["x", ":", "a:", ":b", "nowhere:f", "os:nothing", "x.py:f", "a\0b.py:f", "package:__main__/x", "x" * 3000]
ANY = [
    "train", "eval", "doctor", "keys", "--help", "--version", "--resume", "--plain", "--json", "--samples", "--model",
    "-1", "3", "c.yaml", "--", "--=", "-x", "", "é", "\udcff", "a\0b", "x" * 3000, "--ppo.kl_coef", "0.1",
    "--rewards.0.weight", "--rewards.9.weight", "--rewards.x", "--ppo", "--ppo.", "ppo", "--.", "--ppo.kl_coef.x",
    "--model.lora", "{}", "{r: 2, target_modules: '('}", "--model.lora.target_modules", "(", "--device", "cuda:9",
    "nothing.yaml", ".", "--data.train", "--output_dir", "/proc/x", "r1", "--seed", "--total_steps", "1",
]  # fmt: skip


class Case:
    """Files in a folder and the words after `fastppo`, to be changed by one of KINDS."""

    def __init__(self, draw: random.Random, folder: Path) -> None:
        self.draw, self.folder, self.reward, self.config = draw, folder, REWARD, b""
        self.expect(None)
        self.tree: dict[str, Any] = {
            "output_dir": str(folder / "run"), "total_steps": 1, "report_to": "none",
            "model": {"name_or_path": str(world() / "model")},
            "data": {"train": str(folder / "prompts.jsonl"), "eval_size": 2},
            "rewards": [{"name": "vowels", "function": f"{folder / 'reward.py'}:vowels"}],
            "rollout": {"num_prompts": 2, "num_generations": 2, "max_new_tokens": 3}, "checkpoint": {"every": 1},
        }  # fmt: skip
        self.prompts = [json.dumps({"prompt": f"Number {n} is"}).encode() for n in range(6)]
        self.words = ["train", str(folder / "c.yaml"), *draw.choice([[], ["--plain"], ["--resume"]])]

    def expect(self, bad: bool | None, *names: str) -> None:
        """Whether it must fail (None: it may), and what a failure that must be names: one of these."""
        self.bad, self.names = bad, names

    def write(self) -> None:
        (self.folder / "c.yaml").write_bytes(self.config or yaml.safe_dump(self.tree, sort_keys=False).encode())
        (self.folder / "reward.py").write_text(self.reward, errors="surrogatepass")
        (self.folder / "prompts.jsonl").write_bytes(b"\n".join(self.prompts) + b"\n")


@functools.cache
def world() -> Path:
    """A folder with a model."""
    folder = Path("world").absolute()
    make_tiny_model(folder / "model", hidden_size=16, layers=1)
    return folder


@functools.cache
def finished() -> Path:
    """The folder of a run of two steps, and beside it its configuration."""
    folder = world() / "base"
    folder.mkdir()
    case = Case(random.Random(0), folder)
    case.tree["total_steps"] = 2
    case.write()
    status, error, _ = call(case.words[:2], folder)
    if status != 0:
        raise RuntimeError(f"the base case fails: {error}")
    return folder / "run"


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of a tree's single values."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))
    if not items:
        yield path


DEFAULTS = to_dict(Config())
KEYS = list(dict.fromkeys(path if isinstance(path[-1], str) else path[:-1] for path in leaves(DEFAULTS)))


def strange_override(case: Case) -> None:
    path, value = case.draw.choice(KEYS), case.draw.choice(STRANGE)
    key = ".".join(path)
    if path[-1] in LONG:
        value = "banana"
    if value in WORDS and isinstance(functools.reduce(dict.get, path, DEFAULTS), bool | int | float):
        case.expect(True, key)
    case.words += case.draw.choice([[f"--{key}", value], [f"--{key}={value}"]])


def misspelt_key(case: Case) -> None:
    *parents, last = case.draw.choice(KEYS)
    place = case.draw.randrange(len(last))
    wrong = last[:place] + case.draw.choice(["", "q", "zz", "é"]) + last[place + 1 :]
    if wrong and (*parents, wrong) not in KEYS and not hasattr(Config, wrong):
        case.expect(True, ".".join([*parents, wrong]))
        case.words += [f"--{case.names[0]}", "1"]


def strange_value(case: Case) -> None:
    """Any object in place of any other in the configuration file."""
    *parents, last = case.draw.choice([path for path in (*leaves(case.tree), *KEYS) if path[-1] not in LONG])
    node = case.tree
    for key in parents:
        node = node[key] if isinstance(node, list) or key in node else node.setdefault(key, {})
    node[last] = case.draw.choice(OBJECTS)


def broken_yaml(case: Case) -> None:
    if case.draw.random() < 0.5:
        case.config = case.draw.choice(YAML) or b"#"
        case.expect(
            True, "c.yaml", "model.name_or_path", "a:", "seed", "=", "total_steps", "x:", "1:", "should be strings"
        )
    else:
        case.config = mutate(case.draw, yaml.safe_dump(case.tree, sort_keys=False).encode())
        if b"total_steps: 1\n" not in case.config:
            case.config += b"\ntotal_steps: 1\n"


def mutate(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out, doubled or put in; or the end cut off."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, size = draw.randrange(len(data) + 1), draw.choice([1, 1, 3, 40])
        put = [b"", draw.randbytes(size), data[at : at + size] * 2, b"\n", b'"', b"\\", b"\0", b"\xff", b"{", b"9999"]
        data = data[:at] if draw.random() < 0.1 else data[:at] + draw.choice(put) + data[at + size :]
    return data


def strange_data(case: Case) -> None:
    draw, place, kind = case.draw, case.draw.randrange(len(case.prompts) + 1), case.draw.randrange(6)
    if kind < 2:
        case.prompts.insert(place, draw.choice(BAD_LINES))
        case.expect(True, "prompts.jsonl")
    elif kind == 2:
        case.prompts.insert(place, draw.choice(GOOD_LINES))
        case.prompts[0] = draw.choice([b"", b"\xef\xbb\xbf"]) + case.prompts[0]
        case.expect(False)
    elif kind == 3:
        case.prompts = [mutate(draw, b"\n".join(case.prompts))]
    elif kind == 4:
        suffix = draw.choice(sorted(TABLES))
        text = draw.choice([TABLES[suffix], mutate(draw, TABLES[suffix]), draw.choice(BAD_TABLES)])
        (case.folder / f"p.{suffix}").write_bytes(text)
        case.tree["data"]["train"] = str(case.folder / f"p.{suffix}")
        case.expect(False if text in TABLES.values() else None)
    else:
        case.tree["data"][draw.choice(["train", "eval"])] = path = draw.choice(PATHS)
        case.expect(True, "data.train", "data.eval", "nosuchuser", "\\x00", "\\udcff", path[:20])


def strange_reward(case: Case) -> None:
    kind, draw = case.draw.randrange(6), case.draw
    case.expect(kind != 3, "vowels", "reward.py", "rewards.0")
    if kind == 5:
        case.tree["rewards"][0]["function"] = draw.choice(FUNCTIONS)
    elif kind == 4:
        case.reward = draw.choice(FILES)
    elif kind == 2:
        case.reward = f"{HEAD}raise {draw.choice(RAISED)}\n"
    else:
        each, whole = (EACH_FINE, FINE) if kind == 3 else (EACH_BAD, BAD)
        case.reward = f"{HEAD}return {draw.choice([f'[{x}] * len(completions)' for x in each] + whole)}\n"
    if "KeyboardInterrupt" in case.reward or "3e38" in case.reward:  # as good as Ctrl-C; finite, but too large a sum
        case.expect(None)


def strange_words(case: Case) -> None:
    """Any words in any order; what they ask for may be right."""
    first = case.draw.choice([[], ["train", "c.yaml"], ["eval", "c.yaml"], ["keys"], ["doctor"]])
    case.words = first + [case.draw.choice([*ANY, str(world() / "model")]) for _ in range(case.draw.randrange(5))]


def damage(draw: random.Random, path: Path) -> None:
    data, kind = path.read_bytes(), draw.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1 and path.suffix == ".json" and isinstance(tree := json.loads(data), dict):
        tree[draw.choice(sorted(tree))] = draw.choice([None, "x", -1, [], {}, 10**9, 0.5])
        path.write_text(json.dumps(tree))
    else:
        cut = data[: draw.randrange(len(data) + 1)]
        path.write_bytes(draw.choice([b"", mutate(draw, data), mutate(draw, data), cut]))


def damaged_model(case: Case) -> None:
    folder = shutil.copytree(world() / "model", case.folder / "model")
    damage(case.draw, case.draw.choice(sorted(folder.iterdir())))
    case.tree["model"]["name_or_path"] = str(folder)


def damaged_run(case: Case) -> None:
    """A run to resume, some of whose files are damaged or gone."""
    run = shutil.copytree(finished(), case.folder / "run")
    if case.draw.random() < 0.7:  # only step 1 is done, as after a kill
        shutil.rmtree(run / "final")
        shutil.rmtree(run / "checkpoints" / "step-000002")
    case.tree = yaml.safe_load((finished().parent / "c.yaml").read_text()) | {"output_dir": str(run)}
    for _ in range(case.draw.randrange(1, 3)):
        damage(case.draw, case.draw.choice([path for path in sorted(run.rglob("*")) if path.is_file()]))
    case.words[2:] = ["--resume"]


def strange_evaluation(case: Case) -> None:
    good = [str(finished() / "final"), str(world() / "model")]
    model = case.draw.choice(good + PATHS)
    options = case.draw.choice([[], ["--json"], ["--samples", "0"], ["--samples", "-3"], ["--samples", "x"]])
    case.words = ["eval", case.words[1], "--model", model, *options]
    case.expect(
        model not in good or options[1:] in (["-3"], ["x"]),
        *("samples", "--model", "name_or_path", "\\x00", "\\udcff", "nosuchuser", model[:20]),
    )


KINDS: list[Callable[[Case], None]] = [
    strange_override, strange_override, misspelt_key, strange_value, broken_yaml, strange_data, strange_data,
    strange_reward, strange_reward, strange_words, damaged_model, damaged_run, strange_evaluation,
]  # fmt: skip


def run(number: int) -> str | None:
    draw = random.Random(number)
    finished()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        case, kind = Case(draw, folder), draw.choice(KINDS)
        kind(case)
        case.write()
        before = set(folder.rglob("*"))
        apart = draw.random() < 0.01 and not any("\0" in word for word in case.words)
        status, error, seconds = (call_apart if apart else call)(case.words, folder)
        problem = judge(case, status, error, seconds, set(folder.rglob("*")) - before)
        if problem is None:
            return None
        last = ([line for line in error.splitlines() if line.strip()] or [""])[-1]
        what = case.reward[-120:] if kind is strange_reward else " ".join(case.words)[-200:]
        return f"{kind.__name__}: {problem}; status {status}, {last[:300]!r} after {what!r}"


def judge(case: Case, status: int, error: str, seconds: float, new: set[Path]) -> str | None:
    """What is wrong with how the command ended, or None."""
    usage = error.lstrip().startswith("usage:")
    error = re.sub(r"^.*\.py:\d+: FastPPOWarning: .*\n( .*\n)?", "", error, flags=re.MULTILINE)
    lines = [line for line in error.splitlines() if line.strip()]
    longest = max(map(len, lines), default=0)
    started = (case.folder / "run" / "metrics.jsonl").exists()
    left = [path.name for path in new if path.name.startswith((".saving", ".trash")) or path.suffix == ".tmp"]
    if status and not started:
        left += sorted(path.name for path in new if path.name != "run" and "__pycache__" not in str(path))
    wrong = {
        "a traceback": "Traceback" in error or "which is a bug" in error,
        f"{seconds:.0f} s": seconds > 60,
        f"status {status}": status not in (0, 1, 2, 130),
        "fails without a word": status not in (0, 130) and not lines,
        f"{len(lines)} lines on stderr of a success": status == 0 and lines,
        "the last line is not fastppo's": status and lines and not lines[-1].startswith("fastppo"),
        f"{len(lines)} lines, the first {lines[:1]}": len(lines) > 2 and not usage,
        f"a line of {longest} characters": status and longest > 400,
        "accepted": case.bad is True and status == 0,
        "refused": case.bad is False and status,
        f"does not name any of {case.names[:3]}": case.bad and not any(n and n in error for n in case.names or " "),
        f"left behind: {left[:4]}": left,
    }
    return next((text for text, holds in wrong.items() if holds), None)


class _TooLong(BaseException):
    pass


def call(words: list[str], folder: Path) -> tuple[int, str, float]:
    """`main(words)` in `folder`: status, what it wrote to the descriptor of stderr, seconds of this process."""

    def stop(*_: object) -> None:
        raise _TooLong

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, contextlib.ExitStack() as stack:
        for number, file in ((1, out), (2, err)):
            saved = os.dup(number)
            os.dup2(file.fileno(), number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
        stack.callback(os.chdir, os.getcwd())
        stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, stop))
        stack.callback(signal.alarm, 0)
        os.chdir(folder)
        signal.alarm(100)
        began, status, seconds = time.process_time(), 70, 0.0
        try:
            status = main(list(words))
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 70
        except _TooLong:
            seconds = 100.0
        except BaseException as error:
            print(f"Traceback: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        err.seek(0)
        return status, err.read().decode(errors="replace"), max(seconds, time.process_time() - began)


def call_apart(words: list[str], folder: Path) -> tuple[int, str, float]:
    """The same by `python -m fastppo`."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "fastppo", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, env=environment, timeout=110, check=False)
    return done.returncode, done.stderr.decode(errors="replace"), 0.0
