"""`patch_model` on tiny random instances of real architectures, against each model's own logits."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from architectures import OPTIONS, SMALL, random_model, randomize
from torch import nn

import fastppo
from fastppo.integrations.patching import require

transformers = pytest.importorskip("transformers", reason="the integration is with transformers")

_ARCHITECTURES = [kind for kind in OPTIONS if kind not in ("gpt_neox", "opt", "bloom", "llama4_text", "hyperclovax")]


def _random_model(kind: str = "llama", **options) -> nn.Module:
    own = {"tie_word_embeddings": True} if kind == "qwen3" else {}
    return random_model(kind, head_scale=3.0, **own | options)


def _vision_language_model() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = SMALL | {"head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6
    )
    return randomize(Gemma3ForConditionalGeneration(config), head_scale=3.0)


def _batch(rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Right-padded rows, labels for some of the tokens."""
    ids = torch.randint(7, 97, (rows, length))
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _plain(model: nn.Module, batch: dict[str, torch.Tensor], temperature: float = 1.0):
    """Log-probabilities, entropy and loss the plain way, from the model's own logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    log_p = (model(**inputs).logits[:, :-1] / temperature).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    logprobs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0.0)
    return -logprobs.sum() / mask.sum(), logprobs, entropy


def _gradients(model: nn.Module, objective: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same_as_plain(model: nn.Module, plain: nn.Module, batch, *, temperature=1.0, rtol=1e-9) -> None:
    """Outputs and gradients of the patched model, and of an unpatched copy from its logits."""
    out = model(**batch, return_logprobs=True)
    loss, logprobs, entropy = _plain(plain, batch, temperature)
    scale = max(1.0, logprobs.abs().max().item())
    for ours, own in ((out.loss, loss), (out.logprobs, logprobs), (out.entropy, entropy)):
        torch.testing.assert_close(ours, own.to(ours.dtype), rtol=rtol, atol=rtol * scale)
    assert out.label_mask.equal(batch["labels"][:, 1:] != -100)
    weights = torch.randn_like(logprobs)
    ours = _gradients(model, out.loss + (weights.to(out.logprobs) * out.logprobs).sum() + 0.3 * out.entropy.sum())
    own = _gradients(plain, loss + (weights * logprobs).sum() + 0.3 * entropy.sum())
    assert ours.keys() == own.keys()
    largest = max(gradient.abs().max().item() for gradient in own.values())
    for name in own:
        torch.testing.assert_close(ours[name], own[name], rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kind", _ARCHITECTURES)
def test_every_architecture_agrees_with_its_own_logits(kind):
    # Mamba's cache and kernels are for float32.
    exact = kind not in ("falcon_h1",)
    model = _random_model(kind)
    model = model.double() if exact else model
    plain = copy.deepcopy(model)
    assert fastppo.patch_model(model, temperature=0.7) is model
    _assert_same_as_plain(model, plain, _batch(), temperature=0.7, rtol=1e-9 if exact else 2e-4)


def test_text_of_a_vision_language_model():
    model = _vision_language_model().double()
    plain = copy.deepcopy(model)
    fastppo.patch_model(model)
    batch = _batch()
    image = torch.tensor([6, 5, 5, 5, 5])  # begin of image, and the places of its four tokens
    batch["input_ids"][:, :5] = image
    batch["token_type_ids"] = (batch["input_ids"] == 5).long()
    batch["pixel_values"] = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    batch["labels"][:, :6] = -100
    _assert_same_as_plain(model, plain, batch)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss_of_a_mixture_of_experts(kind):
    options = {"head_dim": 8, "moe_intermediate_size": 8} if kind == "qwen3_moe" else {}
    experts = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    model = _random_model(kind, num_experts_per_tok=2, router_aux_loss_coef=0.3, **options, **{experts: 4})
    plain = copy.deepcopy(model)
    fastppo.patch_model(model)
    batch = _batch()
    assert model(**batch, return_logprobs=True).aux_loss is None
    out = model(**batch, return_logprobs=True, output_router_logits=True)
    own = plain(**batch, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, own.aux_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-4, atol=1e-4)
    # The switch in the configuration counts too, as it does for the model's own forward.
    model.config.output_router_logits = True
    torch.testing.assert_close(model(**batch, return_logprobs=True).loss, own.loss, rtol=1e-4, atol=1e-4)


# ---- the call


def test_loss_is_transformers_own():
    model = fastppo.patch_model(_random_model())
    batch = _batch()
    for extra in ({}, {"num_items_in_batch": torch.tensor(41)}):
        own = model(**batch, **extra).loss
        torch.testing.assert_close(model(**batch, **extra, return_logprobs=True).loss, own, rtol=1e-4, atol=1e-4)
    # Labels that the caller has shifted already, as under sequence parallelism.
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    out = model(**inputs, shift_labels=shifted, return_logprobs=True)
    want = model(**batch, return_logprobs=True)
    assert out.logprobs.shape == shifted.shape
    assert out.logprobs[:, :-1].equal(want.logprobs)
    torch.testing.assert_close(out.loss, want.loss)


def test_call_by_position_and_without_labels():
    model = fastppo.patch_model(_random_model("gpt2"))  # whose backbone's arguments have another order
    batch = _batch()
    want = model(**batch, return_logprobs=True)
    names = list(inspect.signature(model.forward).parameters)
    place = names.index("attention_mask")
    arguments = [batch["input_ids"], *[None] * (place - 1), batch["attention_mask"]]
    assert model(*arguments, labels=batch["labels"], return_logprobs=True).logprobs.equal(want.logprobs)
    with pytest.raises(ValueError, match="labels: required"):
        model(input_ids=batch["input_ids"], return_logprobs=True)
    ids = batch["input_ids"]
    for name in ("labels", "shift_labels"):
        for wrong in (ids.tolist(), ids.float(), ids[:1], ids[0]):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
                model(**batch | {name: wrong}, return_logprobs=True)
        outside = ids.clone()
        outside[1, 2] = 97
        with pytest.raises(ValueError, match=rf"^{name}: expected ids in \[0, 97\) .* got 97 at \(1, 2\)$"):
            model(**batch | {name: outside}, return_logprobs=True)
    outside[1, 2], outside[:, 0] = 5, -7  # read by nobody, there or in transformers
    assert model(**batch | {"labels": outside}, return_logprobs=True).loss.isfinite()
    for wrong in (0, "8"):
        with pytest.raises((TypeError, ValueError), match=r"^num_items_in_batch: expected "):
            model(**batch, num_items_in_batch=wrong, return_logprobs=True)
    with pytest.raises(ValueError, match=r"^backend: expected one of "):
        fastppo.patch_model(_random_model(), backend="cuda")


def test_output_is_of_the_models_own_kind():
    """By attribute, key and index; a tuple where the caller wants one."""
    model = fastppo.patch_model(_random_model())
    batch = _batch()
    out = model(**batch, return_logprobs=True)
    assert isinstance(out, type(model(**batch)).__mro__[1])  # ModelOutput
    assert list(out) == ["loss", "logprobs", "entropy", "label_mask"]
    assert out["loss"] is out[0] is out.loss
    assert out["entropy"] is out[2] is out.entropy
    assert out[:2] == (out.loss, out.logprobs)
    assert out.aux_loss is None
    with pytest.raises(KeyError):
        out["aux_loss"]
    assert pickle.loads(pickle.dumps(type(out)(loss=out.loss.detach()))).loss == out.loss
    given = model(**batch, return_logprobs=True, return_dict=False)
    assert isinstance(given, tuple)
    assert all(ours.equal(own) for ours, own in zip(given, out.to_tuple(), strict=True))


def test_no_labels_at_all_give_zeros_that_backpropagate():
    model = fastppo.patch_model(_random_model())
    batch = _batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = model(**batch, return_logprobs=True)
    out.loss.backward()
    assert out.loss == 0
    assert model.lm_head.weight.grad.abs().max() == 0


def test_generation_and_logits_are_unchanged():
    model = _random_model("qwen3")
    ids = torch.randint(7, 97, (2, 5))
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    tokens, logits = model.generate(ids, **arguments), model(ids).logits
    fastppo.patch_model(model)
    assert model.generate(ids, **arguments).equal(tokens)
    assert model(ids).logits.equal(logits)
    fastppo.unpatch_model(model)
    assert "forward" not in vars(model)
    assert model.generate(ids, **arguments).equal(tokens)


def test_copies_are_patched_by_themselves():
    model = fastppo.patch_model(_random_model())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    batch = _batch()
    assert copied(batch["input_ids"]).logits.abs().max() == 0
    entropy = copied(**batch, return_logprobs=True).entropy.max()
    torch.testing.assert_close(entropy, torch.tensor(97.0).log())  # of the uniform distribution
    fastppo.unpatch_model(copied)
    assert model(**batch, return_logprobs=True).loss > 0


def test_saved_models_carry_nothing_of_the_patch(tmp_path):
    model = _random_model()
    fastppo.patch_model(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    ids = _batch()["input_ids"]
    assert loaded(ids).logits.equal(model(ids).logits)
    fastppo.patch_model(loaded)


# ---- who patched what


def test_patching_twice_is_refused():
    model = fastppo.patch_model(_random_model())
    with pytest.raises(RuntimeError, match="already patched by fastppo"):
        fastppo.patch_model(model)
    fastppo.patch_model(fastppo.unpatch_model(model))
    fastppo.unpatch_model(model)
    with pytest.raises(RuntimeError, match="not patched by fastppo"):
        fastppo.unpatch_model(model)


def test_another_patch_of_the_instance_is_refused():
    model = _random_model()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(RuntimeError, match=f"{__name__} has replaced the forward of LlamaForCausalLM"):
        fastppo.patch_model(model)
    del model.forward
    fastppo.patch_model(model)
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(RuntimeError, match=f"{__name__} has replaced fastppo's forward"):
        fastppo.unpatch_model(model)


def test_another_patch_of_the_class_is_refused(monkeypatch):
    model_class = transformers.LlamaForCausalLM
    own = model_class.forward

    def bare(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    for patched in (bare, functools.wraps(own)(bare)):
        monkeypatch.setattr(model_class, "forward", patched)
        with pytest.raises(RuntimeError, match=f"{__name__} has replaced the forward of LlamaForCausalLM"):
            fastppo.patch_model(_random_model())


def test_another_patch_of_the_head_is_refused():
    model = _random_model()
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(RuntimeError, match="lm_head has been replaced"):
        fastppo.patch_model(model)


def test_liger_is_named():
    model = _random_model()
    liger = pytest.importorskip(
        "liger_kernel.transformers", reason="needs liger-kernel, to be refused", exc_type=ImportError
    )
    liger.apply_liger_kernel_to_llama(
        rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True, model=model
    )
    try:
        with pytest.raises(RuntimeError, match="liger_kernel"):
            fastppo.patch_model(model)
    finally:
        del model.forward


def test_accelerate_hooks_stay_and_its_preparation_comes_after():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate's hooks")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # left by trainers of other tests
    model, batch = _random_model(), _batch()
    plain = copy.deepcopy(model)
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(io_same_device=True))
    hooked = model.forward
    fastppo.patch_model(model)
    torch.testing.assert_close(model(**batch, return_logprobs=True).loss, plain(**batch).loss, rtol=1e-4, atol=1e-4)
    assert fastppo.unpatch_model(model).forward is hooked

    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(_random_model())
    with pytest.raises(RuntimeError, match="before it is prepared"):
        fastppo.patch_model(prepared)


def test_a_head_of_another_kind_is_refused_and_nothing_changed(monkeypatch):
    model = _random_model()

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    model.__class__ = Scaled
    with pytest.raises(ValueError, match="not those of a linear head"):
        fastppo.patch_model(model)
    assert "forward" not in vars(model)
    model.__class__ = transformers.LlamaForCausalLM
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match=r"Sequential, not a torch\.nn\.Linear"):
        fastppo.patch_model(model)


def test_what_is_not_a_transformers_model_is_refused():
    with pytest.raises(TypeError, match="expected a transformers model"):
        fastppo.patch_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="temperature"):
        fastppo.patch_model(_random_model(), temperature=0.0)


def test_unsupported_versions_are_named(monkeypatch):
    monkeypatch.setattr("fastppo.integrations.patching.version", lambda name: "4.30.0")
    with pytest.raises(ImportError, match=r"transformers 4.30.0 is installed.*>=4.57,<6"):
        fastppo.patch_model(_random_model())
    monkeypatch.undo()
    with pytest.raises(ImportError, match="no-such-library is not installed"):
        require("no-such-library", ">=1")


def test_import_needs_only_torch():
    code = """
        import sys, fastppo
        assert "transformers" not in sys.modules and "pydantic" not in sys.modules
        fastppo.patch_model
        assert "transformers" not in sys.modules and "pydantic" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=os.getcwd())


# ---- what surrounds a model in training


@pytest.mark.parametrize(
    ("where", "tie"), [("layers", False), ("layers", True), ("head", False), ("head", True), ("whole head", False)]
)
def test_lora(where, tie):
    peft = pytest.importorskip("peft", reason="needs peft's adapters")
    targets = ["q_proj", "v_proj"] + (["lm_head"] if where == "head" else [])
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        target_modules=targets,
        modules_to_save=["lm_head"] if where == "whole head" else None,
    )
    model = peft.get_peft_model(_random_model(tie_word_embeddings=tie), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model = model.double()
    plain = copy.deepcopy(model)
    fastppo.patch_model(model)
    batch = _batch()
    _assert_same_as_plain(model, plain, batch)
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        out = model(**batch, return_logprobs=True)
        torch.testing.assert_close(out.logprobs, _plain(plain, batch)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """bfloat16 products: ours are no further from float64 than the plain path's, up to rounding."""
    model = _random_model("gemma2").to(dtype)
    batch = _batch(5, 17)
    exact = copy.deepcopy(model).double()
    loss = _plain(exact, batch)[0]
    want = _gradients(exact, loss)
    plain = copy.deepcopy(model)
    fastppo.patch_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(**batch, return_logprobs=True).loss
        own = _plain(plain, batch)[0].float()
    error, naive = (ours - loss).abs(), (own - loss).abs()
    assert error <= 2 * naive + 0.02 * loss

    def distance(gradients):
        return sum((gradients[name].double() - want[name]).square().sum() for name in want).sqrt()

    norm = sum(gradient.square().sum() for gradient in want.values()).sqrt()
    assert distance(_gradients(model, ours)) <= 1.5 * distance(_gradients(plain, own)) + 0.02 * norm


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing(kind):
    model = _random_model(kind).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fastppo.patch_model(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    _assert_same_as_plain(model, plain, _batch())
    assert model.training


def test_compile():
    """One graph, no break, the same numbers."""
    model = fastppo.patch_model(_random_model(num_hidden_layers=1).train())
    plain, batch = copy.deepcopy(model), _batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, want = compiled(**batch, return_logprobs=True), plain(**batch, return_logprobs=True)
    torch.testing.assert_close(out.logprobs, want.logprobs)
    ours, own = _gradients(model, out.loss), _gradients(plain, want.loss)
    for name in own:
        torch.testing.assert_close(ours[name], own[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_with_adapters(bits, tmp_path):
    """QLoRA: frozen 4- or 8-bit layers, adapters and head in float."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes for 4- and 8-bit weights")
    peft = pytest.importorskip("peft", reason="needs peft's adapters")
    _random_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, local_files_only=True
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "lm_head"])
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    fastppo.patch_model(model)
    batch = _batch()
    out = model(**batch, return_logprobs=True)
    loss, logprobs, _ = _plain(model, batch)  # the same model's own logits: quantized layers cannot be copied
    torch.testing.assert_close(out.logprobs, logprobs, rtol=1e-3, atol=1e-3)
    ours, own = _gradients(model, out.loss), _gradients(model, loss)
    assert ours.keys() == own.keys()
    assert ours
    for name in own:
        torch.testing.assert_close(ours[name], own[name], rtol=1e-2, atol=1e-3 * own[name].abs().max().item())


# ---- two hundred steps


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_two_hundred_steps_follow_the_plain_curve(half):
    """Errors too small to see in one step would add up: sums in low precision bias training."""
    torch.manual_seed(0)  # the curve's shape is what is compared, so it is always the same one
    plain = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL | {"tie_word_embeddings": True, "initializer_range": 0.1})
    )
    model = fastppo.patch_model(copy.deepcopy(plain), temperature=0.8)
    batch = _batch(8, 12)
    advantages = torch.randn(8, 11)
    curves = []
    for policy in (model, plain):
        optimizer, curve = torch.optim.AdamW(policy.parameters(), lr=1e-3), []
        for _ in range(200):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                if policy is model:
                    _, logprobs, entropy = policy(**batch, return_logprobs=True)[:3]
                else:
                    _, logprobs, entropy = _plain(policy, batch, temperature=0.8)
            # A policy gradient that pulls some tokens up, pushes some down, and is held by an entropy bonus.
            loss = -(advantages * logprobs.exp()).mean() - 0.02 * entropy.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    fall = curves[1][0] - curves[1][-1]
    assert fall > 0.1
    assert (curves[0] - curves[1]).abs().max() < (0.02 if half else 0.002) * fall
