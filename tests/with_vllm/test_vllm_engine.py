"""The engine alone: the probabilities that it samples with are the policy's of that moment, and it changes no other."""

from __future__ import annotations

import copy
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_model, make_tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastppo.models import apply_lora, load_causal_lm
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.rollout.config import RolloutConfig, VLLMConfig
from fastppo.rollout.draw import sequence_keys
from fastppo.rollout.engine import EngineError, Sampling
from fastppo.rollout.vllm import VLLMEngine

CPU = torch.device("cpu")
TOKENIZER = make_tiny_tokenizer()
PROMPTS = [[3 + i, 7, 9, 11 + i, 5][: 1 + i % 5] * (1 + i % 3) for i in range(9)]
LORA = LoraConfig(r=5, lora_alpha=7)
POLICIES = {
    "full": {},
    "full, untied": {"tie": False},
    "lora": {"lora": LORA},
    "lora on some layers, with a critic's": {
        "lora": LoraConfig(r=9, target_modules=r".*\.(q_proj|down_proj)"),
        "critic": True,
    },
    "lora on 4 bits": {"lora": LORA, "quantization": "nf4"},
}


def make_policy(folder, *, tie=True, lora=None, critic=False, quantization=None):
    """A tiny Llama whose heads are as wide as vLLM needs them on a CPU."""
    make_tiny_model(folder, hidden_size=128, tie=tie)
    config = ModelConfig(name_or_path=str(folder), lora=lora, quantization=quantization)
    policy = load_causal_lm(config)
    policy.config.max_position_embeddings = 512
    return policy if lora is None else apply_lora(policy, lora, critic=critic)


def change(policy):
    """As an update does."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def sampling(**options):
    return Sampling(TOKENIZER, **{"eos": [2], "max_new_tokens": 12, "temperature": 0.8} | options)


def sample(engine, policy, prompts=PROMPTS, name="a", **options):
    engine.wake()
    engine.sync(policy)
    completions = engine.sample(prompts, sequence_keys(name, len(prompts)), sampling(**options))
    engine.sleep()
    return completions


@torch.no_grad()
def gap(policy, completions, prompts=PROMPTS, temperature=0.8):
    """The largest difference to the log-probabilities by transformers, of logits in float64 where they can be."""
    quantized = getattr(policy.config, "quantization_config", None) or getattr(policy, "is_loaded_in_4bit", False)
    model = policy if quantized else copy.deepcopy(policy).double()
    largest = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1].double()
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        largest = max(largest, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return largest


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A policy, and an engine that is open."""
    policy = make_policy(tmp_path_factory.mktemp("shared"))
    engine = VLLMEngine(RolloutConfig(), CPU)
    sample(engine, policy)
    return engine, policy


@pytest.mark.parametrize("kind", POLICIES)
def test_it_samples_from_the_policy_as_it_is_at_each_sync(kind, tmp_path):
    policy = make_policy(tmp_path / "model", **POLICIES[kind])
    change(policy)  # adapters begin as nothing
    engine = VLLMEngine(RolloutConfig(), CPU, max_length=64)
    for step in range(3):
        completions = sample(engine, policy, name=f"{step}")
        assert gap(policy, completions) < 1e-4
        assert [completion.ended for completion in completions] == [c.tokens[-1] == 2 for c in completions]
        assert all(len(c.tokens) == 12 or c.ended for c in completions)
        change(policy)
    assert gap(policy, completions) > 0.1  # what the bound above would not miss


def test_a_sync_that_is_left_out_shows(shared):
    engine, policy = shared
    changed = copy.deepcopy(policy)
    change(changed)
    sample(engine, policy)
    stale = engine.sample(PROMPTS, sequence_keys("a", len(PROMPTS)), sampling())
    assert gap(changed, stale) > 0.1
    assert gap(changed, sample(engine, changed)) < 1e-4


def test_keys_and_values_of_earlier_weights_that_are_not_forgotten_show(shared, monkeypatch):
    engine, policy = shared
    prompts = [[3 + i % 50 for i in range(300)]] * 2  # vLLM keeps whole blocks, of 128 tokens on a CPU
    changed = copy.deepcopy(policy)
    change(changed)
    assert gap(policy, sample(engine, policy, prompts), prompts) < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forget_prefixes", lambda: None)
        assert gap(changed, sample(engine, changed, prompts), prompts) > 0.01
    assert gap(changed, sample(engine, changed, prompts), prompts) < 1e-4


def test_adapters_that_are_not_loaded_in_place_show(tmp_path, monkeypatch):
    from vllm.lora import request

    policy = make_policy(tmp_path / "model", lora=LORA)
    engine = VLLMEngine(RolloutConfig(), CPU)
    sample(engine, policy)
    change(policy)

    make = request.LoRARequest
    with monkeypatch.context() as patch:
        patch.setattr(request, "LoRARequest", lambda *arguments, load_inplace: make(*arguments))
        assert gap(policy, sample(engine, policy)) > 0.1
    assert gap(policy, sample(engine, policy)) < 1e-4


def test_keys_decide_what_is_sampled(shared):
    engine, policy = shared
    first, again, other = (sample(engine, policy, name=name) for name in ("a", "a", "b"))
    assert first == again
    assert all(a.tokens != b.tokens for a, b in zip(first, other, strict=True) if len(a.tokens) > 2)


def test_tokens_come_as_often_as_their_probabilities_say(shared):
    engine, policy = shared
    prompts = [[3, 7]] * 1500
    completions = sample(engine, policy, prompts, max_new_tokens=1, eos=[])
    with torch.no_grad():
        probabilities = (policy(torch.tensor(prompts[:1])).logits[0, -1].double() / 0.8).softmax(0)
    count = torch.bincount(torch.tensor([c.tokens[0] for c in completions]), minlength=len(probabilities))
    often = probabilities * len(prompts) >= 5
    expected = torch.cat([probabilities[often], probabilities[~often].sum()[None]]) * len(prompts)
    found = torch.cat([count[often], count[~often].sum()[None]]).double()
    chi_squared, degrees = ((found - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi_squared < degrees + 4 * (2 * degrees) ** 0.5


def test_stop_strings_and_several_eos_end_completions(shared):
    engine, policy = shared
    eos, stop = [2, 40, 41, 42], ("a", "on")
    completions = sample(engine, policy, eos=eos, stop=stop, max_new_tokens=40)
    assert {completion.ended for completion in completions} == {True, False} or all(c.ended for c in completions)
    for completion in completions:
        texts = [TOKENIZER.decode(completion.tokens[:n]) for n in range(1, len(completion.tokens) + 1)]
        over = [
            token in eos or any(s in text for s in stop) for token, text in zip(completion.tokens, texts, strict=True)
        ]
        assert over == [False] * (len(over) - 1) + [completion.ended]
    assert gap(policy, completions) < 1e-4


def test_progress_counts_what_has_ended(shared):
    engine, policy = shared
    engine.sync(policy)
    told = []
    engine.sample(PROMPTS, sequence_keys("a", len(PROMPTS)), sampling(stop=("a",), max_new_tokens=30), told.append)
    assert told == sorted(set(told))
    assert told[-1] == len(PROMPTS)


def test_an_interrupted_rollout_leaves_nothing_behind(shared):
    engine, policy = shared
    expected = sample(engine, policy)

    def interrupt(ended):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sample(PROMPTS, sequence_keys("b", len(PROMPTS)), sampling(), interrupt)
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert sample(engine, policy) == expected


def test_sequences_that_must_give_up_their_memory_are_computed_again(tmp_path, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    policy, engine = make_policy(tmp_path / "model"), VLLMEngine(RolloutConfig(), CPU, max_length=200)
    token = 2 * 2 * 2 * 32 * 4  # bytes: layers, keys and values, heads, width, float32
    monkeypatch.setattr(engine, "_memory", lambda policy: {"kv_cache_memory_bytes": 8 * 128 * token})
    preempt, preempted = Scheduler._preempt_request, []
    monkeypatch.setattr(
        Scheduler, "_preempt_request", lambda *arguments, **named: (preempted.append(1), preempt(*arguments, **named))
    )
    completions = sample(engine, policy, eos=[], max_new_tokens=180)
    assert preempted
    assert [len(completion.tokens) for completion in completions] == [180] * len(PROMPTS)
    assert gap(policy, completions) < 1e-4


def test_products_are_as_precise_as_the_policys(tmp_path):
    policy, engine = make_policy(tmp_path / "model"), VLLMEngine(RolloutConfig(), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < gap(policy, sample(engine, policy)) < 0.5


def test_the_process_stays_as_it_was(tmp_path):
    def state():
        return {
            "random": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "torch": torch.get_rng_state().tolist(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "set": torch.set_num_threads,
            "grad": torch.is_grad_enabled(),
            "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
            "environment": {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "_"))},
            "bound to a node": " bind:" in Path("/proc/self/numa_maps").read_text(),
        }

    policy, engine = make_policy(tmp_path / "model"), VLLMEngine(RolloutConfig(), CPU)
    before = state()
    sample(engine, policy)
    assert state() == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())


def make_other(kind, folder, **options):
    """A random model of another architecture."""
    config = CONFIG_MAPPING[kind](
        **{"vocab_size": 331, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2},
        initializer_range=0.2,
        **options,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_causal_lm(ModelConfig(name_or_path=str(folder)))


def test_vllm_computes_by_classes_of_transformers_and_leaves_them_as_they_are(tmp_path):
    policy = make_other("olmo2", tmp_path)
    call = type(policy.model).__call__
    engine = VLLMEngine(RolloutConfig(), CPU)
    for _ in range(2):
        assert gap(policy, sample(engine, policy)) < 1e-4
        change(policy)
    assert type(policy.model).__call__ is call
    type(policy)(policy.config)


def test_what_vllm_computes_otherwise_is_refused(tmp_path):
    # It is right from a checkpoint, and off by 4 once its weights have been reloaded on a CPU.
    policy = make_other("mixtral", tmp_path, num_local_experts=4, num_key_value_heads=2)
    with pytest.raises(EngineError, match=r"are off by \d.* for this model\); set rollout.engine to transformers$"):
        sample(VLLMEngine(RolloutConfig(), CPU), policy)


def test_nan_is_told_and_the_next_rollout_is_right(shared):
    engine, policy = shared
    broken = copy.deepcopy(policy)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        sample(engine, broken)
    assert gap(policy, sample(engine, policy)) < 1e-4


def test_errors_of_vllm_are_a_sentence(tmp_path, shared):
    engine, policy = shared
    small = RolloutConfig(vllm=VLLMConfig(gpu_memory_utilization=1e-6))
    with pytest.raises(
        EngineError, match=r"^rollout.engine: vLLM cannot take .*set rollout.vllm.gpu_memory_utili"
    ) as e:
        VLLMEngine(small, CPU).sync(policy)
    unknown = copy.deepcopy(policy)
    unknown.__class__ = type("NobodysForCausalLM", (type(policy),), {"__module__": "transformers_modules.nobodys"})
    with pytest.raises(EngineError, match=r"NobodysForCausalLM.*set rollout.engine to transformers$") as f:
        VLLMEngine(RolloutConfig(), CPU).sync(unknown)
    large = make_policy(tmp_path / "large", lora=LoraConfig(r=513))
    with pytest.raises(EngineError, match=r"^model.lora.r: vLLM has adapters up to rank 512, got 513; set"):
        VLLMEngine(RolloutConfig(), CPU).sync(large)
    make_tiny_model(tmp_path / "narrow")
    with pytest.raises(EngineError, match=r"head_dim=8.*set rollout.engine to transformers$") as g:
        sample(VLLMEngine(RolloutConfig(), CPU), load_causal_lm(ModelConfig(name_or_path=str(tmp_path / "narrow"))))
    assert all("\n" not in str(error.value) and len(str(error.value)) < 500 for error in (e, f, g))
    assert gap(policy, sample(engine, policy)) < 1e-4
