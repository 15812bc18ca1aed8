"""PPO with TRL's names, for scripts that import ``PPOConfig, PPOTrainer`` from a TRL that no longer has them.

    from fastppo.integrations.trl_ppo import PPOConfig, PPOTrainer

One step of transformers' Trainer is one rollout and all updates on it:

    prompts ── generate ──> completions ── reward_model ──> scores
                  └─ policy, reference, value model ──> log-probabilities, KL, values ── GAE ──> advantages
    num_ppo_epochs × num_mini_batches optimizer steps, the last of them taken by Trainer's own loop

Saving, resuming, logging, callbacks, schedules and several processes (DDP) are Trainer's; TRL is not needed. Tested on
transformers 4.57.6 and 5.24.0. Intended differences from TRL's trainer: a checkpoint also holds the optimizer and the
value model (in `value_model/`), and a resumed run continues as if it had not stopped; every mini-batch is an optimizer
step, also with gradient accumulation; NaN or Inf stops the run before it reaches a parameter.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from fastppo.algorithms.experience import Experience
from fastppo.algorithms.ppo import PPO
from fastppo.integrations.patching import require
from fastppo.integrations.transformers import SUPPORTED
from fastppo.integrations.trl_ppo_config import PPOConfig, algorithm_options, one_rollout_per_step
from fastppo.models import check_head, context_length, disable_dropout, token_hidden
from fastppo.models.head import causal_of
from fastppo.models.load import enable_gradient_checkpointing
from fastppo.models.packing import completion_hidden
from fastppo.models.source import hub_offline
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.ops.reference import sampled_kl
from fastppo.rollout.choose import open_engine
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.draw import sequence_keys
from fastppo.rollout.engine import Engine
from fastppo.rollout.prompt import Prompt
from fastppo.rollout.sample import Rollout, sample
from fastppo.training.rng import rng_state, set_rng_state

require("transformers", SUPPORTED)

VALUE_FOLDER = "value_model"
_STAGING = ".saving"
_SHOWN = 8  # completions printed at a time
# Metrics of the loss -> TRL's names.
_TRL_NAMES = {
    "policy/approx_kl": "policy/approxkl_avg",
    "policy/clip_fraction": "policy/clipfrac_avg",
    "policy/entropy": "policy/entropy_avg",
    "policy/ratio_mean": "val/ratio",
    "loss/policy": "loss/policy_avg",
    "loss/value": "loss/value_avg",
    "value/clip_fraction": "val/clipfrac_avg",
}


class PolicyAndValue(nn.Module):
    """The two trained models as one module whose forward is the loss."""

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy, self.value_model, self.config = policy, value_model, policy.config
        # Trainer needs this and `tie_weights` to load a policy whose file leaves out tied weights.
        named = {name for tensors in (policy.named_parameters(), policy.named_buffers()) for name, _ in tensors}
        self._keys_to_ignore_on_save = sorted(policy.state_dict().keys() - named)

    def tie_weights(self) -> None:
        self.policy.tie_weights()

    def activation_checkpointing_enable(self, **_options: Any) -> None:
        for model in (self.policy, self.value_model):
            enable_gradient_checkpointing(model)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name in transformers 4

    def forward(self, batch: Experience, algorithm: PPO) -> tuple[Tensor, dict[str, Tensor]]:
        length = batch.mask.shape[1]
        hidden, head = completion_hidden(self.policy, batch.sequences, batch.attention_mask, length)
        values = _classify(self.value_model, batch.sequences, batch.attention_mask)[:, -length - 1 : -1]
        return algorithm.loss(batch, hidden, head, values, None)


class PPOTrainer(Trainer):
    """Proximal policy optimization (Schulman et al., 2017, arXiv:1707.06347) of a language model.

    Args:
        args: options of PPO and of transformers' Trainer.
        processing_class: the tokenizer of all four models.
        model: the policy, a causal language model, wrapped by peft or not.
        ref_model: reference of the KL; None: a frozen copy of the policy, or with peft the policy without its adapter.
        reward_model: a sequence-classification model with one output, whose head is called `score`.
        value_model: another one, trained along with the policy.
        train_dataset, eval_dataset: tokenized prompts: a column `input_ids`.
        data_collator: makes a batch with `input_ids` [B, P] (and `attention_mask`) of rows; padding on either side.
        optimizers, callbacks: as for transformers' Trainer.
        peft_config: wraps the policy.

    Raises:
        ValueError, TypeError: arguments that do not go together; raised before any work is done.
    """

    _tag_names = ("trl", "ppo", "fastppo")

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: PreTrainedModel,
        train_dataset: Any,
        value_model: PreTrainedModel,
        data_collator: Callable | None = None,
        eval_dataset: Any = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        if not isinstance(args, PPOConfig):
            raise TypeError(f"args: expected a PPOConfig of {PPOConfig.__module__}, got {type(args).__name__}")
        _check_models(model, ref_model, reward_model, value_model, peft_config)
        if train_dataset is None:
            raise ValueError("train_dataset: required")
        _check_tokens(args, processing_class, _vocabulary(model))
        if args.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha: PPO compares probabilities, which noise would change; leave it out")
        if args.n_gpu > 1:
            raise ValueError("one process drives one GPU: start the script with `accelerate launch`")
        if peft_config is not None:
            with hub_offline():  # peft imports bitsandbytes
                import peft

                if not isinstance(peft_config, peft.PeftConfig):
                    raise TypeError(f"peft_config: expected a peft.PeftConfig, got {type(peft_config).__name__}")
                model = peft.get_peft_model(model, peft_config)
        self.is_peft_model = hasattr(model, "disable_adapter")
        adapters = model.peft_config if self.is_peft_model else {}
        if any(adapter.is_prompt_learning for adapter in adapters.values()):
            raise ValueError(
                "peft_config: prompts and prefixes are learned outside the model; adapt layers (LoraConfig)"
            )
        for option in ("model_adapter_name", "ref_adapter_name"):
            if (name := getattr(args, option)) is not None and name not in adapters:
                raise ValueError(f"{option}: {name!r}, but the model's adapters are: {', '.join(adapters) or 'none'}")
        if args.model_adapter_name is not None:
            model.set_adapter(args.model_adapter_name)
        for part in (model, ref_model, reward_model, value_model):
            if part is not None:
                disable_dropout(part)
        check_head(model)
        if ref_model is None and not self.is_peft_model:
            ref_model = copy.deepcopy(model)
        for frozen in (ref_model, reward_model):
            if frozen is not None:
                frozen.eval().requires_grad_(False)

        self.ppo_args = args
        super().__init__(
            model=PolicyAndValue(model, value_model),
            args=one_rollout_per_step(args, train_dataset),
            data_collator=data_collator or partial(_collate, DataCollatorWithPadding(processing_class)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("PPOTrainer runs in one process or under DDP, not under FSDP or DeepSpeed")
        set_seed(args.seed, device_specific=True)  # otherwise every process would sample with the same numbers
        self.ref_model = None if ref_model is None else ref_model.to(self.args.device)
        self.reward_model = reward_model.to(self.args.device)
        self.algorithm = PPO(algorithm_options(args), temperature=args.temperature)
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def get_train_dataloader(self) -> DataLoader:
        """Whole rollouts only; evaluation drops no prompt."""
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = before

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One rollout and its updates; Trainer's loop takes the last optimizer step. Returns the mean loss.

        Raises:
            FloatingPointError: a NaN or Inf in a probability, loss or gradient.
        """
        args = self.ppo_args
        shown = args.num_sample_generations > 0 and self.eval_dataset is not None
        if shown and self.state.global_step % max(1, self.args.max_steps // args.num_sample_generations) == 0:
            self.generate_completions(sampling=True)
        model.eval()
        experience = self._experience(self._sample(inputs))
        self.algorithm.estimate_advantages(experience)
        self._record(self._rollout_metrics(experience))
        model.train()
        losses = []
        for epoch in range(args.num_ppo_epochs):
            for rows in torch.randperm(len(experience)).tensor_split(args.num_mini_batches):
                if losses:
                    if self.args.max_grad_norm:
                        self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                    self.optimizer.step()
                    model.zero_grad()
                losses.append(self._accumulate_gradients(model, experience.select(rows.to(self.args.device))))
                self._check_gradients(losses[-1], epoch)
        self._record({"val/ratio_var": statistics.pvariance(self._metrics["val/ratio"][-len(losses) :])})
        if self.args.logging_strategy == "steps" and self.state.global_step + 1 == self.args.max_steps:
            self.control.should_log = True  # a run's last rollouts, or all of one that is shorter than logging_steps
        return torch.stack(losses).mean()

    def _accumulate_gradients(self, model: nn.Module, mini_batch: Experience) -> Tensor:
        """Gradients of one mini-batch's loss, a micro-batch at a time. Returns that loss."""
        total, means = torch.zeros((), device=self.args.device), defaultdict(float)
        parts = torch.arange(len(mini_batch), device=self.args.device).split(self.ppo_args.per_device_train_batch_size)
        for rows in parts:
            batch = mini_batch.select(rows)
            # The loss and its metrics are means over tokens.
            weight = self.algorithm.part_weight(batch, mini_batch, self.ppo_args.response_length)
            with contextlib.nullcontext() if rows is parts[-1] else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss, metrics = model(batch, self.algorithm)
                self.accelerator.backward(weight * loss)
            total += weight * loss.detach()
            for name, trl_name in _TRL_NAMES.items():
                means[trl_name] += weight * metrics[name].item()
        self._record(means)
        return total

    def _check_gradients(self, loss: Tensor, epoch: int) -> None:
        if self.accelerator.scaler is not None:
            return  # float16: the scaler finds Inf itself, and skips the step
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}, epoch {epoch + 1}: not finite (loss {loss.item():.4g}, gradient "
                f"norm {norm.item():.4g}); the parameters are those of the last update"
            )

    # A rollout

    @cached_property
    def _engine(self) -> Engine:
        return open_engine(self.model.policy, RolloutConfig(), self.args.device)

    def _sample(self, inputs: dict[str, Any]) -> Rollout:
        """One completion of each prompt of a batch as the collator made it."""
        args, tokenizer, ids = self.ppo_args, self.processing_class, inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape {tuple(ids.shape)} of input_ids, got {tuple(mask.shape)}"
            )
        if "attention_mask" not in inputs or tokenizer.pad_token_id != tokenizer.eos_token_id:
            mask &= ids != tokenizer.pad_token_id  # a row may be padded already
        prompts = [Prompt("", row[keep].tolist(), {}) for row, keep in zip(ids, mask, strict=True)]
        longest, limit = int(mask.sum(1).max()), context_length(self.model.policy)
        if limit is not None and longest + args.response_length > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and response_length={args.response_length} are more than the {limit} "
                "that the policy can read"
            )
        sampling = RolloutConfig(
            max_new_tokens=args.response_length,
            temperature=args.temperature,
            generation_batch_size=args.local_rollout_forward_batch_size,
        )
        eos = tokenizer.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        options = {"engine": self._engine, "device": self.args.device, "eos_ids": [] if eos is None else [eos]}
        keys = sequence_keys(str(torch.randint(2**62, ()).item()), len(prompts))  # the generator's state is Trainer's
        with self.compute_loss_context_manager():
            return sample(self.model.policy, tokenizer, prompts, keys, sampling, **options)

    @torch.no_grad()
    def _experience(self, rollout: Rollout) -> Experience:
        """Scores, log-probabilities, KL to the reference and values of a rollout."""
        sequences, attention_mask, mask = rollout.sequences, rollout.attention_mask, rollout.mask
        length = mask.shape[1]
        last = sequences.shape[1] - length + mask.sum(1, keepdim=True) - 1  # [B, 1], of each sequence's last token
        parts = []
        for rows in torch.arange(len(mask), device=mask.device).split(self.ppo_args.local_rollout_forward_batch_size):
            tokens = (sequences[rows], attention_mask[rows])
            with self.compute_loss_context_manager():
                logprobs = self._logprobs(self.model.policy, *tokens, mask[rows])
                with self._reference() as reference:
                    ref_logprobs = self._logprobs(reference, *tokens, mask[rows])
                values = _classify(self.model.value_model, *tokens)[:, -length - 1 : -1].masked_fill(~mask[rows], 0.0)
                scores = _classify(self.reward_model, *tokens).gather(1, last[rows]).squeeze(1)
            parts.append((logprobs, ref_logprobs, values, scores))
        logprobs, ref_logprobs, values, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        experience = Experience(
            sequences=sequences,
            attention_mask=attention_mask,
            mask=mask,
            old_logprobs=logprobs,
            old_values=values,
            scores=scores,
            kl=sampled_kl(logprobs, ref_logprobs, self.ppo_args.kl_estimator),
        )
        if self.ppo_args.missing_eos_penalty is not None:
            experience.scores -= self.ppo_args.missing_eos_penalty * (~self._is_eos(experience).any(1)).float()
        return experience

    def _logprobs(self, model: nn.Module, sequences: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """[b, T] log-probabilities of the completions' tokens."""
        hidden, head = completion_hidden(model, sequences, attention_mask, mask.shape[1])
        targets = sequences[:, -mask.shape[1] :].masked_fill(~mask, -100)
        temperature = self.ppo_args.temperature
        return linear_logprob(hidden, targets=targets, temperature=temperature, **head._asdict()).logprobs

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        policy, name = self.model.policy, self.ppo_args.ref_adapter_name
        if self.ref_model is not None:
            yield self.ref_model
        elif name is None:
            with policy.disable_adapter():
                yield policy
        else:
            trained = policy.active_adapter
            policy.set_adapter(name)
            try:
                yield policy
            finally:
                policy.set_adapter(trained)

    def _is_eos(self, experience: Experience) -> Tensor:
        return (experience.targets == self.processing_class.eos_token_id) & experience.mask

    # Metrics, by TRL's names

    def _rollout_metrics(self, experience: Experience) -> dict[str, float]:
        kl, scores = experience.kl.sum(1).mean().item(), experience.scores.mean().item()
        penalty = -self.ppo_args.kl_coef * kl
        return {
            "objective/kl": kl,
            "objective/entropy": -experience.old_logprobs.sum(1).mean().item(),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + scores,
            "objective/scores": scores,
            "val/num_eos_tokens": self._is_eos(experience).sum().item(),
        }

    def _record(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the means of what was recorded since the last log of a training step."""
        if "loss" in logs and self._metrics:
            means = [sum(values) / len(values) for values in self._metrics.values()]
            over_ranks = self.accelerator.reduce(torch.tensor(means, device=self.args.device), "mean").tolist()
            logs = logs | dict(zip(self._metrics, over_ranks, strict=True))
            logs["lr"] = logs["learning_rate"]
            logs["episode"] = self.state.global_step * self.args.train_batch_size * self.accelerator.num_processes
            self._metrics.clear()
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample completions of the held-out prompts and score them; always with the same random numbers.

        Returns:
            Means of score, KL (nats a completion), score − kl_coef · KL, and number of tokens; of each dataset if
            eval_dataset is a dict.
        """
        if isinstance(given := self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            metrics = {}
            for name, part in given.items():
                part = name if eval_dataset is None else part
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        parts = []  # [3, b] each: score, KL, number of tokens
        for experience in self._held_out(eval_dataset):
            columns = (experience.scores, experience.kl.sum(1), experience.mask.sum(1).float())
            parts.append(torch.stack(self.accelerator.gather_for_metrics(columns)))
        if not parts:
            raise ValueError("eval_dataset: no prompts")
        score, kl, length = torch.cat(parts, dim=1).mean(1).tolist()
        metrics = {
            f"{metric_key_prefix}_objective/scores": score,
            f"{metric_key_prefix}_objective/kl": kl,
            f"{metric_key_prefix}_objective/rlhf_reward": score - self.ppo_args.kl_coef * kl,
            f"{metric_key_prefix}_response_length": length,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *_args: Any, **_options: Any) -> None:
        """Always raises: PPO's prompts have no labels to predict."""
        raise NotImplementedError("predict: call evaluate(dataset) for scores, or generate_completions() for samples")

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Completions of eval_dataset, or of its first batch with `sampling`: the main process prints a few, and each
        process returns its own share."""
        decode = partial(self.processing_class.batch_decode, skip_special_tokens=True)
        rows = []
        for experience in self._held_out(None, num_batches=1 if sampling else None):
            prompts = decode(experience.sequences[:, : -experience.mask.shape[1]])
            answers = decode(experience.targets.masked_fill(~experience.mask, self.processing_class.pad_token_id))
            for query, response, score in zip(prompts, answers, experience.scores.tolist(), strict=True):
                rows.append({"query": query, "model response": response, "score": score})
        if self.is_world_process_zero():
            for row in rows[:_SHOWN]:
                print(f"[{row['score']:.3f}] {row['query']!r} -> {row['model response']!r}")
        return rows

    def _held_out(self, eval_dataset: Any, num_batches: int | None = None) -> Iterator[Experience]:
        """A rollout of each batch of held-out prompts; restores the run's random-number generators at the end."""
        self.model.eval()
        state = rng_state()
        try:
            set_seed(self.args.seed, device_specific=True)
            several = eval_dataset is None and isinstance(self.eval_dataset, dict)
            loaders = map(self.get_eval_dataloader, self.eval_dataset if several else [eval_dataset])
            for inputs in itertools.islice(itertools.chain.from_iterable(loaders), num_batches):
                yield self._experience(self._sample(self._prepare_inputs(inputs)))
        finally:
            set_rng_state(*state)

    # Saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write a folder for `from_pretrained`: policy (or its adapters) and tokenizer, and the value model's own."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for model, place in ((self.model.policy, folder), (self.model.value_model, folder / VALUE_FOLDER)):
            config, embedding = model.config.get_text_config(), model.get_input_embeddings().weight
            if (config.pad_token_id or 0) >= len(embedding):  # from_pretrained refuses it
                config.pad_token_id = None
            model.save_pretrained(place)
        self.processing_class.save_pretrained(folder)
        (folder / "training_args.json").write_text(self.ppo_args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        value_folder = Path(resume_from_checkpoint, VALUE_FOLDER)
        if not value_folder.is_dir():
            raise ValueError(f"{resume_from_checkpoint}: no {VALUE_FOLDER}/, so not a checkpoint of this trainer")
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.policy)
        super()._load_from_checkpoint(str(value_folder), self.model.value_model)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but written aside and then renamed: a killed run leaves only complete checkpoints."""
        if self.args.push_to_hub:  # reads the folder in the background
            return super()._save_checkpoint(model, trial)
        run = Path(self.args.output_dir)
        staging, name = run / _STAGING, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:  # super() took the folder it was written to
            self.state.best_model_checkpoint = str(run / name)
        if self.args.should_save:
            self._publish(staging / name, run / name)
        self.accelerator.wait_for_everyone()  # the others may load it next

    def _publish(self, written: Path, checkpoint: Path) -> None:
        self.state.save_to_json(str(written / "trainer_state.json"))
        for path in written.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(checkpoint, ignore_errors=True)
        written.rename(checkpoint)
        shutil.rmtree(written.parent)
        run = str(checkpoint.parent)
        if hasattr(self, "_rotate_checkpoints"):  # transformers 4
            self._rotate_checkpoints(output_dir=run)
        else:
            from transformers.trainer_utils import rotate_checkpoints

            rotate_checkpoints(run, self.args.save_total_limit, self.state.best_model_checkpoint)


def _collate(pad: DataCollatorWithPadding, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad the rows' token ids; other columns are left out."""
    if "input_ids" not in rows[0]:
        raise ValueError(
            f"the dataset has the columns {', '.join(rows[0])}, but prompts come tokenized, as input_ids: "
            'dataset.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]})'
        )
    return pad([{k: row[k] for k in ("input_ids", "attention_mask") if k in row} for row in rows])


def _classifier(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The backbone and the one-output head of a sequence-classification model, wrapped by peft or not."""
    inner = causal_of(model)
    return inner.base_model, inner.score


def _classify(model: nn.Module, sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """[b, P + T] float32: a sequence-classification model's output after each token."""
    backbone, score = _classifier(model)
    return score(token_hidden(backbone, sequences, attention_mask)).squeeze(-1).float()


def _check_models(
    model: nn.Module, ref_model: nn.Module | None, reward_model: nn.Module, value_model: nn.Module, peft_config: Any
) -> None:
    for name, given in (("model", model), ("ref_model", ref_model)):
        if not hasattr(given, "get_output_embeddings") and not (given is None and name == "ref_model"):
            raise TypeError(f"{name}: expected a causal language model, got {type(given).__name__}")
    if peft_config is not None and hasattr(model, "disable_adapter"):
        raise ValueError("peft_config: the model has adapters already; give one or the other")
    if ref_model is model:
        raise ValueError("ref_model: the same object as model, which is trained; give a copy, or None for one")
    if value_model is reward_model:
        raise ValueError("value_model: the same object as reward_model, so training would change the rewards")
    for name, given in (("reward_model", reward_model), ("value_model", value_model)):
        try:
            outputs = _classifier(given)[1].out_features
        except AttributeError:
            raise TypeError(
                f"{name}: expected a sequence-classification model with a head `score` "
                f"(AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)), got {type(given).__name__}"
            ) from None
        if outputs != 1:
            raise ValueError(f"{name}: expected one output, got {outputs}; load it with num_labels=1")
    vocabulary = _vocabulary(model)
    for name, given in (("ref_model", ref_model), ("reward_model", reward_model), ("value_model", value_model)):
        if given is not None and (readable := _vocabulary(given)) < vocabulary:
            raise ValueError(
                f"{name}: reads {readable} tokens, the policy writes {vocabulary}; they must share a tokenizer"
            )


def _check_tokens(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    if not hasattr(tokenizer, "pad_token_id"):
        raise TypeError(f"processing_class: expected the tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        raise ValueError("processing_class: the tokenizer needs a pad token (tokenizer.pad_token = ...)")
    for name in ("stop_token", "missing_eos_penalty"):
        if getattr(args, name) is not None and tokenizer.eos_token_id is None:
            raise ValueError(f"{name}: the tokenizer has no eos token (tokenizer.eos_token = ...)")
    known = max(vocabulary, len(tokenizer))
    if args.stop_token_id is not None and args.stop_token_id >= known:
        raise ValueError(f"stop_token_id: expected a token below {known}, got {args.stop_token_id}")


def _vocabulary(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[0]
