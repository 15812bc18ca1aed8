"""Random command lines, configurations, data, rewards, models and checkpoints, good and bad, for the `fastppo` command.

What must hold of every one: no traceback; a failure says why in a line or two of at most 400 characters, names the key
or the file, and its exit status is not 0; no case takes a minute; and nothing is left behind that was not asked for.
`main` runs in this process, which costs a tenth of a second; now and then a process of its own does.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
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
from fastppo.training.config import Config
from tests.tiny import make_tiny_model

resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))  # a size that is believed must not take the machine

REWARD = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
STRANGE = [
    "", " ", "null", "true", "no", "~", "0", "-1", "1.5", "1e300", "-1e300", ".inf", ".nan", "1e-320", "9" * 400,
    "0x10", "1_000",
    "banana", "x" * 5000, "é", "\udcff", "a\0b", "\n", "\u2028", "{", "[", "[]", "{}", "[1, 2]", "{a: 1}",
    "!!python/object:os.x {}", "*a",
    "&a b", "2026-01-01", "10:20", "'", '"', "%", "|", "package:x", "package:__main__/x", "~nosuchuser/x",
    "/proc/self/mem", "/dev/null",
]  # fmt: skip
# Valid and merely long: 10**12 steps are what was asked for.
LONG = {"total_steps", "num_ppo_epochs", "num_value_epochs", "num_greedy_epochs", "num_distill_epochs", "cg_iterations"}
LONG |= {"line_search_steps"}


class Case:
    """Files in a folder and the words after `fastppo`, to be changed by one of KINDS."""

    def __init__(self, draw: random.Random, folder: Path) -> None:
        self.draw, self.folder, files = draw, folder, world()
        self.bad: bool | None = None  # whether it must fail; None: it may
        self.names: list[str] = []  # a failure must name one of these
        self.tree: dict[str, Any] = {
            "output_dir": str(folder / "run"), "total_steps": 1, "report_to": "none",
            "model": {"name_or_path": str(files / "model")},
            "data": {"train": str(folder / "prompts.jsonl"), "eval_size": 2},
            "rewards": [{"name": "vowels", "function": f"{folder / 'reward.py'}:vowels"}],
            "rollout": {"num_prompts": 2, "num_generations": 2, "max_new_tokens": 3}, "checkpoint": {"every": 1},
        }  # fmt: skip
        self.prompts = [json.dumps({"prompt": f"Number {n} is"}).encode() for n in range(6)]
        self.config: bytes | None = None
        self.reward = REWARD
        self.words = ["train", str(folder / "c.yaml"), *draw.choice([[], ["--plain"], ["--resume"]])]

    def write(self) -> None:
        config = yaml.safe_dump(self.tree, sort_keys=False).encode() if self.config is None else self.config
        (self.folder / "c.yaml").write_bytes(config)
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
    """A run of two steps, in `run`, and its configuration, in `base`."""
    folder = world()
    (folder / "base").mkdir()
    case = Case(random.Random(0), folder / "base")
    case.tree |= {"output_dir": str(folder / "run"), "total_steps": 2}
    case.write()
    status, _, error, _ = call(["train", str(folder / "base" / "c.yaml")], folder)
    if status != 0:
        raise RuntimeError(f"the base case fails: {error}")
    return folder


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of a tree's single values."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))
    if not items:
        yield path


KEYS = [path for path in leaves(dataclasses.asdict(Config())) if path]
DEFAULTS = dataclasses.asdict(Config())


def strange_override(case: Case) -> None:
    path, value = case.draw.choice(KEYS), case.draw.choice(STRANGE)
    if path[-1] in LONG:
        value = "banana"
    default = functools.reduce(lambda node, key: node[key], path, DEFAULTS)
    if isinstance(default, bool | int | float) and value in (
        "banana",
        "é",
        "[1, 2]",
        "{a: 1}",
        "x" * 5000,
        "",
        "1e300" * isinstance(default, bool),
    ):
        case.bad, case.names = True, [".".join(path)]
    key = "--" + ".".join(path)
    case.words += case.draw.choice([[key, value], [f"{key}={value}"]])


def misspelt_key(case: Case) -> None:
    *parents, last = case.draw.choice(KEYS)
    place = case.draw.randrange(len(last))
    wrong = last[:place] + case.draw.choice(["", "q", "zz", "é"]) + last[place + 1 :]
    key = ".".join([*parents, wrong])
    if wrong and (*parents, wrong) not in KEYS and not hasattr(Config, wrong):
        case.bad, case.names = True, [key.replace("-", "_")]
        case.words += [f"--{key}", "1"]


def strange_value(case: Case) -> None:
    """Any object in place of any other in the configuration file."""
    path = case.draw.choice(list(leaves(case.tree)) + KEYS)
    if path[-1] in LONG:
        return
    values = [
        None,
        True,
        10**30,
        -1,
        0.5,
        float("nan"),
        float("inf"),
        1e300,
        "",
        "x" * 3000,
        [],
        {},
        [[]],
        {"a": {"b": 1}},
        [None],
        "\x07",
    ]
    node = case.tree
    for key in path[:-1]:
        node = node[key] if isinstance(node, list) or key in node else node.setdefault(key, {})
    node[path[-1]] = case.draw.choice(values)


def broken_yaml(case: Case) -> None:
    draw, text = case.draw, yaml.safe_dump(case.tree, sort_keys=False).encode()
    deep = draw.choice([3000, 100_000])
    whole = [
        b"", b"\0", b"[]", b"42", b"a", b"- 1", b"{" * deep, b"[" * deep, b"a: " + b"[" * deep + b"]" * deep,
        b"\xff\xfe\0", b"? [a]\n: 1", b"%YAML 9",
        b"1: 2", b"null: 1", b"a: &a [*a]", b"<<: 3", b"x: !!python/object/apply:os.system [ls]",
        b"total_steps: 1\ntotal_steps: 2", b"a:\n\t- b",
        b"{a: &a [x, x], b: &b [*a, *a], c: &c [*b, *b], d: [*c, *c]}", b"=: 1", b"? {a: 1}\n: 2", b"seed: 2026-99-99",
        b"seed: " + b"9" * 6000,
    ]  # fmt: skip
    if draw.random() < 0.5:
        case.config, case.bad, case.names = (
            draw.choice(whole),
            True,
            ["c.yaml", "model.name_or_path", "a:", "seed", "=", "total_steps", "x:", "1:"],
        )
    else:
        case.config = mutate(draw, text)
        if b"total_steps: 1\n" not in case.config:
            case.config += b"\ntotal_steps: 1\n"


def mutate(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out, doubled or put in; or the end cut off."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, size = draw.randrange(len(data) + 1), draw.choice([1, 1, 3, 40])
        new = draw.choice(
            [b"", draw.randbytes(size), data[at : at + size] * 2, b"\n", b'"', b"\\", b"\0", b"\xff", b"{", b"9999"]
        )
        data = data[:at] if draw.random() < 0.1 else data[:at] + new + data[at + size :]
    return data


BAD_LINES = [
    b'{"prompt": 3}', b'{"prompt": ""}', b'{"prompt": null}', b"{prompt}", b"[1]", b"3", b'{"Prompt": "x"}',
    b'{"prompt": "\\ud83d"}', b"\xff\xfe",
    b'{"prompt": "x"', b"[" * 3000 + b"]" * 3000, b'{"prompt": "' + b"x " * 3000 + b'"}',
    b'{"prompt": "x", "prompts": 1}', b'{"prompt": []}',
    b'{"prompt": NaN}', b'{"prompt": [{"role": "user"}]}', b'{"prompt": [{"role": 3, "content": "x"}]}',
    b'{"prompt": "a\0b"}', b"{}", b'"x"',
    b'{"prompt": "x", "n": ' + b"9" * 6000 + b"}", b'{"prompt": {"a": 1}}',
    b'{"prompt": [' + b"[" * 3000 + b"]" * 3000 + b"]}", b'{"prompt": "x"} {}',
]  # fmt: skip
GOOD_LINES = [
    '{"prompt": "é \\u0000 \u2028 \U0001f600"}'.encode(), b'{"prompt": "x", "answer": [1, {"a": null}]}', b"", b"   ",
    b'{"prompt": [{"role": "user", "content": "hello"}]}', b'\xef\xbb\xbf{"prompt": "bom"}', b'{"prompt": "x"}\r',
]  # fmt: skip


def strange_data(case: Case) -> None:
    draw, place = case.draw, case.draw.randrange(len(case.prompts) + 1)
    kind = draw.randrange(5)
    if kind < 2:
        case.prompts.insert(place, draw.choice(BAD_LINES))
        case.bad, case.names = True, ["prompts.jsonl"]
    elif kind == 2:
        line = draw.choice(GOOD_LINES)
        case.prompts.insert(0 if line.startswith(b"\xef") else place, line)
        case.bad = False
    elif kind == 3:
        case.prompts = [mutate(draw, b"\n".join(case.prompts))]
    else:
        path = draw.choice(
            [
                "",
                "/",
                ".",
                "nothing.jsonl",
                "a\0b.jsonl",
                "~nosuchuser/x.jsonl",
                "x" * 300 + ".txt",
                "c.yaml",
                "\udcff.txt",
                "/dev/null",
                "a/b",
            ]
        )
        case.tree["data"][draw.choice(["train", "eval"])] = path
        case.bad, case.names = (
            True,
            [
                "data.train",
                "data.eval",
                path[:20],
                *(["nosuchuser"] if "nosuch" in path else []),
                "\\x00",
                "\\udcff",
                "c.yaml",
            ],
        )


def strange_table(case: Case) -> None:
    """A .csv or .txt file, its bytes changed now and then."""
    draw = case.draw
    suffix, text = draw.choice(
        [
            ("csv", b"prompt,answer\n" + b"".join(b'"Number %d, is",%d\n' % (n, n) for n in range(6))),
            ("txt", b"Number one is\n" * 6),
        ]
    )
    if changed := draw.random() < 0.7:
        text = draw.choice(
            [
                mutate(draw, text),
                b"",
                b"\n\n",
                b"\0",
                b"prompt\n",
                b"a,a\n1,2\n",
                b"prompt,b\n1\n",
                text.decode().encode("utf-16"),
            ]
        )
    (case.folder / f"p.{suffix}").write_bytes(text)
    case.tree["data"]["train"], case.names = str(case.folder / f"p.{suffix}"), [f"p.{suffix}", "data."]
    case.bad = None if changed else False


RAISED = [
    "ValueError('x')", "ValueError('a\\nb\\nc')", "ValueError('x' * 100000)", "ValueError()", "SystemExit(0)",
    "SystemExit(3)", "KeyboardInterrupt()",
    "asyncio.CancelledError()", "GeneratorExit()", "StopIteration()", "MemoryError()", "RecursionError()",
    "BaseException('x')", "Exception(Broken())",
    "OSError(28, 'No space left on device')", "UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')", "BrokenPipeError()",
    "ExceptionGroup('g', [ValueError(1)])",
    "AssertionError()", "ImportError('x')", "FloatingPointError('x')", "'not an exception'",
    "ValueError('\\udcff \\x1b[31m \\r')",
]  # fmt: skip
RETURNED = [
    "None", "3", "'abc'", "[]", "[1.0]", "[float('nan')] * len(completions)", "[float('inf')] * len(completions)",
    "['1'] * len(completions)",
    "[1e39] * len(completions)", "[10**400] * len(completions)", "{t: 1.0 for t in completions}",
    "[None] * len(completions)", "[[]] * len(completions)",
    "[1j] * len(completions)", "torch.ones(len(completions), 2)", "(1 / 0 for _ in completions)", "iter([])",
    "[[1.0] * 999] * len(completions)", "object()",
    "[Broken()] * len(completions)", "[torch.ones(2)] * len(completions)", "itertools.repeat(1.0, 99)", "completions",
    "[-3e38] * len(completions)",
]  # fmt: skip
FINE = [
    "[1] * len(completions)", "[True] * len(completions)", "(1.0 for _ in completions)",
    "torch.ones(len(completions))", "numpy.zeros(len(completions))",
    "[numpy.float32(1)] * len(completions)", "tuple(0.5 for _ in completions)",
    "[torch.tensor(1.0)] * len(completions)",
]  # fmt: skip
DEFINED = [
    "async def vowels(completions):\n    return [1.0] * len(completions)", "vowels = 3", "", "def vowels(:",
    "raise SystemExit(0)", "raise KeyboardInterrupt",
    "1 / 0", "import nothing_of_this_name", "def vowels(completions, answer):\n    return []",
    "def vowels():\n    return [1.0]", "def vowels(*a, b):\n    return 1",
    "class vowels:\n    pass", "import os; vowels = os.getcwd",
    "def vowels(completions):\n    yield 1.0\n    raise ValueError('late')", "\0", "\udcff", "x = (" * 200,
    "vowels = lambda completions: vowels(completions)", "raise ValueError('a\\nb')", "import sys; sys.exit('x')",
    "exit()", "raise BaseException",
]  # fmt: skip


def strange_reward(case: Case) -> None:
    draw = case.draw
    head = "import asyncio, itertools, numpy, torch\n"
    head += "class Broken:\n    def __str__(self):\n        raise ValueError('no text')\n    __repr__ = __str__\n"
    kind, case.names = draw.randrange(5), ["vowels", "reward.py", "rewards.0"]
    if kind == 4:
        case.tree["rewards"][0]["function"] = draw.choice(
            ["x", ":", "a:", ":b", "nowhere:f", "os:nothing", "x.py:f", "a\0b.py:f", "package:__main__/x", "x" * 3000]
        )
        case.bad = True
        return
    body = draw.choice(
        [[f"raise {e}" for e in RAISED], [f"return {r}" for r in RETURNED], [f"return {r}" for r in FINE], DEFINED][
            kind
        ]
    )
    case.bad = kind != 2
    if "KeyboardInterrupt" in body or "3e38" in body:  # as good as Ctrl-C; finite, but what is made of it is not
        case.bad = None
    case.reward = body if kind == 3 else f"{head}def vowels(completions, **_):\n    {body}\n"


def strange_words(case: Case) -> None:
    """Any words in any order; what they ask for may be right."""
    words = [
        "train", "eval", "doctor", "keys", "--help", "--version", "--resume", "--plain", "--json", "--samples",
        "--model", "-1", "3", "c.yaml", "--", "--=",
        "-x", "", "é", "\udcff", "a\0b", "x" * 3000, "--ppo.kl_coef", "0.1", "--rewards.0.weight",
        "--rewards.9.weight", "--rewards.x", "--ppo", "--ppo.", "ppo",
        "--.", "--ppo.kl_coef.x", "--model.lora", "{}", "{r: 2, target_modules: '('}", "--model.lora.target_modules",
        "(", "--device", "cuda:9", "nothing.yaml",
        ".", str(world() / "model"), "--data.train", "--output_dir", "/proc/x", "r1", "--seed", "--total_steps", "1",
    ]  # fmt: skip
    first = case.draw.choice([[], ["train", "c.yaml"], ["eval", "c.yaml"], ["keys"], ["doctor"]])
    case.words = first + [case.draw.choice(words) for _ in range(case.draw.randrange(5))]


def strange_model(case: Case) -> None:
    """A file of the model's folder is damaged or gone."""
    folder, draw = case.folder / "model", case.draw
    shutil.copytree(world() / "model", folder)
    path = draw.choice(sorted(folder.iterdir()))
    damage(draw, path)
    case.tree["model"]["name_or_path"] = str(folder)
    case.names = ["model"]


def damage(draw: random.Random, path: Path) -> None:
    data, kind = path.read_bytes(), draw.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1 and path.suffix == ".json" and isinstance(tree := json.loads(data), dict):
        tree[draw.choice(sorted(tree))] = draw.choice([None, "x", -1, [], {}, 10**9, 0.5])
        path.write_text(json.dumps(tree))
    else:
        path.write_bytes(
            draw.choice([b"", mutate(draw, data), mutate(draw, data), data[: draw.randrange(len(data) + 1)]])
        )


def damaged_run(case: Case) -> None:
    """A run to resume, some of whose files are damaged or gone."""
    run, draw = case.folder / "run", case.draw
    shutil.copytree(finished() / "run", run)
    if draw.random() < 0.7:  # only step 1 is done, as after a kill
        shutil.rmtree(run / "final")
        shutil.rmtree(run / "checkpoints" / "step-000002", ignore_errors=True)
    case.tree = yaml.safe_load((finished() / "base" / "c.yaml").read_text()) | {"output_dir": str(run)}
    for _ in range(draw.randrange(1, 3)):
        if files := [path for path in sorted(run.rglob("*")) if path.is_file()]:
            damage(draw, draw.choice(files))
    (case.folder / "reward.py").unlink(missing_ok=True)
    case.words, case.names = [*case.words[:2], "--resume"], ["run"]


def strange_evaluation(case: Case) -> None:
    model = case.draw.choice(
        [
            str(finished() / "run" / "final"),
            str(world() / "model"),
            "nothing",
            "/",
            "",
            "a\0b",
            "~nosuchuser",
            "c.yaml",
            "package:x/y",
        ]
    )
    case.words = [
        "eval",
        case.words[1],
        "--model",
        model,
        *case.draw.choice([[], ["--json"], ["--samples", "0"], ["--samples", "-3"], ["--samples", "x"]]),
    ]
    good = model.endswith(("final", "model"))
    case.bad, case.names = (
        (not good or case.words[-1] in ("-3", "x")),
        ["samples", model[:20], "--model", "name_or_path", "\\x00"],
    )


KINDS: list[Callable[[Case], None]] = [
    strange_override, strange_override, misspelt_key, strange_value, broken_yaml, strange_data, strange_table,
    strange_reward, strange_reward, strange_words,
    strange_model, damaged_run, strange_evaluation,
]  # fmt: skip


def run(number: int) -> str | None:
    draw = random.Random(number)
    finished()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        case = Case(draw, folder)
        kind = draw.choice(KINDS)
        kind(case)
        case.write()
        before = set(folder.rglob("*"))
        apart = draw.random() < 0.01 and not any("\0" in word for word in case.words)
        status, output, error, seconds = (call_apart if apart else call)(case.words, folder)
        problem = judge(case, status, output, error, seconds, set(folder.rglob("*")) - before)
        if problem is None:
            return None
        last = ([line for line in error.splitlines() if line.strip()] or [""])[-1]
        what = case.reward[-120:] if kind is strange_reward else " ".join(case.words)[-200:]
        return f"{kind.__name__}: {problem}; status {status}, {last[:300]!r} after {what!r}"


def judge(case: Case, status: int, output: str, error: str, seconds: float, new: set[Path]) -> str | None:
    usage = error.lstrip().startswith("usage:")
    error = re.sub(r"^.*\.py:\d+: FastPPOWarning: .*\n( .*\n)?", "", error, flags=re.MULTILINE)
    lines = [line for line in error.splitlines() if line.strip()]
    if "Traceback" in error or "which is a bug" in error:
        return "a traceback"
    if seconds > 60:
        return f"{seconds:.0f} s"
    if status not in (0, 1, 2, 130):
        return f"status {status}"
    if status == 130 and not lines:
        return None
    if status and not lines:
        return "fails without a word"
    if status == 0 and lines:
        return f"{len(lines)} lines on stderr of a success"
    if status and not lines[-1].startswith("fastppo"):
        return "the last line is not fastppo's"
    if len(lines) > 2 and not usage:
        return f"{len(lines)} lines, the first {lines[0][:100]!r}"
    if status and max(map(len, lines)) > 400:
        return f"a line of {max(map(len, lines))} characters"
    if case.bad is True and status == 0:
        return "accepted"
    if case.bad is False and status:
        return "refused"
    if status and case.bad and case.names and not any(name and name in error for name in case.names):
        return f"does not name any of {case.names[:3]}"
    if hidden := [
        path.name
        for path in new
        if path.name.startswith((".saving", ".replaced", ".writable")) or path.suffix == ".tmp"
    ]:
        return f"left behind: {hidden}"
    if (
        status
        and not (case.folder / "run" / "metrics.jsonl").exists()
        and (rest := [p.name for p in new if p.name != "run" and "__pycache__" not in str(p)])
    ):
        return f"left behind: {sorted(rest)[:4]}"
    return None


class _TooLong(BaseException):
    pass


def call(words: list[str], folder: Path) -> tuple[int, str, str, float]:
    """`main(words)` in `folder`: status, what it wrote to the two file descriptors, seconds of this process."""

    def stop(*_: object) -> None:
        raise _TooLong

    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, contextlib.ExitStack() as stack:
        for number, file in ((1, out), (2, err)):
            saved = os.dup(number)
            os.dup2(file.fileno(), number)
            stack.callback(lambda saved=saved, number=number: (os.dup2(saved, number), os.close(saved)))
        stack.callback(os.chdir, os.getcwd())
        stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, stop))
        stack.callback(signal.alarm, 0)
        os.chdir(folder)
        signal.alarm(100)
        began = time.process_time()
        seconds = 0.0
        try:
            status = main(copy.copy(words))
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 70
        except _TooLong:
            status, seconds = 70, 100.0
        except BaseException as error:
            status = 70
            with contextlib.suppress(BaseException):
                print(f"Traceback: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        seconds = max(seconds, time.process_time() - began)
        return status, *(read(file) for file in (out, err)), seconds


def read(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def call_apart(words: list[str], folder: Path) -> tuple[int, str, str, float]:
    """The same by `python -m fastppo`."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastppo", *words], cwd=folder, capture_output=True, env=environment, timeout=110
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), 0.0
