"""The PPOTrainer that an old TRL script finds: it trains, saves, resumes, evaluates and logs."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from tiny import make_tiny_model
from torch import nn

transformers = pytest.importorskip("transformers", reason="the trainer is transformers' own")
datasets = pytest.importorskip("datasets", reason="prompts come as a dataset")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

from fastppo.integrations import trl_ppo  # noqa: E402
from fastppo.integrations.trl_ppo import PPOConfig, PPOTrainer  # noqa: E402
from fastppo.rollout.choose import open_engine  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def _classifier(tiny, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, local_files_only=True)


def _trainer(
    tiny, output_dir, *, pad=None, eos="same", peft_config=None, callbacks=None, models=None, data=None, **options
) -> PPOTrainer:
    """The trainer as an old script builds it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny, local_files_only=True, padding_side="left")
    tokenizer.eos_token = tokenizer.eos_token if eos == "same" else eos
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    prompts = [f"{'Good ' * (n % 3)}Number {n} is" for n in range(24)]
    dataset = datasets.Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    given = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True),
        "ref_model": None,
        "reward_model": _classifier(tiny, 1),
        "value_model": _classifier(tiny, 2),
    } | (models or {})
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": 5,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "total_episodes": 32,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | options
    given |= {"train_dataset": dataset, "eval_dataset": dataset.select(range(4))}
    given |= {"args": PPOConfig(**arguments), "processing_class": tokenizer} | (data or {})
    return PPOTrainer(peft_config=peft_config, callbacks=callbacks, **given)


def _narrow(tiny) -> nn.Module:
    """A model of fewer tokens than the tokenizer has."""
    config = transformers.AutoConfig.from_pretrained(tiny, local_files_only=True, vocab_size=100)
    return transformers.AutoModelForCausalLM.from_config(config)


def _parameters(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_names_and_defaults_are_trls(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    expected = {
        "learning_rate": 3e-6,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "cliprange": 0.2,
        "vf_coef": 0.1,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "whiten_rewards": False,
        "response_length": 53,
        "temperature": 0.7,
        "missing_eos_penalty": None,
        "stop_token": None,
        "total_episodes": None,
        "local_rollout_forward_batch_size": 64,
        "num_sample_generations": 10,
        "run_name": None,
        "dataset_num_proc": None,
        "stop_token_id": None,
        "sft_model_path": "EleutherAI/pythia-160m",
        "reward_model_path": "EleutherAI/pythia-160m",
        "exp_name": "ppo_config",
        "model_adapter_name": None,
        "ref_adapter_name": None,
        "ds3_gather_for_generation": True,
        "push_to_hub": False,
        "num_total_batches": None,
        "micro_batch_size": None,
        "local_batch_size": None,
        "batch_size": None,
        "local_mini_batch_size": None,
        "mini_batch_size": None,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    # Scripts parse them from the command line.
    parsed = transformers.HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--kl_coef", "0.1", "--stop_token", "eos", "--use_cpu", "true"]
    )[0]
    assert (parsed.kl_coef, parsed.stop_token) == (0.1, "eos")
    # A configuration that was written down, or is copied, comes with every field.
    assert PPOConfig(**parsed.to_dict() | {"hub_token": None}) == parsed  # transformers hides that one
    assert dataclasses.replace(parsed, kl_coef=0.2).kl_coef == 0.2
    for wrong in (
        {"kl_estimator": "k4"},
        {"stop_token": "x"},
        {"stop_token": "eos", "stop_token_id": 3},
        {"stop_token_id": -1},
        {"total_episodes": 0},
        {"total_episodes": "many"},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"response_length": 1.5},
        {"response_length": None},
        {"local_rollout_forward_batch_size": 2.5},
        {"missing_eos_penalty": math.nan},
        {"num_sample_generations": -1},
        {"num_mini_batches": 0},
        {"gradient_accumulation_steps": 0},
        {"kl_coef": -0.1},
        {"cliprange": -0.1},
        {"cliprange_value": "wide"},
        {"batch_size": 7},
        {"world_size": 2},
        {"num_total_batches": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
            PPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **wrong)
        assert "\n" not in str(caught.value)


def test_scripts_can_read_what_trl_computes(tiny, tmp_path):
    trainer = _trainer(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, total_episodes=20)
    right = {
        "world_size": 1,
        "local_batch_size": 6,
        "micro_batch_size": 2,
        "batch_size": 6,
        "local_mini_batch_size": 3,
        "mini_batch_size": 3,
        "num_total_batches": 4,
        "total_episodes": 20,
    }
    for args in (trainer.ppo_args, trainer.args):
        assert {name: getattr(args, name) for name in right} == right
        assert args.run_name.startswith(f"ppo_config__{args.seed}__")
    assert PPOConfig(**trainer.ppo_args.to_dict()).batch_size == 6  # given, and right
    assert _trainer(tiny, tmp_path, total_episodes=None).ppo_args.total_episodes == 72  # three epochs of 24 prompts
    trainer = _trainer(tiny, tmp_path, total_episodes=None, max_steps=2, run_name="mine")
    assert (trainer.args.total_episodes, trainer.args.num_total_batches, trainer.args.run_name) == (16, 2, "mine")
    with pytest.raises(ValueError, match="num_train_epochs"):
        _trainer(tiny, tmp_path, total_episodes=None, num_train_epochs=0.01)


def test_trains_logs_and_saves(tiny, tmp_path):
    trainer = _trainer(tiny, tmp_path, stop_token="eos", missing_eos_penalty=1.0)
    before, reference = _parameters(trainer), copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    after = _parameters(trainer)
    assert trainer.state.global_step == 4  # 32 episodes in rollouts of 8
    assert any(not after[name].equal(before[name]) for name in before if name.startswith("policy."))
    assert any(not after[name].equal(before[name]) for name in before if name.startswith("value_model."))
    assert all(value.equal(reference[name]) for name, value in trainer.ref_model.state_dict().items())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["episode"] for row in rows] == [8, 16, 24, 32]
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the policy is still its reference
    assert rows[0]["policy/approxkl_avg"] >= 0
    averages = ("policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg")
    objectives = ("objective/scores", "objective/rlhf_reward", "objective/entropy", "objective/non_score_reward")
    for name in (*objectives, *averages, "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr"):
        assert all(torch.tensor(row[name]).isfinite() for row in rows), name

    trainer.save_model(str(tmp_path / "final"))
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", local_files_only=True)
    value = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "final" / "value_model", local_files_only=True
    )
    for saved, name in ((policy, "policy"), (value, "value_model")):
        for key, parameter in saved.named_parameters():
            assert parameter.equal(after[f"{name}.{key}"]), key
    files = {path.suffix for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert not files & {".bin", ".pt", ".pth", ".pkl"}


def test_the_last_rollouts_are_logged_whatever_logging_steps_is(tiny, tmp_path):
    trainer = _trainer(tiny, tmp_path, logging_steps=3, learning_rate=0.0)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert [row["episode"] for row in rows] == [24, 32]
    assert all(row["val/ratio_var"] == pytest.approx(0.0, abs=1e-12) for row in rows)


def test_one_engine_samples_all_rollouts(tiny, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(trl_ppo, "open_engine", lambda *args: opened.append(open_engine(*args)) or opened[-1])
    trainer = _trainer(tiny, tmp_path, total_episodes=16)
    trainer.train()
    trainer.evaluate()
    assert len(opened) == 1


def test_resumed_run_ends_at_the_same_bits(tiny, tmp_path):
    """Policy, value model, optimizer, schedule, data order and random numbers all go on."""
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear", "save_total_limit": 2}
    whole = _trainer(tiny, tmp_path / "whole", **options)
    whole.train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    _trainer(tiny, tmp_path / "parts", callbacks=[Stop()], **options).train()
    checkpoints = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    # A kill while the next was being written leaves this behind.
    (tmp_path / "parts" / ".saving" / "checkpoint-3").mkdir(parents=True)
    resumed = _trainer(tiny, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    want = _parameters(whole)
    for name, parameter in _parameters(resumed).items():
        assert parameter.equal(want[name]), name
    curves = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert curves[0] == curves[1]


def test_evaluates_without_changing_the_run(tiny, tmp_path, capsys):
    plain = _trainer(tiny, tmp_path / "plain")
    plain.train()
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_sample_generations": 2}
    watched = _trainer(tiny, tmp_path / "watched", **options)
    watched.train()
    want = _parameters(plain)
    assert all(parameter.equal(want[name]) for name, parameter in _parameters(watched).items())
    rows = [row for row in watched.state.log_history if "eval_objective/scores" in row]
    assert len(rows) == 4
    assert watched.evaluate() == watched.evaluate()
    assert set(watched.evaluate()) == {
        "eval_objective/scores",
        "eval_objective/kl",
        "eval_objective/rlhf_reward",
        "eval_response_length",
    }
    shown = watched.generate_completions()
    assert len(shown) == 4
    assert shown[0]["query"].endswith("Number 0 is")
    assert "Number 0 is" in capsys.readouterr().out


@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_added_pad_token_needs_no_embedding(adapters, tiny, tmp_path, capsys):
    """Scripts add one to the tokenizer alone."""
    options = {"num_sample_generations": 1, "stop_token_id": 7, "num_ppo_epochs": 1, "num_mini_batches": 1}
    options |= {"save_strategy": "steps", "save_steps": 1, "total_episodes": 16}
    if adapters:
        peft = pytest.importorskip("peft", reason="needs peft's adapters")
        options["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"])
    ends = []
    for pad in (None, "[PAD]"):
        torch.manual_seed(0)  # of the adapters
        trainer = _trainer(tiny, tmp_path / str(pad), pad=pad, **options)
        trainer.train()
        ends.append((_parameters(trainer), trainer.evaluate(), trainer.generate_completions()))
    assert all(parameter.equal(ends[0][0][name]) for name, parameter in ends[1][0].items())
    assert ends[0][1:] == ends[1][1:]
    assert trainer.processing_class.pad_token_id >= trainer.model.policy.get_input_embeddings().num_embeddings
    resumed = _trainer(tiny, tmp_path / "[PAD]", pad=pad, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "[PAD]" / "checkpoint-1"))
    assert all(parameter.equal(ends[0][0][name]) for name, parameter in _parameters(resumed).items())
    trainer.model.value_model.config.pad_token_id = trainer.processing_class.pad_token_id  # as scripts do
    trainer.save_model(str(tmp_path / "final"))
    if not adapters:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", local_files_only=True)
    value_folder = tmp_path / "final" / "value_model"
    transformers.AutoModelForSequenceClassification.from_pretrained(value_folder, local_files_only=True)


def test_several_held_out_datasets_and_none(tiny, tmp_path):
    parts = {name: datasets.Dataset.from_dict({"input_ids": [[n, n + 1]] * 2}) for name, n in (("a", 5), ("b", 9))}
    trainer = _trainer(tiny, tmp_path, data={"eval_dataset": parts}, eval_strategy="steps", total_episodes=8)
    trainer.train()
    metrics = trainer.evaluate()
    assert len(metrics) == 8
    for name in parts:
        assert {key: value for key, value in metrics.items() if f"_{name}_" in key} == trainer.evaluate(
            parts[name], metric_key_prefix=f"eval_{name}"
        )
    assert len(trainer.generate_completions()) == 4
    trainer = _trainer(tiny, tmp_path, data={"eval_dataset": None}, num_sample_generations=3, total_episodes=8)
    trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.generate_completions()


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_prompts_that_are_padded_already(pad, tiny, tmp_path):
    """Scripts tokenize with padding, and may keep no mask."""
    trainer = _trainer(tiny, tmp_path, pad=pad)
    fill = trainer.processing_class.pad_token_id
    for rows in ([[fill, fill, 5, 6], [7, 8, fill, fill]], [[5, 6], [7, 8]]):
        with_mask = trainer.data_collator([{"input_ids": row} for row in rows])
        for batch in (with_mask, {"input_ids": with_mask["input_ids"]}):
            rollout = trainer._sample(batch)
            assert rollout.sequences[:, :2].tolist() == [[5, 6], [7, 8]]
            assert rollout.attention_mask[:, :2].all()


def test_best_model_is_kept_and_loaded(tiny, tmp_path):
    trainer = _trainer(
        tiny,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_objective/scores",
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    saved = transformers.AutoModelForCausalLM.from_pretrained(best, local_files_only=True)
    assert all(p.equal(q) for p, q in zip(saved.parameters(), trainer.model.policy.parameters(), strict=True))
    newest = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert newest["best_model_checkpoint"] == best


def test_learned_prompts_are_refused(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        with pytest.raises(ValueError, match=r"^peft_config: .* outside the model"):
            _trainer(tiny, tmp_path, peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_adapters_train_save_and_resume(tiny, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft's adapters")
    options = {
        "peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"]),
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = _trainer(tiny, tmp_path, **options)
    assert trainer.ref_model is None
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(rows[-1]["objective/kl"]) > 1e-4
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    again = _trainer(tiny, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    want = _parameters(trainer)
    for name, parameter in _parameters(again).items():
        assert parameter.equal(want[name]), name


def test_micro_batches_add_up_to_the_mini_batch(tiny, tmp_path):
    """However a rollout is cut for memory, the first update is the same."""
    ends = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = _trainer(
            tiny,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=8,
            optim="sgd",
        )
        trainer.train()
        ends.append(_parameters(trainer))
    for name, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_changes_no_bit(adapters, tiny, tmp_path):
    options = {"total_episodes": 16}
    if adapters:
        peft = pytest.importorskip("peft", reason="needs peft's adapters")
        options["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"])
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # of the adapters
        trainer = _trainer(tiny, tmp_path, gradient_checkpointing=checkpointing, **options)
        trainer.train()
        for part in (trainer.model.policy, trainer.model.value_model):
            assert part.is_gradient_checkpointing is checkpointing
        ends.append(_parameters(trainer))
    assert all(parameter.equal(ends[1][name]) for name, parameter in ends[0].items())


def test_reference_adapter_stays(tiny, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft's adapters")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True)
    model = peft.get_peft_model(model, config, adapter_name="trained")
    model.add_adapter("fixed", config)
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["fixed"].weight)
    model.set_adapter("fixed")  # not what is trained
    for option in ("model_adapter_name", "ref_adapter_name"):
        with pytest.raises(ValueError, match=f"{option}: 'lost', but the model's adapters are: trained, fixed"):
            _trainer(tiny, tmp_path, models={"model": model}, **{option: "lost"})
    options = {"model_adapter_name": "trained", "ref_adapter_name": "fixed", "total_episodes": 8}
    trainer = _trainer(tiny, tmp_path, models={"model": model}, **options)
    before = _parameters(trainer)
    trainer.train()
    assert abs(trainer.state.log_history[0]["objective/kl"]) > 0.01
    changed = {name for name, parameter in _parameters(trainer).items() if not parameter.equal(before[name])}
    assert {name.split(".")[-2] for name in changed if name.startswith("policy.")} == {"trained"}


def test_reward_is_at_the_last_token_and_rises(tiny, tmp_path):
    """Scores against the reward model called alone on each unpadded sequence; and PPO does maximize them."""
    trainer = _trainer(tiny, tmp_path, stop_token="eos", total_episodes=160, learning_rate=3e-3, kl_coef=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    rollout = trainer._sample(batch)
    experience = trainer._experience(rollout)
    trainer.reward_model.config.pad_token_id = None
    for row in range(len(experience)):
        alone = experience.sequences[row][experience.attention_mask[row].bool()][None]
        own = trainer.reward_model(input_ids=alone).logits.item()
        assert experience.scores[row].item() == pytest.approx(own, rel=1e-4, abs=1e-4)
    trainer.reward_model.config.pad_token_id = trainer.processing_class.pad_token_id
    trainer.train()
    scores = [row["objective/scores"] for row in trainer.state.log_history if "loss" in row]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5


def test_nonfinite_stops_before_any_parameter_changes(tiny, tmp_path):
    trainer = _trainer(tiny, tmp_path)
    before = _parameters(trainer)
    with torch.no_grad():
        trainer.reward_model.score.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan at token"):
        trainer.train()
    assert all(parameter.equal(before[name]) for name, parameter in _parameters(trainer).items())


def test_what_does_not_fit_is_refused(tiny, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True)
    reward = _classifier(tiny, 1)
    two = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2, local_files_only=True)
    for models, error, match in (
        ({"model": model, "ref_model": model}, ValueError, "ref_model"),
        ({"reward_model": reward, "value_model": reward}, ValueError, "value_model: the same object"),
        ({"reward_model": two}, ValueError, "num_labels=1"),
        ({"value_model": model}, TypeError, "value_model: expected a sequence-classification"),
        ({"value_model": None}, TypeError, "value_model: .* got NoneType"),
        ({"model": str(tiny)}, TypeError, "^model: expected a causal language model, got str"),
        ({"ref_model": str(tiny)}, TypeError, "ref_model: expected a causal language model, got str"),
        ({"ref_model": _narrow(tiny)}, ValueError, "^ref_model: reads 100 tokens, the policy writes 331"),
    ):
        with pytest.raises(error, match=match):
            _trainer(tiny, tmp_path, models=models)
    for data, error, match in (
        ({"args": transformers.TrainingArguments(str(tmp_path), use_cpu=True)}, TypeError, "^args: expected a PPOCo"),
        ({"processing_class": None}, TypeError, "^processing_class: expected the tokenizer, got NoneType"),
    ):
        with pytest.raises(error, match=match):
            _trainer(tiny, tmp_path, data=data)
    for name, value in (("stop_token", "eos"), ("missing_eos_penalty", 1.0)):
        with pytest.raises(ValueError, match=f"^{name}: the tokenizer has no eos token"):
            _trainer(tiny, tmp_path, eos=None, **{name: value})
    with pytest.raises(ValueError, match=r"^stop_token_id: expected a token below 331, got 400"):
        _trainer(tiny, tmp_path, stop_token_id=400)
    with pytest.raises(ValueError, match="fewer than the 800 of a rollout"):
        _trainer(tiny, tmp_path, per_device_train_batch_size=400)
    with pytest.raises(ValueError, match="more than the 128 that the policy can read"):
        _trainer(tiny, tmp_path, response_length=126).train()
    with pytest.raises(TypeError, match="train_dataset: expected one with a length, got IterableDataset"):
        _trainer(tiny, tmp_path, data={"train_dataset": datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset()})
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha: "):
        _trainer(tiny, tmp_path, neftune_noise_alpha=5.0)
    trainer = _trainer(tiny, tmp_path)
    with pytest.raises(NotImplementedError, match=r"^predict: "):
        trainer.predict(trainer.train_dataset)
    for columns, match in (
        ({"prompt": ["a"] * 8}, "come tokenized"),
        (
            {"input_ids": [[5, 6000]] * 8},
            "token 6000 has no embedding, the model has 331: .*resize_token_emb",
        ),
        ({"input_ids": [[5, 6]] * 8, "attention_mask": [[1]] * 8}, r"^attention_mask: .*\(8, 2\) of input_ids, got"),
    ):
        trainer.train_dataset = datasets.Dataset.from_dict(columns)
        with pytest.raises(ValueError, match=match):
            trainer.train()
