"""The `fastppo` command: exit codes, one clear line for whatever is wrong, and the README's own words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastppo.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, ROOT / "examples" / "make_tiny_run.py", folder], check=True, capture_output=True)
    return folder


def test_train_eval_and_resume(tiny, tmp_path, capsys):
    config, out = str(tiny / "config.yaml"), str(tmp_path / "run")
    assert main(["train", config, "--output_dir", out, "--total_steps", "2", "--tensorboard", "false"]) == 0
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
    arguments = ["--output_dir", out, "--total_steps", "3", "--tensorboard", "false", "--resume"]
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
        (["--=x"], 2, "'--=x': expected --section.key value"),
        (["--"], 2, "'--': expected --section.key value"),
        (["--rollout.temperature", "1e-300"], 1, "the policy's probabilities are not finite"),
    ],
)
def test_what_is_wrong_is_one_line(tiny, tmp_path, capsys, words, status, message):
    if "--output_dir" not in words:
        words = ["--output_dir", str(tmp_path / "run"), *words]
    assert main(["train", str(tiny / "config.yaml"), *words]) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastppo: ")
    assert message in error
    assert "\n" not in error


def test_missing_config(capsys):
    assert main(["train", "nothing.yaml"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err


def test_doctor_says_when_the_cpu_backend_is_slow(capsys, monkeypatch):
    monkeypatch.setattr("fastppo.engines.cpu.products.PRODUCTS", ())
    monkeypatch.setattr("fastppo.doctor.unusable", lambda name, device: None)
    assert main(["doctor"]) == 0
    assert "at the speed of chunked: this PyTorch does not export" in capsys.readouterr().out


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
        (["eval", "c.yaml", "--samples", "-1"], "--samples must be at least 0, got -1"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "fastppo" in capsys.readouterr().out
