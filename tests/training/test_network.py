"""No process reaches the network unless the configuration allows downloads, not even through a library's import."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from tiny import make_tiny_model

from fastppo.models.adapters import apply_lora
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.load import load_pretrained
from fastppo.models.source import ModelSource, hub_offline
from fastppo.training.config import OptimConfig
from fastppo.training.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[2]

ASKS = """
from huggingface_hub import constants
offline = constants.HF_HUB_OFFLINE  # what `kernels` looks at when bitsandbytes asks it for native code
"""


@pytest.mark.parametrize("users", [False, True])
def test_libraries_are_imported_with_the_hub_out_of_reach(tmp_path, monkeypatch, users):
    (tmp_path / "bitsandbytes.py").write_text(
        f"{ASKS}\nclass optim:\n    AdamW8bit = staticmethod(lambda groups, **options: offline)"
    )
    (tmp_path / "peft.py").write_text(
        f"{ASKS}\nLoraConfig = dict\nclass Wrapped:\n    eval = staticmethod(lambda: offline)\n"
        "get_peft_model = lambda model, adapters: Wrapped"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", users)
    monkeypatch.setattr("fastppo.models.adapters.check_head", lambda model, padding: None)  # it would be given no model
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bitsandbytes", "peft"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    class Auto:
        @staticmethod
        def from_pretrained(path, **arguments):
            return constants.HF_HUB_OFFLINE

    assert build_optimizer(OptimConfig(name="adamw_8bit"), [], [])
    assert apply_lora(torch.nn.Identity(), LoraConfig())
    assert load_pretrained(Auto, ModelSource("m", None), ModelConfig())
    assert load_pretrained(Auto, ModelSource("m", None), ModelConfig(allow_download=True)) == users
    assert users == constants.HF_HUB_OFFLINE
    for name in ("bitsandbytes", "peft"):
        sys.modules.pop(name)


def test_threads_leave_the_setting_as_it_was():
    """The second comes while the first is inside, and leaves after it."""
    came, left, seen = threading.Event(), threading.Event(), []

    def second():
        came.set()
        with hub_offline(), hub_offline():
            left.wait(10)
            seen.append(constants.HF_HUB_OFFLINE)

    before, thread = constants.HF_HUB_OFFLINE, threading.Thread(target=second)
    with contextlib.suppress(KeyError), hub_offline():
        thread.start()
        came.wait()
        thread.join(0.05)
        raise KeyError
    left.set()
    thread.join()
    with hub_offline(False):
        seen.append(constants.HF_HUB_OFFLINE)
    assert seen == [True, before]
    assert before == constants.HF_HUB_OFFLINE


RUN = """
import os, sys


def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(99)  # an exception would be caught by what asked


sys.addaudithook(forbid)
from fastppo.cli import main
for command in (["doctor"], ["eval", "config.yaml"], ["train", "config.yaml"]):
    if status := main(command):
        sys.exit(status)
"""


@pytest.mark.slow
def test_a_run_an_evaluation_and_the_doctor_open_no_socket(tmp_path):
    """With all that imports bitsandbytes: LoRA, weights in 4 bits and an optimizer in 8 bits."""
    pytest.importorskip("peft")
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"The number {i}"}) for i in range(8)))
    (tmp_path / "reward.py").write_text("def short(completions):\n    return [-len(text) for text in completions]")
    tree = {
        "output_dir": str(tmp_path / "run"),
        "total_steps": 1,
        "report_to": "none",
        "model": {"name_or_path": str(model), "lora": {"r": 2}, "quantization": "nf4"},
        "data": {"train": str(tmp_path / "prompts.jsonl"), "eval_size": 2},
        "rewards": [{"name": "short", "function": f"{tmp_path / 'reward.py'}:short"}],
        "rollout": {"num_prompts": 2, "max_new_tokens": 4},
        "optim": {"name": "adamw_8bit"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final").exists()
