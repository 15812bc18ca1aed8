"""What a plan leaves to vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import build_changed_config, make_tiny_model

from fastppo.errors import ConfigError
from fastppo.training.plan.phases import Machine, memory_of
from fastppo.training.plan.vllm_share import vllm_memory_utilization

GPU = Machine("cuda", 24 * 2**30)
LAYERS, WIDTH = 2, 16  # of make_tiny_model; of its keys


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=LAYERS, vocab_size=331)


def config(model: Path, **changes):
    tree = {
        "model": {"name_or_path": str(model)},
        "data": {"train": "nowhere.jsonl", "max_prompt_length": 20, "eval_size": 0},
        "rewards": [{"name": "r", "function": "nowhere:r"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 12, "engine": "vllm"},
    }
    return build_changed_config(tree, changes)


def rollout_of(given, machine=GPU):
    return next(phase for phase in memory_of(given, machine).phases if phase.name == "rollout")


def test_vllm_has_weights_of_its_own_and_a_cache_of_all_sequences(model):
    vllm, without = rollout_of(config(model)), rollout_of(config(model, rollout__engine="transformers"))
    reference = policy = load_file(model / "model.safetensors").values()
    assert without.kinds["weights"] >= sum(t.nbytes for t in (*policy, *reference))
    assert vllm.kinds["weight copies"] == pytest.approx(sum(t.nbytes for t in policy), rel=0.01)
    # Keys and values of 8 sequences, each of a block of 128 tokens, and of a block that stays empty.
    block = 128 * 2 * LAYERS * WIDTH * 4
    assert vllm.kinds["KV cache"] == 9 * block
    for half in ("dtype", "autocast"):
        assert rollout_of(config(model, **{f"model__{half}": "bfloat16"})).kinds["KV cache"] == 9 * block // 2
    assert rollout_of(config(model, rollout__num_prompts=12)).kinds["KV cache"] == 25 * block
    tight = Machine("cuda", int(1.2 * 2**30))  # where there is room for no more than one
    assert rollout_of(config(model), tight).kinds["KV cache"] == 2 * block


def test_its_share_is_what_it_can_use_and_no_more_than_is_left(model):
    for eager, graphs in ((True, 0), (False, 2**30)):
        given = config(model, rollout__vllm__enforce_eager=eager)
        kinds = rollout_of(given).kinds
        own = sum(kinds[kind] for kind in ("weight copies", "activations", "KV cache")) + 2**28 + graphs
        assert vllm_memory_utilization(given, GPU) == pytest.approx(own / GPU.memory, rel=1e-9)
    many, small = config(model, rollout__num_prompts=2**18), Machine("cuda", 3 * 2**30)
    assert rollout_of(many, small).total == pytest.approx(0.9 * small.memory, rel=1e-3)
    assert vllm_memory_utilization(many, small) < 0.75  # the rest is the trainer's, and its reserve


@pytest.mark.parametrize("processes", [1, 2])
def test_on_a_cpu_its_share_of_all_memory_is_that_of_weights_and_cache(model, processes):
    machine = Machine("cpu", 8 * 2**30 // processes, processes)
    options = {"rollout__num_prompts": 64, "distributed__strategy": "replicate"}
    given = config(model, **options)
    kinds = rollout_of(given, machine).kinds
    share = vllm_memory_utilization(given, machine)
    assert share * 8 * 2**30 == pytest.approx(kinds["weight copies"] + kinds["KV cache"], rel=1e-9)
    filled = rollout_of(config(model, **options, rollout__vllm__gpu_memory_utilization=0.1), machine).kinds
    assert filled["weight copies"] + filled["KV cache"] == pytest.approx(0.1 * 8 * 2**30, rel=1e-6)


def test_a_share_that_is_given_is_taken_and_planned_with(model):
    given = config(model, rollout__vllm__gpu_memory_utilization=0.3, rollout__num_prompts=2**18)
    assert vllm_memory_utilization(given, GPU) == 0.3
    assert memory_of(given, GPU).vllm == pytest.approx(0.3 * GPU.memory, rel=1e-6)


def test_where_it_does_not_fit_the_run_is_refused_in_a_sentence(model):
    with pytest.raises(
        ConfigError, match=r"vLLM does not fit beside the trainer: sampling needs .* there are 1\.1 GiB"
    ):
        vllm_memory_utilization(config(model), Machine("cuda", int(1.1 * 2**30)))


def test_while_it_sleeps_little_of_it_is_left(model):
    def update(**changes):
        return next(p for p in memory_of(config(model, **changes), GPU).phases if p.name == "policy update").total

    without, graphs = update(rollout__engine="transformers"), update()
    eager = update(rollout__vllm__enforce_eager=True)
    assert without < eager < graphs <= without + 1.3 * 2**30


def test_on_a_cpu_it_does_not_sleep(model):
    machine = Machine("cpu", 8 * 2**30)
    memory = memory_of(config(model), machine)
    for before, phase in zip(
        memory_of(config(model, rollout__engine="loop"), machine).phases, memory.phases, strict=True
    ):
        if phase.name not in ("load", "rollout"):
            cache = phase.kinds["KV cache"]
            assert cache == memory.phases[1].kinds["KV cache"] > 0
            assert phase.total == before.total + cache + memory.phases[1].kinds["weight copies"]
    many, small = config(model, rollout__num_prompts=2**18, batch__max_tokens=64), Machine("cpu", 3 * 2**30)
    assert (
        memory_of(many, small).peak.total <= 0.9 * small.memory + memory_of(many, small).phases[1].kinds["activations"]
    )


def test_processes_that_share_an_engine_share_its_weights(model):
    def weights(size: int) -> int:
        given = config(model, rollout__num_prompts=8, rollout__vllm__tensor_parallel_size=size)
        return rollout_of(given, Machine("cuda", GPU.memory, 4)).kinds["weight copies"]

    assert weights(1) - weights(2) == pytest.approx(2 * (weights(2) - weights(4)), abs=4)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 4 processes cannot be divided into groups of 3"):
        weights(3)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: one process cannot be divided into groups of 2"):
        rollout_of(config(model, rollout__vllm__tensor_parallel_size=2))


def test_a_model_that_cannot_be_planned_needs_a_share(model, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such layer")

    monkeypatch.setattr("fastppo.training.plan.vllm_share.memory_of", refuse)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization: no plan to take it from; set it \(no such layer\)"):
        vllm_memory_utilization(config(model), GPU)
