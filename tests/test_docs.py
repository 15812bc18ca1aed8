"""The documentation's code runs, its commands parse, and the files, sections and keys that it names exist.

A fenced block that is neither run nor checked here carries a mark on the line above it:

    <!-- not run: why -->              nothing is checked
    <!-- needs: module, module -->     run where these modules are installed

The ```python blocks of a file run from top to bottom in one namespace, in a folder with a tiny model's CONFIG.yaml.
```yaml blocks are valid parts of a configuration. In ```bash blocks `fastppo` commands are parsed with their
configuration, the scripts, options, extras and paths of others exist, or .ci/run has the very command.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tiny import make_tiny_model

from fastppo import cli
from fastppo.training.config import Config, build_config

ROOT = Path(__file__).parents[1]
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/device.md",
]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    path: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        if self.mark.startswith("not run: "):
            return False
        modules = self.mark.removeprefix("needs: ").split(", ") if self.mark.startswith("needs: ") else []
        return all(importlib.util.find_spec(module) for module in modules)


def blocks(path: Path, language: str) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = [
        Block(path, text[: m.start("text")].count("\n") + 1, m["language"], m["text"], m["mark"] or "")
        for m in FENCE.finditer(text)
    ]
    return [block for block in found if block.language == language and block.is_run]


def cases(language: str) -> list:
    return [pytest.param(b, id=b.name) for path in DOCS for b in blocks(path, language)]


def test_every_block_says_its_language():
    for path in DOCS:
        fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(fences[::2]), path
        assert set(fences[::2]) <= {"python", "bash", "yaml"}, path
        assert not any(fences[1::2]), path


def test_the_readme_shows_the_example_whole():
    text = (ROOT / "examples/drop_in.py").read_text(encoding="utf-8")
    assert f"```python\n{text}```" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- python ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, prompts, and CONFIG.yaml for a run of one step."""
    folder = tmp_path_factory.mktemp("docs")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"Number {n} is\n" for n in range(12)))
    config = {
        "output_dir": str(folder / "run"),
        "total_steps": 1,
        "report_to": "none",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "prompts.txt"), "eval_size": 4},
        "rollout": {"num_prompts": 2, "num_generations": 2, "max_new_tokens": 4},
    }
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(config))
    return folder


def for_integrations(folder: Path) -> dict[str, object]:
    """What a script that trains with TRL has: tokenizer, models, prompts."""
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    load_classifier = transformers.AutoModelForSequenceClassification.from_pretrained
    texts = [f"Number {n} is" for n in range(8)]
    return {
        "tokenizer": tokenizer,
        "policy": transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        "reward_model": load_classifier(folder / "model", num_labels=1),
        "value_model": load_classifier(folder / "model", num_labels=1),
        "dataset": datasets.Dataset.from_dict({"prompt": texts, "input_ids": tokenizer(texts)["input_ids"]}),
    }


SETUPS = {"integrations.md": for_integrations}


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in DOCS if blocks(p, "python")], ids=lambda path: path.name)
def test_python_runs(path, folder, tmp_path, monkeypatch, capsys):
    for module in ("trl", "transformers", "datasets"):
        pytest.importorskip(module)
    (tmp_path / "CONFIG.yaml").write_text((folder / "CONFIG.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"} | SETUPS.get(path.name, lambda folder: {})(folder)
    for block in blocks(path, "python"):
        # The newlines make the line numbers of an error those of the document.
        exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
    if path.name == "README.md":
        assert capsys.readouterr().out.count("'policy_loss'") == 2  # the two epochs of examples/drop_in.py
        assert (folder / "run/final").is_dir()


# ---- yaml -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", cases("yaml"))
def test_yaml_is_a_valid_part_of_a_configuration(block):
    required = {
        "model": {"name_or_path": "model"},
        "data": {"train": "prompts.txt"},
        "rewards": [{"name": "sentiment", "function": "vader_sentiment"}],
    }
    build_config(required | yaml.safe_load(block.text))


# ---- bash -----------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of each simple command; variables that are set before one and redirections are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"&&|;|\|", re.sub(r"\s#.*", "", line)):
            words = shlex.split(part)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def check_fastppo(words, folder, monkeypatch):
    """Parse and check the configuration as the command does, then stop."""
    seen = []

    def stop(config, *_, **__):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastppo.training.trainer.Trainer", stop)
    monkeypatch.setattr("fastppo.training.evaluate.evaluate_policy", stop)
    words = [str(folder / word) if word == "CONFIG.yaml" else word for word in words]
    status = cli.main(words)
    assert status == (130 if words[0] in ("train", "eval") else 0)
    assert all(isinstance(config, Config) for config in seen)


def check_python(words):
    if words[0] == "-m":
        name, options = words[1], words[2:]
        if name == "pip":
            return check_pip(options)
        source = ROOT / "kernels" / f"{name.replace('.', '/')}.py"
    else:
        source, options = ROOT / words[0], words[1:]
    text = source.read_text(encoding="utf-8")
    for option in options:
        assert not option.startswith("--") or f'"{option.partition("=")[0]}"' in text, f"{source.name} has no {option}"


def check_pip(words):
    assert words[0] in ("install", "download"), words
    extras = set(re.findall(r"\[(\w+)\]", " ".join(words)))
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    constraints = (ROOT / "constraints.txt").read_text()
    for name, version in (word.split("==") for word in words if "==" in word):
        pinned = re.search(rf"^{name}==(.*)$", constraints, re.MULTILINE)
        assert pinned is None or pinned[1] == version, f"{name}: constraints.txt has {pinned[1]}"


def check_pytest(words):
    for word in words:
        assert word.startswith("-") or not word.startswith(("tests", "benchmarks")) or (ROOT / word).exists(), word


@pytest.mark.parametrize("block", cases("bash"))
def test_commands_parse(block, folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for words in commands(block.text):
        program, rest = words[0], words[1:]
        if program == "fastppo":
            check_fastppo(rest, folder, monkeypatch)
        elif program in ("python", "python3"):
            check_python(rest)
        elif program == "pip":
            check_pip(rest)
        elif program == "pytest":
            check_pytest(rest)
        elif program == "bash":
            assert (ROOT / rest[0]).exists()
        elif program == "export":
            assert all(importlib.util.find_spec(word.partition("=")[2]) for word in rest)
        elif program != "cd":
            assert shlex.join(words) in ci, f"{block.name}: {shlex.join(words)} is not checked; mark the block"


# ---- names ----------------------------------------------------------------------------------------------------------

PATH = re.compile(r"(?<![\w/.-])((?:fastppo|kernels|csrc|tests|benchmarks|docs|examples)/[\w/.-]*\w|\.ci/run)")
SECTIONS = "model|distributed|data|rollout|reinforce|actor_critic|ppo|trpo|npg|cpi|optim|eval|checkpoint|watch"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "LOG.md":  # it names what is gone; its links still lead somewhere
        text = "\n".join(re.findall(r"\]\([^)]*\)", text))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, section = target.partition("#")
            linked = (path.parent / file) if file else path
            assert linked.exists(), f"{path.name}: {target}"
            assert not section or section in anchors(linked), f"{path.name}: {target}"
    outside = FENCE.sub("", text)
    for name in re.findall(r"`([^`\n]+)`", outside):
        for file in PATH.findall(name):
            assert (ROOT / file).exists(), f"{path.name}: {file}"
        if re.fullmatch(rf"({SECTIONS})\.[a-z_.]+", name):
            functools.reduce(getattr, name.split("."), Config())


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
