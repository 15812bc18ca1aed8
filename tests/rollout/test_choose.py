"""Which engine a run gets, and that `fastppo doctor` says so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import build_changed_config, make_tiny_model, metrics_of

from fastppo.cli import main
from fastppo.rollout import choose
from fastppo.rollout.choose import auto, open_engine
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.continuous import ContinuousEngine
from fastppo.rollout.engine import EngineError
from fastppo.rollout.generate import TransformersEngine
from fastppo.rollout.loop import LoopEngine
from fastppo.training.trainer import Trainer

transformers = pytest.importorskip("transformers", minversion="5.17")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def llama(dtype: torch.dtype = torch.bfloat16):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, **sizes)).to(dtype).eval()


def mamba():
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config).bfloat16().eval()


def without_vllm():
    raise EngineError("rollout.engine: vllm needs vLLM; pip install it")


@pytest.fixture(params=[True, False], ids=["with vLLM", "without"])
def installed(request, monkeypatch):
    monkeypatch.setattr(choose, "check_vllm", (lambda: None) if request.param else without_vllm)
    return request.param


def test_auto_takes_the_fastest_that_fits(installed):
    """The models stay on the CPU, where the probe of continuous batching runs as well."""
    assert auto(CPU, llama())[0] == auto(CPU)[0] == "loop"
    name, why = auto(CPU, mamba())
    assert (name, why) == ("transformers", "loop cannot be used: it does not know how this model keeps its states")
    if installed:
        assert auto(GPU)[0] == auto(GPU, mamba())[0] == "vllm"
        return
    assert auto(GPU) == ("continuous", "vllm cannot be used: vllm needs vLLM; pip install it")
    assert auto(GPU, llama())[0] == "continuous"
    assert auto(GPU, llama(torch.float32))[0] == "transformers"
    assert "float32" in auto(GPU, llama(torch.float32))[1]
    name, why = auto(GPU, mamba())
    assert name == "transformers"
    assert "continuous cannot be used: this model keeps other states" in why


def test_auto_takes_vllm_only_with_memory_that_is_its_own(installed, monkeypatch):
    monkeypatch.setattr(choose, "VLLMEngine", lambda *args, **options: "vLLM")
    assert type(open_engine(llama(), RolloutConfig(), GPU)) is ContinuousEngine
    assert (open_engine(llama(), RolloutConfig(), GPU, gpu_memory_utilization=0.3) == "vLLM") == installed


def test_an_engine_by_name():
    for name, kind in (("loop", LoopEngine), ("transformers", TransformersEngine), ("continuous", ContinuousEngine)):
        assert type(open_engine(llama(), RolloutConfig(engine=name), CPU)) is kind
    for policy, device, name, message in (
        (llama(), GPU, "loop", "it samples on a CPU, this is cuda:0"),
        (mamba(), CPU, "loop", "it does not know how this model keeps its states"),
        (mamba(), CPU, "continuous", "this model keeps other states"),
    ):
        with pytest.raises(EngineError, match=rf"^rollout.engine: {name} cannot be used: {message}.*; set it to auto$"):
            open_engine(policy, RolloutConfig(engine=name), device)


def test_doctor_says_which_and_why(installed, monkeypatch, capsys):
    properties = SimpleNamespace(name="A100", total_memory=2**36, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr("fastppo.doctor.unusable", lambda name, device: "not asked")
    monkeypatch.setattr("fastppo.doctor.select", lambda op, device, dtype: "chunked")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.partition("Rollouts (rollout.engine)\n")[2]
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert [name for name, _ in lines] == [*choose.NAMES, "auto"] * 2
    cpu, gpu = dict(lines[:5]), dict(lines[5:])
    assert cpu["vllm"] == ("usable on cpu" if installed else "unusable on cpu: vllm needs vLLM; pip install it")
    assert cpu["auto"].startswith("-> loop: ")
    assert gpu["loop"] == "unusable on cuda:0: it samples on a CPU, this is cuda:0"
    expected = "vllm: the fastest here" if installed else "continuous: vllm cannot be used: vllm needs vLLM"
    assert gpu["auto"].startswith(f"-> {expected}")


def early(completion_ids):
    return [sum(token < 150 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    path = make_tiny_model(folder / "model") / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(2, 30))}))
    (folder / "prompts.txt").write_text("\n".join(f"The number {i} is {'very ' * (i % 3)}" for i in range(40)))
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 2,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.txt"), "eval_size": 0},
        "rewards": [{"name": "early", "function": f"{__file__}:early"}],
        "rollout": {"num_prompts": 8, "num_generations": 4, "max_new_tokens": 12, "engine": "continuous"},
        "optim": {"learning_rate": 3e-3},
        "checkpoint": {"every": 0},
    }
    return build_changed_config(tree, changes)


@pytest.mark.usefixtures("no_report")
def test_a_run_samples_from_the_policy_as_it_is(world, tmp_path):
    Trainer(config(world, tmp_path / "out")).train()
    rows = [row for row in metrics_of(tmp_path / "out") if "rollout/logprob_gap_max" in row]
    assert len(rows) == 2
    for row in rows:
        assert max(abs(row[f"rollout/logprob_gap_{name}"]) for name in ("min", "mean", "max")) < 2e-5


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr("fastppo.training.trainer.write_report", lambda folder: folder / "report.html")


@pytest.mark.slow
def test_on_two_ranks_with_a_sharded_policy(world, tmp_path):
    from ranks import run_ranks

    run_ranks(2, _train, config(world, tmp_path / "out", distributed__strategy="fsdp2"), seconds=200)
    rows = [row for row in metrics_of(tmp_path / "out") if "rollout/logprob_gap_max" in row]
    assert len(rows) == 2
    assert max(abs(row["rollout/logprob_gap_max"]) for row in rows) < 2e-5


def _train(config):
    from fastppo.training import trainer

    trainer.write_report = lambda folder: folder / "report.html"
    Trainer(config).train()
