"""The `fastppo` command: exit codes, one clear line for whatever is wrong, and the README's own words."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastppo.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(ROOT / "examples" / "make_tiny_run.py"))["main"](folder)
    return folder


@pytest.mark.slow
def test_train_eval_and_resume(tiny, tmp_path, capsys):
    config, out = str(tiny / "config.yaml"), str(tmp_path / "run")
    assert main(["train", config, "--output_dir", out, "--total_steps", "2", "--report_to", "none"]) == 0
    printed = capsys.readouterr().out
    assert "step=2/2" in printed
    assert f"policy: {out}/final" in printed
    assert main(["eval", config, "--model", f"{out}/final", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["metrics"]) >= {"eval/reward", "eval/vowels", "eval/kl", "eval/length"}
    assert len(result["samples"]) == 8
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["metrics"]["eval/reward"] == pytest.approx(last["eval/reward"])
    assert main(["eval", config, "--backend", "triton", "--device", "cpu"]) == 2
    assert "'triton' cannot be used" in capsys.readouterr().err
    assert main(["eval", config, "--model", f"{out}/final", "--samples", "2"]) == 0
    assert len(re.findall(r"^[+-]\d", capsys.readouterr().out, re.M)) == 2
    # Again into the same folder, and with another configuration: refused; longer: goes on.
    assert main(["train", config, "--output_dir", out]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["train", config, "--output_dir", out, "--resume", "--ppo.gamma", "0.5"]) == 1
    assert "ppo.gamma was 1.0, is now 0.5" in capsys.readouterr().err
    arguments = ["--output_dir", out, "--total_steps", "3", "--report_to", "none", "--resume"]
    assert main(["train", config, *arguments]) == 0
    assert "step=3/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--ppo.kl_coeff", "1"], 2, "ppo.kl_coeff: unknown key; did you mean 'ppo.kl_coef'?"),
        (["--model.name_or_path", "/no/model"], 1, "/no/model"),
        (["--model.name_or_path", "package:llm_smollm3/x.gguf"], 1, "llm_smollm3"),
        (["--data.train", "/no/prompts.jsonl"], 1, "/no/prompts.jsonl"),
        (["--rewards.0.function", "nowhere:f"], 1, "vowels"),
        (["--output_dir", "/proc/x"], 2, "output_dir"),
        (["--device", "quantum"], 2, "device"),
        (["--report_to", "wandbb"], 2, "tensorboard, trackio, wandb, mlflow; did you mean 'wandb'?"),
        (["--tensorboard", "false"], 2, "tensorboard: replaced by report_to; write `report_to: tensorboard` for true"),
        (["--=x"], 2, "'--=x': expected --section.key value"),
        (["--"], 2, "'--': expected --section.key value"),
        (["--resum"], 2, "--resum: needs a value"),
        (["--seed", "--device", "cpu"], 2, "--seed: needs a value"),
        (["--\udcff", "1"], 2, "fastppo: input should be a valid string"),
        (["--report_to", "[wandb, wandb]"], 2, "report_to: the same tracker is given twice in ['wandb', 'wandb']"),
        (["--rewards.0.function", ""], 2, "rewards.0.function: string should have at least 1 character"),
        (["--rollout.temperature", "1e-300"], 2, "rollout.temperature: input should be greater than or equal to 1e-10"),
        (["--output_dir", "~nosuchuser/x"], 2, "output_dir: there is no such user, got '~nosuchuser/x'"),
        (["--output_dir", "a\0b"], 2, "output_dir: expected text without NUL"),
        (["--output_dir", "x" * 5000], 2, "cannot be written to (File name too long)"),
        (["--data.train", "\ud83d.jsonl"], 2, "data.train: expected text without NUL characters and halves"),
        (["--data.eval", "/dev/null"], 1, "/dev/null: expected .jsonl, .csv, .txt or a folder"),
        (["--eval.perplexity", "/no/texts"], 1, "eval.perplexity: /no/texts cannot be read as text (No such file"),
        (["--eval.rewards", "[{name: x, function: 'no.py:f'}]"], 1, "reward 'x': no.py: no such file"),
        (["--rewards.0.function", "a..b:f"], 1, "reward 'vowels': 'a..b:f' is not vader_sentiment"),
        (["--rewards.0.function", "__main__:no_such_function"], 1, "no function 'no_such_function' in __main__"),
        (["--rewards.0.function", "os:nothing"], 1, "no function 'nothing' in os; it has GenericAlias, "),
        (["--model.name_or_path", "package:__main__/x"], 1, "__main__ is a module without files"),
        (["--model.lora.target_modules", "["], 1, "'[' is not a regular expression"),
        (["--model.lora.target_modules", "(" * 5000], 1, "is not a regular expression"),
        (["--rollout.num_prompts", "1" + "0" * 12], 2, "rollout: 2000000000000 sequences"),
        (["--total_steps", "9" * 5000], 2, "total_steps: "),
        (["--total_steps", "x" * 10**6], 2, "...xxxx"),
        (["--" + "a." * 5000, "1"], 2, "unknown key"),
        (["--ppo.kl_coef", "1.0e+300"], 2, "ppo.kl_coef: input should be less than"),
    ],
)
def test_what_is_wrong_is_one_line(tiny, tmp_path, capsys, words, status, message):
    if "--output_dir" not in words:
        words = ["--output_dir", str(tmp_path / "run"), *words]
    assert main(["train", str(tiny / "config.yaml"), *words]) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastppo: ")
    assert message in error
    assert error.isprintable()
    assert len(error) < 500
    assert not Path("~nosuchuser").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.prompt_column", "promt"], "no column 'promt'; did you mean 'prompt'?"),
        (["--data.eval_size", "64"], "leaves none to train on"),
        (["--rollout.max_new_tokens", "128"], "context of 128 tokens leaves no room"),
        (["--rewards.0.function", "math:isclose"], "its function needs 'a'"),
        (["--eval.perplexity", "/dev/zero"], "/dev/zero cannot be read as text (a device, not a file)"),
        (["--model.lora.r", "4"], "model.lora needs peft; pip install "),
        (["--optim.name", "adamw_8bit"], "adamw_8bit needs bitsandbytes; pip install "),
        (["--optim.name", "paged_adamw_8bit"], "paged_adamw_8bit needs bitsandbytes; pip install "),
        (["--rewards.0.function", "vader_sentiment"], "needs vaderSentiment; pip install "),
        (["--data.train", "examples"], "needs the package datasets; pip install "),
    ],
)
def test_mistakes_are_told_before_weights_are_read(tiny, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    for package in ("peft", "bitsandbytes", "vaderSentiment", "vaderSentiment.vaderSentiment", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("fastppo.training.trainer.PolicyModels", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["train", str(tiny / "config.yaml"), "--output_dir", str(tmp_path), *words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


class Odd(BaseException):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "message", "left"),
    [
        (KeyError("x"), "unexpected error, which is a bug in fastppo: KeyError: 'x'; please report it with {}", True),
        (Odd(), "unexpected error, which is a bug in fastppo: Odd: Odd; please report it with {}", True),
        (OSError(28, "No space left on device"), "{}: No space left on device", False),
        (OSError(28, "No space left on device", "a file"), "a file: No space left on device", False),
        (ValueError("I/O error: File too large (os error 27)"), "{}: I/O error: File too large (os error 27)", False),
        (OSError("a library's text"), "a library's text", False),
        (MemoryError(), "out of memory in phase `load` (MemoryError); planned were", False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't\nallocate"),
            "out of memory in phase `load` ([enforce",
            False,
        ),
        (ImportError("needs a package"), "needs a package", False),
    ],
)
def test_an_error_that_nobody_foresaw(tiny, tmp_path, capsys, monkeypatch, error, message, left):
    def failing(*_):
        raise error

    monkeypatch.setattr("fastppo.training.evaluate.evaluate_policy", failing)
    assert main(["eval", str(tiny / "config.yaml"), "--output_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"fastppo: {message.format(tmp_path)}")
    assert printed.count("\n") == 1
    trace = tmp_path / "traceback.txt"
    assert trace.exists() == left
    assert not left or "in failing" in trace.read_text()


def test_ctrl_c(tiny, capsys, monkeypatch):
    monkeypatch.setattr("fastppo.training.config.load_config", raising(KeyboardInterrupt()))
    assert main(["train", str(tiny / "config.yaml")]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [("KeyboardInterrupt", 130, ""), ("ImportError('its library is broken')", 1, "fastppo: its library is broken\n")],
)
def test_one_of_several_processes_fails_while_it_imports_torch(tmp_path, error, status, message):
    (tmp_path / "torch.py").write_text(f"raise {error}")  # and again if what handles the error imports it
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "fastppo", "train", "config.yaml"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, message)


def raising(error):
    def function(*_):
        raise error

    return function


def test_standard_output_of_every_kind(tiny, capsys, monkeypatch):
    rows = [{"reward": 1.0, "prompt": "é", "completion": "😀\ud83d"}]
    monkeypatch.setattr("fastppo.training.evaluate.evaluate_policy", lambda *_: ({"eval/reward": 1.0}, rows))
    command = ["eval", str(tiny / "config.yaml")]
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert main(command) == main([*command, "--json"]) == 0
    assert b"'\\xe9' -> '\\U0001f600\\ud83d'" in plain.buffer.getvalue()
    monkeypatch.setattr(sys, "stdout", None)  # closed
    assert main(command) == 0
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(command) == 1
        assert capsys.readouterr().err == "fastppo: standard output: No space left on device\n"
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["train", "nothing.yaml"]) == 2


@pytest.mark.parametrize("library", ["rich", "jinja2", "matplotlib"])
def test_a_missing_library_is_named_before_anything_is_loaded(tiny, capsys, monkeypatch, library):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    assert main(["train", str(tiny / "config.yaml")]) == 1
    assert re.fullmatch(rf"fastppo: {library} missing; pip install .*\[train\]\"\n", capsys.readouterr().err)


def test_missing_config(capsys):
    assert main(["train", "nothing.yaml"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err


def test_doctor_says_when_the_cpu_backend_is_slow(capsys, monkeypatch):
    monkeypatch.setattr("fastppo.engines.cpu.products.PRODUCTS", ())
    monkeypatch.setattr("fastppo.doctor.unusable", lambda name, device: None)
    assert main(["doctor"]) == 0
    assert "at the speed of chunked: this PyTorch does not export" in capsys.readouterr().out


def test_doctor_says_why_the_kernels_are_not_the_default_on_a_chip(capsys, monkeypatch):
    monkeypatch.delenv("FASTPPO_BACKEND", raising=False)
    properties = types.SimpleNamespace(name="A100", total_memory=2**36, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("fastppo.engines.triton_kernels.why_unusable", lambda device, dtype: None)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "usable on cuda:0, but by name alone" in printed
    assert "linear_ppo_loss    -> chunked" in printed.partition("cuda:0, but by name alone")[2]


def test_doctor_and_keys(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "linear_ppo_loss" in printed
    assert main(["keys"]) == 0
    printed = capsys.readouterr().out
    assert "ALGORITHM.kl_coef: 0.05 (float)" in printed
    assert main(["keys", "ppo"]) == 0
    printed = capsys.readouterr().out
    assert "ppo.kl_coef: 0.05 (float)" in printed
    assert "nats a completion" in printed  # the keys' help texts
    assert "trpo." not in printed
    assert main(["keys", "pppo"]) == 2
    assert capsys.readouterr().err == "fastppo: pppo: no such section or key; did you mean 'ppo'?\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["doctor", "keys"])
def test_a_page_whose_reader_has_seen_enough(command):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "fastppo", command], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_keys_need_no_datasets(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["keys", "data"]) == 0
    assert "data.train: required (str)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keys", "ppo", "--ppo.gamma", "1"], "unrecognized arguments: --ppo.gamma 1"),
        (["keys", "ppo", "x" * 5000], "unrecognized arguments: xxx"),
        (["x" * 5000], "invalid choice: 'xxx"),
        (["eval", "c.yaml", "--samples", "-1"], "--samples must be at least 0, got -1"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 600


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "fastppo" in capsys.readouterr().out


def test_streams_that_somebody_closed(monkeypatch):
    for name in ("stdout", "stderr"):
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, name, closed)
    assert main(["keys", "ppo"]) == 1
    assert main(["keys", ""]) == 2


def test_a_full_disk_takes_no_help(monkeypatch, capsys):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
    assert stop.value.code == 1
    assert "standard output: No space left on device" in capsys.readouterr().err


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "fastppo: the current folder is gone; change to one that exists\n"
