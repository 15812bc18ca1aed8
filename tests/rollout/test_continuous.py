"""transformers' continuous batching: its log-probabilities, what it leaves of the model, and what it refuses."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny import make_tiny_model
from torch import nn

from fastppo.models import attention
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.rollout import continuous
from fastppo.rollout.continuous import ContinuousEngine, why_not
from fastppo.rollout.draw import sequence_keys
from fastppo.rollout.engine import Completion, EngineError, Sampling

transformers = pytest.importorskip("transformers", minversion="5.17")

KEYS = sequence_keys("test", 64)
SIZES = {
    "vocab_size": 331, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    return transformers.AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "model"))


def build(kind: str = "Llama", **changes) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**(SIZES | changes)))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def engine_of(policy: nn.Module) -> ContinuousEngine:
    engine = ContinuousEngine()
    engine.sync(policy)
    return engine


@torch.no_grad()
def gap(policy: nn.Module, given: list[list[int]], completions: list[Completion], temperature: float = 1.0) -> float:
    """Largest difference to the log-probabilities of the policy, each sequence in a pass of its own."""
    worst = 0.0
    for prompt, (tokens, logprobs, _) in zip(given, completions, strict=True):
        logits = policy(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits.double() / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        worst = max(worst, (expected - torch.tensor(logprobs)).abs().max().item())
    return worst


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


GEMMA = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
POLICIES = {
    "Llama": lambda: build(),
    "eager": lambda: build(attn_implementation="eager"),
    "short": lambda: build(attn_implementation=attention.NAME),
    "window": lambda: build("Mistral", sliding_window=6),
    "windows": lambda: build("Gemma3Text", **GEMMA),
    "LoRA": lambda: lora(build()),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_log_probabilities_are_the_models_own(kind, tokenizer):
    policy = POLICIES[kind]().eval()
    if kind == "windows" and continuous._PAGE != "page_size":
        assert "before 5.23" in why_not(policy)
        return
    assert why_not(policy) is None
    # Sampling defaults that a model ships with must change nothing.
    policy.generation_config.update(top_k=1, repetition_penalty=3.0, eos_token_id=9)
    before, state = policy.config._attn_implementation, torch.get_rng_state()
    given, told = prompts(2, 5, 40, 3, 7, 1) * 2, []
    sampling = Sampling(tokenizer, [2, *range(150, 170)], 24, temperature=0.8, batch_size=5)
    completions = engine_of(policy).sample(given, KEYS[:12], sampling, told.append)
    assert gap(policy, given, completions, 0.8) < 5e-5
    for tokens, logprobs, ended in completions:
        assert len(tokens) == len(logprobs)
        assert [token in sampling.eos for token in tokens] == [False] * (len(tokens) - 1) + [ended]
        assert ended or len(tokens) == 24
    assert len({len(completion.tokens) for completion in completions}) > 2
    assert told == list(range(1, 13))
    assert policy.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not policy.training


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_base_in_4_bits_is_sampled_with_its_adapters(autocast, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = str(make_tiny_model(tmp_path / "model", hidden_size=40))
    config = ModelConfig(name_or_path=path, quantization="nf4", lora=LoraConfig(r=3), autocast=autocast)
    policy = PolicyModels(config, device=torch.device("cpu"), num_values=0).policy
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    given = prompts(2, 9, 33)
    completions = engine_of(policy).sample(given, KEYS[:3], Sampling(tokenizer, [], 8))
    assert gap(policy, given, completions) < 1e-3


def test_half_precision(tokenizer):
    policy, given = build().bfloat16().eval(), prompts(2, 5, 40)
    assert why_not(policy) is None
    assert gap(policy, given, engine_of(policy).sample(given, KEYS[:3], Sampling(tokenizer, [], 8))) < 0.1


def varlen(q, k, v, begin_q, begin_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """As PyTorch's: the queries of a sequence are its last ones."""
    parts = []
    assert begin_q.dtype == begin_k.dtype == torch.int32
    assert int(begin_q.diff().max()) <= max_q
    assert int(begin_k.diff().max()) <= max_k
    for i in range(len(begin_q) - 1):
        queries, keys, values = (
            x[begin[i] : begin[i + 1]].transpose(0, 1).float()
            for x, begin in ((q, begin_q), (k, begin_k), (v, begin_k))
        )
        keys, values = (x.repeat_interleave(len(queries) // len(x), 0) for x in (keys, values))
        ahead = torch.arange(keys.shape[1]) - torch.arange(keys.shape[1])[-queries.shape[1] :, None]
        seen = (ahead <= 0) & ((ahead >= -window_size[0]) if window_size[0] >= 0 else True)
        scores = (queries @ keys.mT * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts).to(v.dtype)


@pytest.mark.parametrize("kind", ["Llama", "window", "windows"])
def test_attention_by_varlen_attn(kind, tokenizer, monkeypatch):
    """What a GPU without flash-attn takes, with a function for a CPU in place of PyTorch's."""
    if kind == "windows" and continuous._PAGE != "page_size":
        pytest.skip("before transformers 5.23 such a model is refused")
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    assert continuous._paged(attention.VARLEN, torch.bfloat16).endswith(attention.PAGED)
    assert continuous._paged(attention.VARLEN, torch.float32).endswith("sdpa")  # it has no float32
    prefix = "" if continuous._PAGE == "page_size" else "paged|"
    monkeypatch.setattr(continuous, "_paged", lambda *_: prefix + attention.PAGED)
    policy, given = POLICIES[kind]().eval(), prompts(2, 5, 40, 3, 7, 1)
    completions = engine_of(policy).sample(given, KEYS[:6], Sampling(tokenizer, [], 24, batch_size=4))
    assert gap(policy, given, completions) < 5e-5


def test_the_same_keys_give_the_same_completions(tokenizer):
    engine, given, sampling = engine_of(build().eval()), prompts(2, 5, 40, 3) * 3, Sampling(tokenizer, [2], 9)
    first = engine.sample(given, KEYS[:12], sampling)
    torch.manual_seed(3)
    assert engine.sample(given, KEYS[:12], sampling) == first
    assert engine.sample(given, KEYS[12:24], sampling) != first


def test_tokens_come_as_often_as_they_are_likely(tokenizer):
    policy, count, temperature = build().eval(), 2000, 0.3
    given = prompts(4)
    sampling = Sampling(tokenizer, [], 1, temperature=temperature, batch_size=500)
    found = engine_of(policy).sample(given * count, sequence_keys("often", count), sampling)
    found = torch.bincount(torch.tensor([completion.tokens[0] for completion in found]), minlength=331)
    with torch.no_grad():
        expected = (policy(torch.tensor(given)).logits[0, -1].double() / temperature).softmax(-1) * count
    often = expected >= 5
    assert often.sum() > 5
    statistic = ((found - expected)[often] ** 2 / expected[often]).sum()
    assert statistic < often.sum() + 4 * (2 * often.sum()) ** 0.5


def test_changed_weights_count_at_once(tokenizer):
    """Also for prompts whose keys and values an older rollout has computed, in whole pages that could be shared."""
    policy, given = lora(build()), prompts(70) * 4
    engine, sampling = engine_of(policy), Sampling(tokenizer, [], 6)
    engine.sample(given, KEYS[:4], sampling)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    completions = engine.sample(given, KEYS[:4], sampling)
    assert gap(policy, given, completions) < 2e-4
    with policy.disable_adapter():
        assert gap(policy, given, completions) > 0.1


def test_a_free_place_is_taken_at_once(tokenizer):
    """Not more passes than tokens need at so many in each, where batches wait for their longest completion."""
    policy, given = build().eval(), prompts(*[3] * 24)
    rows = []
    policy.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["logits_indices"])), with_kwargs=True)
    sampling = Sampling(tokenizer, list(range(100)), 60, batch_size=4)
    lengths = [len(row.tokens) for row in engine_of(policy).sample(given, KEYS[:24], sampling)]
    assert max(rows) == 4
    assert len(rows) <= sum(lengths) / 4 + max(lengths)
    assert len(rows) < sum(max(lengths[i : i + 4]) for i in range(0, 24, 4))


def test_stop_strings_end_a_completion_as_in_the_loop(tokenizer):
    policy, given = build().eval(), prompts(2, 5, 40, 3) * 4
    sampling = Sampling(tokenizer, [2], 30, stop=("a", "th", "ß"), batch_size=6)
    completions = engine_of(policy).sample(given, KEYS[:16], sampling)
    assert gap(policy, given, completions) < 5e-5
    assert len({len(completion.tokens) for completion in completions}) > 2
    for tokens, _, ended in completions:
        text, before = tokenizer.decode(tokens), tokenizer.decode(tokens[:-1])
        assert ended == (any(stop in text for stop in sampling.stop) or tokens[-1] == 2)
        assert not any(stop in before for stop in sampling.stop)


def damage(policy: nn.Module) -> None:
    with torch.no_grad():
        policy.get_output_embeddings().weight.fill_(torch.nan)


def fail(policy: nn.Module) -> None:
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    backbone_of = policy.model
    backbone_of.register_forward_pre_hook(run_out)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (damage, FloatingPointError, r"^the policy's probabilities are not finite$"),
        (fail, EngineError, r"^continuous batching failed \(CUDA out of memory. Tried .*; lower rollout\.[^\n]*$"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(harm, error, message, tokenizer, caplog):
    policy = build(attn_implementation=attention.NAME).train()
    threads, hooks = threading.active_count(), len(policy._forward_hooks)
    harm(policy)
    with pytest.raises(error, match=message):
        engine_of(policy).sample(prompts(2, 5), KEYS[:2], Sampling(tokenizer, [], 4))
    assert policy.config._attn_implementation == attention.NAME
    assert policy.training
    assert len(policy._forward_hooks) == hooks
    assert threading.active_count() == threads
    assert not caplog.records  # the error itself says it


def test_an_interrupt_ends_its_thread(tokenizer):
    def interrupt(ended):
        raise KeyboardInterrupt

    policy, threads = build().eval(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        engine_of(policy).sample(prompts(*[2] * 9), KEYS[:9], Sampling(tokenizer, [], 64, batch_size=1), interrupt)
    assert threading.active_count() == threads
    assert policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Mamba", {}, "keeps other states"),
        ("Gemma2", {"head_dim": 8, "layer_types": ["full_attention"] * 2}, "caps its attention scores"),
        ("GPTNeoX", {}, "it fails for this model"),
    ],
)
def test_models_that_it_cannot_sample(kind, changes, message):
    reason = why_not(build(kind, **changes).eval())
    assert message in reason
    assert "\n" not in reason
    assert "rollout." not in reason  # what to set, whoever asks says


def test_wrong_log_probabilities_are_found_out(monkeypatch):
    """As of an architecture with attention of its own, which ignores what transformers tells its attention."""
    policy = build().eval()
    forward = policy.model.forward

    def blind(*args, position_ids=None, **kwargs):
        later = 0 if kwargs.get("cu_seq_lens_q") is None else 9 * (position_ids > 0)
        return forward(*args, position_ids=position_ids + later if position_ids is not None else None, **kwargs)

    monkeypatch.setattr(policy.model, "forward", blind)
    assert "log-probabilities are off" in why_not(policy)
