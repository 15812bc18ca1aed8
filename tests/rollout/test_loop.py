"""The CPU's sampling loop, against transformers' generate() and the distribution it draws from."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import random_model
from tiny import make_tiny_model
from torch import nn

from fastppo.rollout import loop as loop_module
from fastppo.rollout.draw import draw, sequence_keys
from fastppo.rollout.engine import Sampling
from fastppo.rollout.generate import TransformersEngine
from fastppo.rollout.loop import LoopEngine, _prepared_weights, can_decode

transformers = pytest.importorskip("transformers")

BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products on this machine"
)
PROMPTS = torch.arange(3, 15).view(3, 4)
KEYS = sequence_keys("test", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("decode") / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def completions(model, prompts, *, eos=(), max_new_tokens, temperature=1.0, engine=LoopEngine):
    sampler = engine()
    sampler.sync(model)
    sampling = Sampling(SimpleNamespace(pad_token_id=0), list(eos), max_new_tokens, temperature)
    return sampler.sample(prompts, KEYS[: len(prompts)], sampling)


def tokens_of(*arguments, **options):
    return [completion.tokens for completion in completions(*arguments, **options)]


def greedy(model, prompts, max_new_tokens, eos=-1):
    """By generate(), one prompt at a time."""
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": 0}
    return [
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        for ids in (torch.tensor([prompt]) for prompt in prompts)
    ]


def test_cold_sampling_is_greedy_generation(model):
    """Prompts of several lengths, some repeated; completions that end early, and at different times."""
    different = [torch.randint(3, 300, (int(length),)).tolist() for length in torch.randint(1, 7, (5,))]
    prompts = [different[i] for i in (0, 3, 0, 1, 2, 4, 3, 0)]
    free = greedy(model, prompts, 12)
    eos = [free[0][2], free[1][5]]  # they end the completions of two prompts at least
    expected = greedy(model, prompts, 12, eos)
    got = completions(model, prompts, eos=eos, max_new_tokens=12, temperature=1e-6)
    assert [completion.tokens for completion in got] == expected
    assert [completion.ended for completion in got] == [tokens[-1] in eos for tokens in expected]
    assert len({len(tokens) for tokens in expected}) > 1


def test_an_end_elsewhere_changes_no_draw(model):
    """What a completion draws depends on its own past alone, not on how many others still run."""
    prompts = torch.randint(3, 300, (6, 4)).tolist()
    free = tokens_of(model, prompts, max_new_tokens=10)
    eos = free[0][1]
    ended = tokens_of(model, prompts, max_new_tokens=10, eos=[eos])
    assert ended == [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "phi", "gpt2"])
def test_other_architectures_are_decoded_as_by_generation(kind):
    """Windows shorter than the prompts, soft caps, biases, learned positions; with an adapter on every layer."""
    window = {"sliding_window": 4} if kind in ("gemma3_text", "mistral") else {}
    model = random_model(kind, head_scale=3.0, **window)
    model = with_lora(model) if kind != "gpt2" else model
    assert can_decode(model)
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (7, 4, 2, 6)]
    got = completions(model, prompts, max_new_tokens=6, temperature=1e-6)
    assert [completion.tokens for completion in got] == greedy(model, prompts, 6)
    assert all(completion.logprobs == [0.0] * 6 for completion in got)  # cold: certain


def test_models_that_generation_calls_otherwise_are_not_decoded():
    assert not can_decode(random_model("bloom", head_scale=1.0))  # has no position_ids
    assert not can_decode(random_model("phi3", head_scale=1.0))  # prepares its inputs itself
    assert not can_decode(random_model("falcon_h1", head_scale=1.0))  # keeps states of another kind


@pytest.mark.parametrize("engine", [LoopEngine, TransformersEngine])
def test_memory_at_a_large_vocabulary(engine):
    """A frozen bfloat16 head of 34 MB: once for each of 16 prompts it would be 540 MB."""
    vocabulary, vm = 262_144, Path("/proc/self/status")
    config = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**config, num_attention_heads=2, tie_word_embeddings=True)
    model = with_lora(transformers.LlamaForCausalLM(config).bfloat16())
    prompts = torch.arange(16 * 4).view(16, 4).tolist()
    tokens_of(model, prompts[:1], max_new_tokens=2, engine=engine)  # what libraries allocate once
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pytest.skip("this system does not reset the peak of a process's memory")

    def megabytes(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", vm.read_text()).group(1)) // 1024

    before = megabytes("VmRSS")
    assert [len(tokens) for tokens in tokens_of(model, prompts, max_new_tokens=2, engine=engine)] == [2] * 16
    assert megabytes("VmHWM") - before < 150


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def sample(model, count=5):
    with autocast():
        return tokens_of(model, PROMPTS.tolist(), max_new_tokens=count, temperature=1e-6)


def swapped(model) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def everything(model) -> dict:
    """Every attribute of every module, by identity and in order, and the entries of those that are dictionaries."""
    attributes = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
            attributes[name, key] = (id(value), entries)
    return attributes


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@BFLOAT16
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_exactly_as_it_was(model, lora, failing, monkeypatch):
    model = with_lora(copy.deepcopy(model)) if lora else copy.deepcopy(model)
    inside = []
    model.get_decoder().layers[-1].register_forward_hook(lambda *_: inside.append(swapped(model)))
    attributes = everything(model)
    tensors = {name: (x.clone(), x.data_ptr(), x._version) for name, x in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    if failing:
        calls = iter([draw])  # the second token fails
        monkeypatch.setattr(loop_module, "draw", lambda *args: next(calls)(*args))
        with pytest.raises(StopIteration):
            sample(model)
    else:
        sample(model)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert inside[0] == linear  # adapters and the head among them
    assert list(everything(model).items()) == list(attributes.items())
    assert model.config.to_dict() == config
    for name, x in model.state_dict(keep_vars=True).items():
        value, address, version = tensors[name]
        assert torch.equal(x, value)
        assert (x.data_ptr(), x._version) == (address, version)


@BFLOAT16
def test_the_model_is_left_as_it_was_when_its_weights_cannot_be_prepared(model, monkeypatch):
    attributes = everything(model)
    made = []

    class Fails(loop_module._Product):
        def __init__(self, *args):
            if len(made) == 3:
                raise MemoryError
            made.append(super().__init__(*args))

    monkeypatch.setattr(loop_module, "_Product", Fails)
    with pytest.raises(MemoryError):
        sample(model)
    assert everything(model) == attributes


@BFLOAT16
@pytest.mark.parametrize("lora", [False, True])
def test_prepared_weights_give_the_logits_of_autocast(model, lora):
    model = with_lora(copy.deepcopy(model)) if lora else model
    with torch.no_grad(), autocast():
        expected = model(PROMPTS).logits.float()
        with _prepared_weights(model, 3):
            logits = model(PROMPTS).logits.float()
            attention = model.get_decoder().layers[0].self_attn
            query, key = (getattr(x, "base_layer", x) for x in (attention.q_proj, attention.k_proj))
            assert query.forward.func is key.forward.func  # one product, inside adapters too
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@BFLOAT16
def test_layers_with_a_forward_or_hooks_of_their_own_are_left_alone(model):
    model = copy.deepcopy(model)
    first, second = model.model.layers
    calls = []
    first.self_attn.q_proj.register_forward_hook(lambda *_: None)
    first.self_attn.k_proj.register_forward_pre_hook(lambda *_: None)
    first.self_attn.v_proj.register_full_backward_hook(lambda *_: None)
    own = second.mlp.down_proj.forward = lambda x: calls.append(x) or nn.Linear.forward(second.mlp.down_proj, x)
    nn.utils.parametrizations.weight_norm(second.mlp.up_proj)
    with torch.no_grad(), autocast(), _prepared_weights(model, 3):
        taken = swapped(model)
        assert second.mlp.down_proj.forward is own
        model(PROMPTS)
    assert calls
    assert swapped(model) == {"model.layers.1.mlp.down_proj"}
    alone = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}
    assert not taken & (alone | {"model.layers.1.mlp.up_proj"})
    assert {"model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj", "lm_head"} < taken


def test_nothing_is_prepared_outside_bfloat16_autocast_or_for_compiled_modules(model):
    with _prepared_weights(model, 3):
        assert not swapped(model)
    with torch.autocast("cpu", dtype=torch.float16), _prepared_weights(model, 3):
        assert not swapped(model)
    with autocast(), torch.backends.mkldnn.flags(enabled=False), _prepared_weights(model, 3):
        assert not swapped(model)
    compiled = copy.deepcopy(model)
    compiled.model.layers[0].compile()
    with autocast(), _prepared_weights(compiled, 3):
        assert not swapped(compiled)
    with autocast(), _prepared_weights(torch.compile(model, backend="eager"), 3):
        assert not swapped(model)
    compiled = copy.deepcopy(model)
    compiled.model.forward = torch.compile(compiled.model.forward, backend="eager")
    with autocast(), _prepared_weights(compiled, 3):
        assert swapped(compiled) == {"model"}


@BFLOAT16
def test_another_thread_is_given_the_gradients_of_the_model_itself(model):
    model, found = copy.deepcopy(model), []

    def train():
        with autocast():
            loss = model(PROMPTS).logits.float().square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))

    train()
    with torch.no_grad(), autocast(), _prepared_weights(model, 3):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    for own, expected in zip(*found, strict=True):
        assert torch.equal(own, expected)


@BFLOAT16
def test_layers_with_one_input_share_a_product():
    """A third layer has an input of its own; one of those together is called out of order, one on another tensor."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(40, size) for size in (24, 8, 16))
            self.o_proj = nn.Linear(24, 40, bias=False)

        def forward(self, x, y):
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            with torch.autocast("cpu", enabled=False):
                exact = self.k_proj(x)
            return self.o_proj(q), k, v, self.v_proj(y), self.k_proj(x), self.q_proj(y), exact

    layer, (x, y) = Layer(), torch.randn(2, 3, 1, 40)
    with torch.no_grad(), autocast():
        expected = layer(x, y)
        with _prepared_weights(layer, 3):
            shared = layer.q_proj.forward.func
            assert [layer.k_proj.forward.func, layer.v_proj.forward.func] == [shared] * 2
            assert layer.o_proj.forward.func is not shared
            got = layer(x, y)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert torch.equal(got[-1], expected[-1])
