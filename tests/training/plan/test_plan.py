"""`fastppo plan`: arithmetic and tracing, on tiny models and on those of 8B."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import build_changed_config, make_tiny_model
from torch import nn

from fastppo.algorithms import ALGORITHMS
from fastppo.cli import main
from fastppo.errors import ConfigError
from fastppo.models.source import ModelError
from fastppo.training.plan import Machine, machine_of, page, plan
from fastppo.training.plan import trace as tracing
from fastppo.training.plan.live import LiveBytes
from fastppo.training.plan.page import gib
from fastppo.training.plan.phases import memory_of, shape_of
from fastppo.training.plan.report import out_of_memory
from fastppo.training.plan.skeleton import Quantized
from fastppo.training.plan.trace import trace
from fastppo.training.scoring import Scorer

ROOT = Path(__file__).parents[3]
GPU = Machine("cuda", 24 * 2**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Only its configuration is left."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), layers=6, vocab_size=331)
    (folder / "model.safetensors").unlink()
    return folder


def config(model: Path, **changes):
    tree = {
        "model": {"name_or_path": str(model)},
        "data": {"train": "nowhere.jsonl", "max_prompt_length": 20},
        "rewards": [{"name": "r", "function": "nowhere:r"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 12},
    }
    return build_changed_config(tree, changes)


def test_live_bytes_are_those_of_storages_that_are_still_there():
    kept = torch.zeros(10)
    with LiveBytes([kept]) as live:
        live.mark("a")
        x = kept + 1  # 40 bytes
        y = (kept * 2).view(5, 2)  # 40 bytes, once
        del x
        live.mark("b")
        kept.add_(y.view(10))
        del y
        live.mark("c")
    assert [live.peaks[name].first.total for name in "abc"] == [80, 40, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__autocast": "bfloat16", "model__value_model": "separate"},
        {"model__lora": {"r": 3}, "model__gradient_checkpointing": True},
        {"model__lora": {"r": 3}, "model__quantization": "nf4", "model__value_model": "adapter"},
    ],
    ids=["all parameters", "separate critic", "adapters", "nf4"],
)
def test_two_depths_tell_of_any(model, changes):
    given = config(model, **changes)
    algorithm = ALGORITHMS["ppo"](given.ppo)
    shape = shape_of(given, 1)
    two, three, six = (
        trace(given, algorithm, shape, depth, "cpu", sharded=False, engine="loop") for depth in (2, 3, None)
    )
    told = two.at(2, three, 6)
    assert told.sizes == six.sizes
    assert told.cache == six.cache
    for phase, moments in told.moments.items():
        for moment, peak in moments.items():
            assert peak.first.total == pytest.approx(six.moments[phase][moment].first.total, rel=0.01), (phase, moment)
        largest = max(peak.first.total for peak in six.moments[phase].values())
        assert max(peak.first.total for peak in moments.values()) == pytest.approx(largest, rel=0.01)


def test_a_quantized_layer_takes_what_that_of_bitsandbytes_takes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from fastppo.models.quantize import quantize_

    dense = nn.Linear(96, 64 * 11, bias=False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.embeddings = nn.Linear(96, 64 * 11, bias=False), nn.Embedding(5, 96)

        def get_input_embeddings(self):
            return self.embeddings

        def get_output_embeddings(self):
            return None

    real = Model()
    quantize_(real, device=torch.device("cpu"), compute_dtype=torch.float32)
    weight = real.layer.weight
    assert isinstance(real.layer, bitsandbytes.nn.Linear4bit)
    state = weight.quant_state
    tensors = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    taken = sum(t.numel() * t.element_size() for t in tensors)
    planned = Quantized(dense.to("meta"), torch.float32)
    assert sum(t.numel() * t.element_size() for t in (planned.weight, planned.scales)) == taken


@pytest.mark.slow
def test_keys_lower_what_they_are_for(model):
    def peaks(**changes):
        return {phase.name: phase for phase in memory_of(config(model, **changes), GPU).phases}

    plain, separate = peaks(), peaks(model__value_model="separate")
    assert peaks(model__gradient_checkpointing=True)["policy update"].total < plain["policy update"].total
    assert peaks(model__activation_offloading=True)["policy update"].total < plain["policy update"].total
    assert peaks(batch__max_tokens=32)["policy update"].total < plain["policy update"].total
    assert peaks(rollout__generation_batch_size=1)["rollout"].total < plain["rollout"].total
    eighth = peaks(optim__name="adamw_8bit")["optimizer step"].kinds["optimizer"]
    assert eighth < plain["optimizer step"].kinds["optimizer"]
    assert peaks(optim__name="paged_adamw_8bit")["optimizer step"].kinds["optimizer"] == 0
    parked = peaks(model__value_model="separate", model__offload_idle=True)
    assert parked["rollout"].kinds["weights"] < separate["rollout"].kinds["weights"]


@pytest.mark.slow
def test_the_largest_budget_fits_and_a_twentieth_more_does_not(model):
    given = config(model, rollout__num_prompts=4096)
    machine = Machine("cuda", int(1.2 * 2**30))
    most = plan(given, machine).most_tokens
    assert 0 < most < 4096 * 32
    for rows, fits in ((most // 32, True), (most // 32 * 21 // 20 + 1, False)):
        assert (memory_of(given, machine, rows=rows).peak.total <= machine.memory) == fits


def test_the_page_has_the_verdict_first_and_marks_the_peak(model):
    text = page(plan(config(model), Machine("cuda", 2**29)))
    lines = text.splitlines()
    assert lines[0].startswith("does not fit: needs")
    assert sum("<- peak" in line for line in lines) == 1
    assert page(plan(config(model), GPU)).startswith("fits: needs")


def test_plans_that_differ_in_one_key_trace_only_what_depends_on_it(model, monkeypatch):
    moments, traced = tracing._moments, []
    changes = {"rollout__max_new_tokens": 13, "model__value_model": "separate"}  # of no other test
    monkeypatch.setattr(tracing, "_moments", lambda models, run: traced.append(run) or moments(models, run))
    first = memory_of(config(model, **changes), GPU)
    assert len(traced) == 2 * 4
    assert memory_of(config(model, **changes), GPU) == first
    memory_of(config(model, optim__name="paged_adamw_8bit", **changes), GPU)
    assert len(traced) == 2 * 4
    memory_of(config(model, rollout__generation_batch_size=2, **changes), GPU)
    assert len(traced) == 2 * 5


def test_a_configuration_that_was_changed_is_traced_anew(model, tmp_path):
    file, tree = tmp_path / "config.json", json.loads((model / "config.json").read_text())
    peaks = []
    for width in (tree["intermediate_size"], 5 * tree["intermediate_size"]):
        file.write_text(json.dumps(tree | {"intermediate_size": width}))
        peaks.append(memory_of(config(tmp_path), GPU).phases[3])  # the policy's update
    assert peaks[1].kinds["weights"] > peaks[0].kinds["weights"]
    assert peaks[1].kinds["activations"] > peaks[0].kinds["activations"]


@pytest.mark.slow
def test_the_pass_that_scores_is_kept_by_one_process_only(model):
    lora = {"model__lora": {"r": 3}}
    alone = memory_of(config(model, **lora), Machine("cpu", 2**34)).phases[2]
    one_of_two = memory_of(config(model, rollout__num_prompts=8, **lora), Machine("cpu", 2**34, 2)).phases[2]
    assert one_of_two.kinds["activations"] < 0.7 * alone.kinds["activations"]


def test_each_engine_has_its_own_rollout(model):
    def rollout(machine=GPU, **changes):
        memory = memory_of(config(model, model__dtype="bfloat16", **changes), machine)
        return memory.engine, next(phase for phase in memory.phases if phase.name == "rollout")

    engine, pages = rollout()
    assert engine == "continuous"
    sizes = json.loads((model / "config.json").read_text())
    width = sizes["hidden_size"] // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    # 32 sequences of an evaluation, each of 32 tokens: one page, and one that it may leave unused.
    assert pages.kinds["KV cache"] == 32 * 64 * 2 * sizes["num_hidden_layers"] * width * 2
    assert memory_of(config(model), GPU).engine == "transformers"
    assert rollout(Machine("cpu", 2**34))[0] == "loop"
    with pytest.raises(ConfigError, match="loop samples on a CPU, and this is planned for a GPU"):
        rollout(rollout__engine="loop")
    long = {"data__max_prompt_length": 48, "rollout__num_prompts": 16}  # 32 prompts, of which 21 are read at a time
    at_once, in_parts = (rollout(rollout__engine=name, **long)[1] for name in ("transformers", "continuous"))
    assert in_parts.moments["first layer"] < at_once.moments["first layer"] + in_parts.kinds["KV cache"]


def test_an_evaluation_may_sample_more_than_a_step(model):
    given = {"eval__num_prompts": 20, "rollout__generation_batch_size": 16}
    assert shape_of(config(model), 1).sampled == 32  # held out by default
    assert shape_of(config(model, data__eval_size=0), 1).sampled == 8
    assert shape_of(config(model, **given), 1)[4:6] == (16, 16)
    assert shape_of(config(model, **given), 2)[4:6] == (10, 10)


def test_under_torchrun_the_first_process_plans_for_all(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text(
        json.dumps({
            "model": {"name_or_path": str(model), "lora": {"r": 3}},
            "data": {"train": "x"},
            "rewards": [{"name": "r", "function": "f:r"}],
        })
    )  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("advise", "_most_tokens"):  # take most of the time
        monkeypatch.setattr(sys.modules["fastppo.training.plan.plan"], name, lambda *_: [])
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert main(["plan", str(tmp_path / "run.yaml"), "--gpu-memory", "24"]) == 0
        out = capsys.readouterr().out
        assert out == "" if rank == "1" else " for each of 2 processes\n" in out


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "llama", "num_hidden_layers": 0},
        {"model_type": "mamba", "num_hidden_layers": 2, "time_step_rank": 4},
        {"model_type": "vit"},
    ],
    ids=lambda architecture: architecture["model_type"],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(tmp_path, architecture):
    sizes = {"hidden_size": 32, "vocab_size": 99, "num_attention_heads": 4, "intermediate_size": 40}
    (tmp_path / "config.json").write_text(json.dumps(architecture | sizes))
    with pytest.raises(ModelError, match=r"a pass of it cannot be planned|no model can be made of its configuration"):
        memory_of(config(tmp_path), GPU)


@pytest.mark.parametrize("phase", ["score", "update"])
def test_out_of_memory_says_what_was_planned(model, phase, monkeypatch):
    monkeypatch.setattr("fastppo.training.plan.report.advise", lambda *_: [])
    error = torch.OutOfMemoryError("CUDA out of memory")
    error.phase = phase
    text = out_of_memory(error, config(model))
    phases = {p.name: p for p in memory_of(config(model), machine_of(config(model), None, 1)).phases}
    planned = gib(phases["policy update" if phase == "update" else phase].total)
    assert text.startswith(f"out of memory in phase `{phase}` (CUDA out of memory); planned were {planned} of ")


def test_a_run_out_of_memory_keeps_its_completed_steps(tmp_path, monkeypatch, capsys):
    """The allocator's own error, in the second step."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The movie"}\n' * 4)
    (tmp_path / "reward.py").write_text("def length(completions):\n    return [len(text) for text in completions]\n")
    (tmp_path / "run.yaml").write_text(
        json.dumps({
            "output_dir": str(tmp_path / "run"),
            "total_steps": 3,
            "report_to": "none",
            "model": {"name_or_path": str(make_tiny_model(tmp_path / "model"))},
            "data": {"train": str(tmp_path / "prompts.jsonl"), "eval_size": 0},
            "rewards": [{"name": "r", "function": f"{tmp_path / 'reward.py'}:length"}],
            "rollout": {"num_prompts": 2, "max_new_tokens": 3},
            "checkpoint": {"every": 0},
        })
    )  # fmt: skip
    scores, calls = Scorer.score, []

    def score(*args, **kwargs):
        calls.append(0)
        return torch.empty(2**50) if len(calls) == 2 else scores(*args, **kwargs)

    monkeypatch.setattr(Scorer, "score", score)
    monkeypatch.setattr("fastppo.training.plan.report.advise", lambda *_: [])
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("memory: ")
    error = captured.err.splitlines()[-1]
    assert error.startswith("fastppo: out of memory in phase `score` (")
    assert "you tried to allocate 4503599627370496 bytes" in error
    assert "planned were" in error
    assert "try a smaller model" in error
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000001"]


def test_without_a_configuration_there_is_no_plan(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(plan.__globals__, "advise", lambda *_: [])
    (tmp_path / "run.yaml").write_text(
        "model: {name_or_path: nobody/nothing}\ndata: {train: x.jsonl}\nrewards: [{name: r, function: f:r}]\n"
    )
    assert main(["plan", str(tmp_path / "run.yaml"), "--gpu-memory", "24"]) == 1
    error = capsys.readouterr().err
    assert "nobody/nothing: neither a folder here nor a model" in error
    assert error.count("\n") == 1
    assert main(["plan", str(tmp_path / "run.yaml"), "--model.name_or_path", str(model)]) == 0
    assert capsys.readouterr().out.startswith("fits: needs")


@pytest.mark.slow
def test_8b_is_planned_in_a_minute_and_2_gb(tmp_path):
    """In processor seconds, as other tests run beside it, and in a process of its own for the memory."""
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {
                    "name_or_path": str(ROOT / "tests" / "configurations" / "Qwen3-8B"),
                    "dtype": "bfloat16",
                    "quantization": "nf4",
                    "lora": {"r": 16},
                    "value_model": "adapter",
                    "gradient_checkpointing": True,
                },
                "data": {"train": "nowhere.jsonl"},
                "rewards": [{"name": "r", "function": "nowhere:r"}],
                "rollout": {"max_new_tokens": 512, "generation_batch_size": 16},
                "batch": {"max_tokens": 4096},
            }
        )
    )
    command = [sys.executable, "-m", "fastppo", "plan", str(tmp_path / "run.yaml"), "--gpu-memory", "24"]
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out.startswith("fits: needs"), out
    assert after.ru_utime - before.ru_utime < 60
    assert time.time() - began < 300
    assert after.ru_maxrss < 2 * 2**20 or after.ru_maxrss == before.ru_maxrss
