"""TRL's trainers with and without fastppo: the same steps, the same curves."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import make_tiny_model

import fastppo

trl = pytest.importorskip("trl", reason="the integration is with TRL")
datasets = pytest.importorskip("datasets", reason="TRL's trainers take datasets")
transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

import fastppo.integrations.trl as fastppo_trl  # noqa: E402
from fastppo.integrations.transformers import SLOT  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    return lambda: (transformers.AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True), tokenizer)


def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def _arguments(trainer: str, output_dir, **options) -> dict:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    } | options


_TRAINERS = {"grpo": ("GRPOConfig", "GRPOTrainer"), "rloo": ("RLOOConfig", "RLOOTrainer")}


def _train(kind: str, load, output_dir, *, steps: int = 4, peft_config=None, **options):
    """Train; returns the trainer and its curves."""
    config_class, trainer_class = (getattr(trl, name) for name in _TRAINERS[kind])
    model, tokenizer = load()
    trainer = trainer_class(
        model=model,
        reward_funcs=vowels,
        args=config_class(**_arguments(kind, output_dir, max_steps=steps, **options)),
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"Number {n} is" for n in range(16)]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def _plain_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
    """What TRL's function does, written out: from the model's own logits, all of them."""
    own = model.forward

    def forward(*args, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return own(*args, **kwargs)
        log_p = (own(*args, **kwargs).logits[:, :-1].float() / temperature).log_softmax(-1)
        mask = labels[:, 1:] != -100
        picked = log_p.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)
        entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0.0)
        return FusedCausalLMOutput(
            loss=-picked.sum() / mask.sum().clamp(min=1),
            log_probs=picked,
            entropy=entropy if "entropy" in outputs else None,
            label_mask=mask,
        )

    model.forward = forward


@pytest.fixture(params=["its own logits", "TRL's own function"])
def baseline(request, monkeypatch):
    """The function that ours is compared with, set in the trainers' modules."""
    if request.param == "its own logits":
        for name in ("grpo", "rloo"):
            monkeypatch.setattr(f"trl.trainer.{name}_trainer.add_fused_lm_head", _plain_fused_lm_head)
    elif Version(trl.__version__) < Version("1.16") and not torch.cuda.is_available():
        pytest.skip("TRL's own function needs a GPU before 1.16")


def _assert_same_curves(ours: list[dict], own: list[dict], rtol: float) -> None:
    assert len(ours) == len(own)
    for row, want in zip(ours, own, strict=True):
        for name in ("loss", "reward", "entropy", "grad_norm", "kl"):
            if name in want:
                # A loss of whitened advantages is a small difference of terms of size 1.
                assert row[name] == pytest.approx(want[name], rel=rtol, abs=rtol), (name, row["step"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("grpo", {"beta": 0.1, "num_iterations": 2, "temperature": 0.8, "gradient_accumulation_steps": 2}),
        ("rloo", {"beta": 0.1, "temperature": 0.8}),
    ],
)
def test_same_curves_as_without(kind, options, baseline, load, tmp_path, monkeypatch):
    _, own = _train(kind, load, tmp_path / "own", **options)
    monkeypatch.undo()
    with fastppo_trl.patched():
        trainer, ours = _train(kind, load, tmp_path / "ours", **options)
    assert vars(trainer.model)[SLOT].temperature == 0.8
    _assert_same_curves(ours, own, rtol=2e-3)
    assert max(abs(row["kl"]) for row in own) > 1e-4  # there was something to compare


def test_adapters(load, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="needs peft's adapters")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"])
    options = {"beta": 0.1, "peft_config": config, "steps": 3}
    monkeypatch.setattr("trl.trainer.grpo_trainer.add_fused_lm_head", _plain_fused_lm_head)
    _, own = _train("grpo", load, tmp_path / "own", **options)
    monkeypatch.undo()
    with fastppo_trl.patched():
        trainer, ours = _train("grpo", load, tmp_path / "ours", **options)
    assert SLOT in vars(trainer.model.get_base_model())
    _assert_same_curves(ours, own, rtol=2e-3)


@pytest.mark.parametrize("cast", [False, True])
def test_every_field_and_gradient_of_the_fused_head(cast, baseline, load):
    """The function in TRL's place against another, called alike."""
    from trl.trainer.grpo_trainer import add_fused_lm_head

    ours, _ = load()
    own = copy.deepcopy(ours)
    arguments = {"temperature": 0.7, "cast_lm_head_to_fp32": cast, "outputs": ("log_probs", "entropy")}
    fastppo_trl.add_fused_lm_head(ours, **arguments)
    add_fused_lm_head(own, **arguments)
    ids = torch.randint(3, 300, (3, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    results = [model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (ours, own)]
    assert type(results[0]) is type(results[1])
    assert results[0].keys() == results[1].keys()
    for name in results[1]:
        torch.testing.assert_close(
            results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )
    upstream = torch.randn(3, 8)
    for out in results:
        ((upstream * out.log_probs).sum() + 0.1 * out.entropy.sum()).backward()
    for ours_p, own_p in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, own_p.grad, rtol=1e-3, atol=1e-4 * own_p.grad.abs().max().item() + 1e-7)
    assert results[0].loss.requires_grad
    fastppo_trl.add_fused_lm_head(copy.deepcopy(fastppo.unpatch_model(ours)))  # no entropy asked for
    assert "forward" not in vars(ours)


def test_a_second_trainer_of_a_prepared_model_has_its_own_settings(load):
    """Accelerate wraps the forward of the first trainer's model for bfloat16; the second finds it so."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from trl.trainer import grpo_trainer

    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainers that other tests made
    model, _ = load()
    ids = torch.randint(3, 300, (2, 7))
    with fastppo_trl.patched():
        grpo_trainer.add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        model = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        AcceleratorState._reset_state(reset_partial_state=True)
        grpo_trainer.add_fused_lm_head(model, temperature=0.5)
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    z = model(input_ids=ids).logits[:, :-1].float() / 0.5
    want = z.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert out.entropy is None
    torch.testing.assert_close(out.log_probs, want, atol=0.5, rtol=0.05)  # the logits are bfloat16 in `want`


def test_patching_is_refused_twice_and_undone(load, tmp_path):
    from trl.trainer import grpo_trainer, rloo_trainer
    from trl.trainer.utils import add_fused_lm_head

    with pytest.raises(RuntimeError, match="not patched by fastppo"):
        fastppo_trl.unpatch()
    with fastppo_trl.patched():
        assert grpo_trainer.add_fused_lm_head is not add_fused_lm_head
        with pytest.raises(RuntimeError, match="already patched by fastppo"):
            fastppo_trl.patch()
    assert grpo_trainer.add_fused_lm_head is add_fused_lm_head
    assert rloo_trainer.add_fused_lm_head is add_fused_lm_head


def test_foreign_patches_are_refused(load, monkeypatch):
    from trl.trainer import rloo_trainer
    from trl.trainer.utils import add_fused_lm_head

    monkeypatch.setattr(rloo_trainer, "add_fused_lm_head", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="another patch is in place"):
        fastppo_trl.patch()
    monkeypatch.undo()
    monkeypatch.setattr("trl.trainer.utils.add_fused_lm_head", lambda model, temperature, chunk_size: None)
    with pytest.raises(RuntimeError, match="not one that fastppo knows"):
        fastppo_trl.patch()
    monkeypatch.undo()

    # A model that TRL has patched already, and one that fastppo.patch_model has.
    model, _ = load()
    add_fused_lm_head(model)
    for patch in (fastppo.patch_model, fastppo_trl.add_fused_lm_head):
        with pytest.raises(RuntimeError, match=r"trl\.trainer\.utils has replaced the forward"):
            patch(model)
    model = fastppo.patch_model(load()[0])
    with pytest.raises(RuntimeError, match="call unpatch_model first"):
        fastppo_trl.add_fused_lm_head(model)
    model, _ = load()
    fastppo_trl.add_fused_lm_head(model, temperature=0.5)
    fastppo_trl.add_fused_lm_head(model, temperature=0.7)  # a second trainer of the same model
    assert vars(model)[SLOT].temperature == 0.7


@pytest.mark.parametrize("found", ["1.14.2", "2.0.0"])
def test_unsupported_versions_are_named(found, monkeypatch):
    monkeypatch.setattr("fastppo.integrations.patching.version", lambda name: found)
    with pytest.raises(ImportError, match=rf"trl {found} is installed, but fastppo supports trl>=1.15,<2"):
        fastppo_trl.patch()
