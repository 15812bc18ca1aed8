"""Weights in 4 bits under adapters of policy and critic, against the same model with the same weights in nn.Linear."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from torch import nn
from transformers import (
    BertGenerationConfig,
    BertGenerationDecoder,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fastppo.errors import ConfigError
from fastppo.models import ModelError, ValueModel, load_causal_lm
from fastppo.models.adapters import VALUE, WEIGHTS_FILE, is_critics, load_adapters, merge_lora, save_adapters
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.models.quantize import dense_layer, is_quantized, quantize_

pytest.importorskip("peft")
functional = pytest.importorskip("bitsandbytes.functional")

BATCH = (4, 11, 4)  # sequences, tokens, of them in completions


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    # The k and v projections have 20 x 40 weights, which are no multiple of a block of 64.
    return str(make_tiny_model(tmp_path_factory.mktemp("nf4") / "model", hidden_size=40))


def make(path, **options):
    """Models whose adapters, and the critic's head, are not zero."""
    torch.manual_seed(1)
    options = {"quantization": "nf4", "lora": LoraConfig(r=3), "value_model": "adapter"} | options
    models = PolicyModels(ModelConfig(name_or_path=path, **options), device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in (models.policy_parameters() | models.value_parameters()).values():
            parameter.normal_(std=0.2)
    return models


def batch():
    count, length, completion = BATCH
    torch.manual_seed(2)
    sequences, mask = torch.randint(3, 300, (count, length)), torch.ones(count, length, dtype=torch.long)
    mask[0, :3], mask[2, -2:] = 0, 0
    return sequences, mask, completion


def roll_out(models):
    """The passes without gradients, in eval mode, that come before an update."""
    with torch.no_grad():
        for forward in (models.hidden, models.reference_hidden, lambda *given: models.values(None, *given)):
            forward(*batch())


def dense(models):
    """The same models with plain linear layers, which recompute nothing."""
    twin = copy.deepcopy(models)
    twin.config.gradient_checkpointing = False
    for parent in list(twin.policy.modules()):
        for name, layer in list(parent.named_children()):
            if is_quantized(layer) and not hasattr(layer, "lora_A"):
                setattr(parent, name, dense_layer(layer))
            elif hasattr(layer, "lora_A"):  # peft's own for such layers casts
                setattr(parent, name, Adapted(layer))
    return twin


class Adapted(nn.Module):
    """W x + scale · B A x for the adapters that are active, written plainly."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.scaling = dense_layer(layer.get_base_layer()), dict(layer.scaling)
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self._active_adapter, self._disable_adapters = "default", False

    def forward(self, x):
        out = self.base(x)
        if self._disable_adapters:
            return out
        name = self._active_adapter
        return out + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))


def gradients(models, *, together=True):
    """Gradients of all adapters and the critic's head, and the states and values."""
    real = batch()[1][:, -BATCH[2] :, None].bool()

    def policy():
        hidden, _ = models.hidden(*batch())
        results["hidden"] = (hidden * real).detach()
        return (hidden * real * torch.linspace(-1, 1, hidden[0].numel()).view_as(hidden[0])).sum()

    def critic():
        values = models.values(None, *batch())[..., None]
        results["values"] = (values * real).detach()
        return (values * real).sin().sum()

    results = {}
    with models.training():
        if together:
            (policy() + critic()).backward()
        else:
            policy().backward()
            critic().backward()
    parameters = models.policy_parameters() | models.value_parameters()
    found = {n.replace("base_layer.", ""): None if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found | results


def errors(found, expected):
    """The largest difference of each tensor, as a share of its largest value; infinite where there is none."""
    return {
        name: float("inf") if found[name] is None else ((found[name] - e).abs().max() / e.abs().max()).item()
        for name, e in expected.items()
    }


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_every_adapter_after_a_rollout(path, checkpointing, together):
    """As those of float32 layers to 1e-6 and of float64 to 1e-4; also where one pass recomputes for both adapters."""
    models = make(path, gradient_checkpointing=checkpointing)
    roll_out(models)
    found = gradients(models, together=together)
    assert len(found) == 2 * 2 * 7 * 2 + 4  # of two models, A and B of 7 layers in 2 blocks; head, states, values
    twin = dense(models)
    assert not any(map(is_quantized, twin.policy.modules()))
    for tolerance in (1e-6, 1e-4):
        wrong = {name: error for name, error in errors(found, gradients(twin)).items() if not error < tolerance}
        assert not wrong
        twin.policy.double()


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")
def test_the_trap_that_repacking_sets(path, tmp_path):
    """Where bitsandbytes repacks weights for AVX512-BF16, adapters lose their gradients, so it must not."""
    models = make(str(make_tiny_model(tmp_path / "wider", hidden_size=64)))
    layers = [layer for layer in models.policy.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    if not functional.has_avx512bf16():
        return
    expected = gradients(models)
    for layer in layers:
        # It fails on other sizes.
        layer.support_avx512bf16_for_cpu = layer.out_features % 32 == layer.in_features % 32 == 0
    roll_out(models)
    assert max(errors(gradients(models), expected).values()) > 0.1


def test_the_weights_are_nf4(path):
    """Each differs from what was read by at most half of the largest step of the 16, times its block's largest."""
    dense, quantized = (load_causal_lm(ModelConfig(name_or_path=path, quantization=q)) for q in (None, "nf4"))
    found = dict(quantized.named_modules())
    count = 0
    for name, layer in dense.named_modules():
        if type(layer) is not nn.Linear:
            continue
        if layer is dense.lm_head:
            assert type(found[name]) is nn.Linear
            assert found[name].weight is quantized.get_input_embeddings().weight
            continue
        count += 1
        assert found[name].weight.nbytes == -(-layer.weight.numel() // 2)
        errors = (dense_layer(found[name]).weight - layer.weight).flatten()
        blocks = layer.weight.flatten().split(64)
        for block, error in zip(blocks, errors.split(64), strict=True):
            assert error.abs().max() <= (0.5 * 0.3039 + 0.02) * block.abs().max()
        assert error.abs().max() > 0
    assert count == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 16, 32, 34, 48, 64, 96, 160, 192, 288])
def test_layers_of_every_width_compute_with_their_weights(columns, dtype):
    """A product, its gradient and the weight of `dense_layer`, against the table of nf4 and the scales of its blocks.

    The code for AVX-512 mistakes the blocks of rows of 16, 32 or 48 numbers, for example.
    """
    torch.manual_seed(columns)
    model = nn.Sequential(nn.Linear(columns, 33))
    model.get_output_embeddings = model.get_input_embeddings = lambda: None
    quantize_(model.to(dtype), device=torch.device("cpu"), compute_dtype=torch.float32)
    layer, state = model[0], model[0].weight.quant_state
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = layer.weight.detach().flatten()
    table = functional.get_4bit_type("nf4", device="cpu")
    numbers = table[torch.stack([packed >> 4, packed & 15], 1).flatten().long()][: 33 * columns]
    weight = (numbers * scales.repeat_interleave(64)[: 33 * columns]).view(33, columns)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(dense_layer(layer).weight.float(), weight, **tolerance)
    x = torch.randn(5, columns, requires_grad=True)
    for needs_gradient in (True, False):
        with torch.set_grad_enabled(needs_gradient):
            y = layer(x)
        torch.testing.assert_close(y, x @ weight.T + layer.bias.float(), **tolerance)
        if needs_gradient:
            y.sin().sum().backward()
            torch.testing.assert_close(x.grad, y.detach().cos() @ weight, **tolerance)


def test_a_second_loading_gives_the_same_bits(path):
    config = ModelConfig(name_or_path=path, quantization="nf4")
    first, second = (load_causal_lm(config).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert any(name.endswith("nested_absmax") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_reference_is_the_base_alone_and_nothing_else_moves(path):
    models = make(path)
    trained = {name for name, p in models.policy.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in models.policy.state_dict().items()}
    base = PolicyModels(
        ModelConfig(name_or_path=path, quantization="nf4", reference="none"), device=torch.device("cpu"), num_values=0
    )
    roll_out(models)
    reference, _ = models.reference_hidden(*batch())
    with torch.no_grad():
        expected, _ = base.hidden(*batch())
        policy, _ = models.hidden(*batch())
    assert torch.equal(reference, expected)
    assert not torch.allclose(policy, reference, atol=0.1)
    with contextlib.suppress(KeyError), models._as_reference():
        raise KeyError
    assert torch.equal(models.hidden(*batch())[0].detach(), policy)
    assert {name for name, p in models.policy.named_parameters() if p.requires_grad} == trained
    assert models.policy_parameters().keys() | {n for n in models.value_parameters() if is_critics(n)} == trained
    after = models.policy.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_kept_pass_is_the_policys(path):
    """The critic and the reference, which come between, use the same layers."""
    models = make(path)
    expected = gradients(models)
    with torch.no_grad():
        models.hidden_before_update(*batch())
        models.values(None, *batch())
        models.reference_hidden(*batch())
    kept = models._kept
    assert kept is not None
    calls = []
    models.policy.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(models)
    assert len(calls) == 1  # the critic's
    assert max(errors(found, expected).values()) < 1e-5


@pytest.mark.parametrize("tie", [True, False])
def test_merged_weights_compute_what_was_trained(path, tmp_path, tie):
    models = make(path if tie else str(make_tiny_model(tmp_path / "untied", hidden_size=40, tie=False)))
    before = {name: tensor.clone() for name, tensor in models.policy.state_dict().items()}
    sequences = batch()[0]
    with torch.no_grad():
        expected = models.policy(sequences).logits
        merged = merge_lora(models.policy)
        merged.save_pretrained(tmp_path / "merged")
        saved = load_causal_lm(ModelConfig(name_or_path=str(tmp_path / "merged")))
        for model in (merged, saved):
            torch.testing.assert_close(model(sequences).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(map(is_quantized, merged.modules()))
    assert not [name for name in merged.state_dict() if "lora" in name or "absmax" in name]
    after = models.policy.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_bias_and_bfloat16():
    """bfloat16 weights on a base of float32 products, and the dtypes of what is merged."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True)).bfloat16().eval()
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None:
            nn.init.normal_(layer.bias)
    expected = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    quantize_(model, device=torch.device("cpu"), compute_dtype=torch.float32)
    ids = torch.randint(0, 61, (2, 5))
    logits = model(ids).logits
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if is_quantized(layer):
                setattr(parent, name, dense_layer(layer))
    found = dict(model.named_parameters())
    assert {p.dtype for p in found.values()} == {torch.bfloat16}
    assert len(expected) == 4
    assert all(torch.equal(found[name], bias) for name, bias in expected.items())
    torch.testing.assert_close(model(ids).logits, logits, rtol=0.05, atol=0.05)


def test_adapters_alone_come_back(path, tmp_path):
    models = make(path)
    for name in ("default", VALUE):
        (tmp_path / name).mkdir()
        save_adapters(models.policy, tmp_path / name, name)
        tensors = load_file(tmp_path / name / WEIGHTS_FILE)
        assert len(tensors) == 28
    config = ModelConfig(name_or_path=path, quantization="nf4")
    loaded = load_adapters(load_causal_lm(config), tmp_path / "default")
    sequences = batch()[0]
    with torch.no_grad():
        assert torch.equal(loaded(sequences).logits, models.policy(sequences).logits)
    assert not any(p.requires_grad for p in loaded.parameters())

    other = str(make_tiny_model(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"default: not adapters of this model \(.*size mismatch"):
        load_adapters(load_causal_lm(ModelConfig(name_or_path=other)), tmp_path / "default")
    with pytest.raises(ModelError, match=r"holds adapters \(adapter_config\.json\), not a model; name the model"):
        load_causal_lm(ModelConfig(name_or_path=str(tmp_path / "default")))
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, tmp_path / VALUE / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="is in one of them only"):
        load_adapters(load_causal_lm(config), tmp_path / VALUE)
    (tmp_path / VALUE / WEIGHTS_FILE).write_bytes(b"x" * 30)
    with pytest.raises(ModelError, match="not adapters of this model"):
        load_adapters(load_causal_lm(config), tmp_path / VALUE)


def test_adapters_of_modules_that_are_called_value(tmp_path):
    """peft filters by names what it saves."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 1}
    config = BertGenerationConfig(**sizes, num_attention_heads=2, is_decoder=True, max_position_embeddings=32)
    BertGenerationDecoder(config).save_pretrained(tmp_path / "model")
    models = make(str(tmp_path / "model"))
    assert "lora_A" in dict(models.policy.get_base_model().bert.encoder.layer[0].attention.self.value.named_children())
    save_adapters(models.policy, tmp_path)
    base = load_causal_lm(ModelConfig(name_or_path=str(tmp_path / "model"), quantization="nf4"))
    loaded = load_adapters(base, tmp_path)
    ids = torch.randint(3, 61, (2, 5))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, models.policy(ids).logits)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"^model\.quantization needs bitsandbytes; pip install "),
        ("0.41.3", r"^model\.quantization needs bitsandbytes 0\.\d+ or later, this is 0\.41\.3; pip install "),
    ],
)
def test_a_missing_or_old_bitsandbytes(path, monkeypatch, version, message):
    if version is None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        monkeypatch.setattr("fastppo.models.quantize.importlib.metadata.version", lambda name: version)
    monkeypatch.setattr("fastppo.models.load.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=message):
        load_causal_lm(ModelConfig(name_or_path=path, quantization="nf4"))


def test_what_cannot_be_quantized_or_adapted(path, tmp_path):
    with pytest.raises(ModelError, match=r"^model\.lora\.target_modules: \['lm_head', 'q_proj'\] names the head"):
        make(path, lora=LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    for model, share in (
        (MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)), 19),
        (GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=2, n_positions=32)), 0),
    ):
        with pytest.raises(ModelError, match=rf"linear layers, which alone .* {share}% of the .* set it to null$"):
            quantize_(model, device=torch.device("cpu"), compute_dtype=torch.float32)
        assert not any(map(is_quantized, model.modules()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_critic_of_adapters_on_a_dense_base(path, checkpointing):
    """Its values and gradients are those of a model of its own with these adapters merged."""
    models = make(path, quantization=None, gradient_checkpointing=checkpointing)
    found = gradients(models)
    base = load_causal_lm(ModelConfig(name_or_path=path))
    own = ValueModel.from_causal_lm(base)
    with torch.no_grad():
        for name, layer in models.policy.named_modules():
            if hasattr(layer, "lora_A") and VALUE in layer.lora_A:
                target = own.backbone.get_submodule(name.removeprefix("base_model.model.model."))
                target.weight += layer.get_delta_weight(VALUE)
        for name, parameter in own.head.named_parameters():
            parameter.copy_(models.value_parameters()[name])
    values = own(*batch()[:2])[:, -BATCH[2] - 1 : -1]
    real = batch()[1][:, -BATCH[2] :].bool()
    (values * real).sin().sum().backward()
    torch.testing.assert_close(found["values"][..., 0], (values * real).detach(), rtol=1e-4, atol=1e-4)
    for name, layer in models.policy.named_modules():
        if hasattr(layer, "lora_A") and VALUE in layer.lora_A:
            weight = own.backbone.get_submodule(name.removeprefix("base_model.model.model.")).weight
            expected = layer.scaling[VALUE] * layer.lora_B[VALUE].weight.T @ weight.grad  # dL/dA = s Bᵀ dL/dW
            assert errors({"A": found[f"{name}.lora_A.{VALUE}.weight"]}, {"A": expected})["A"] < 1e-4
