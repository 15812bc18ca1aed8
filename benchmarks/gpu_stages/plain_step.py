"""A PPO step written plainly: transformers, with peft and bitsandbytes for a model in 4 bits, and autograd.

generate(), the logits of whole sequences and their log-softmax for policy and reference, entropy, GAE as a loop, the
clipped losses, and AdamW. Models, precision, gradient checkpointing and the sequences in a pass are the
configuration's; critic and policy have passes of their own, as the trainer's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastppo.training.config import Config

ENTROPY = 0.0  # its coefficient; the entropy is computed whatever it is, as trainers log it


class PlainStep:
    """policy, critic and reference: three models, or three sets of adapters of one, the last of them empty."""

    def __init__(self, config: Config, device: torch.device, reward: Callable) -> None:
        self.config, self.device, self.reward = config, device, reward
        path = config.model.name_or_path
        tokenizer = AutoTokenizer.from_pretrained(path)
        with open(config.data.train, encoding="utf-8") as file:
            lines = file.read().splitlines()[: config.rollout.num_prompts]
        prompts = [line for line in lines for _ in range(config.rollout.num_generations)]
        self.prompts = tokenizer(prompts, return_tensors="pt")["input_ids"].to(device)
        self.pad = tokenizer.pad_token_id
        dtype = getattr(torch, config.model.dtype)
        options = {"quantization_config": four_bits(), "device_map": {"": device}} if config.model.quantization else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).to(device)
        checkpointed = [model]
        if config.model.lora is None:
            self.models = {"default": model, "value": copy.deepcopy(model), "reference": copy.deepcopy(model)}
            self.models["reference"].requires_grad_(False)
            self.models["value"].lm_head = nn.Identity()
            checkpointed.append(self.models["value"])
            parameters = [p for name in ("default", "value") for p in self.models[name].parameters()]
        else:
            import peft

            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):  # which would leave products without gradients
                    module.support_avx512bf16_for_cpu = False
            lora = config.model.lora
            adapters = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": lora.target_modules}
            self.adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **adapters))
            self.adapted.add_adapter("value", peft.LoraConfig(task_type="CAUSAL_LM", **adapters))
            self.models = {}
            parameters = [p for name, p in self.adapted.named_parameters() if "lora_" in name]
        if config.model.gradient_checkpointing:
            for each in checkpointed:
                each.gradient_checkpointing_enable({"use_reentrant": False})
        self.value_head = nn.Linear(model.config.hidden_size, 1, device=device)
        nn.init.zeros_(self.value_head.weight)
        rate = config.optim.learning_rate
        groups = [{"params": parameters}, {"params": self.value_head.parameters()}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True)
        self.clipped = [*parameters, *self.value_head.parameters()]

    def autocast(self) -> torch.autocast:
        """Around each pass: around several, the second epoch would reuse the first one's rounded weights."""
        dtype = self.config.model.autocast
        return torch.autocast(self.device.type, getattr(torch, dtype or "float32"), enabled=dtype is not None)

    @contextlib.contextmanager
    def model(self, role: str) -> Iterator[nn.Module]:
        if self.models:
            yield self.models[role]
        elif role == "reference":
            with self.adapted.disable_adapter():
                yield self.adapted
        else:
            self.adapted.set_adapter(role)
            yield self.adapted

    def train(self, mode: bool) -> None:
        for model in self.models.values() or [self.adapted]:
            model.train(mode)

    def __call__(self, size: int, new_tokens: int, phases) -> list[float]:
        """A step with `size` sequences a pass; returns the policy's loss of every epoch."""
        self.train(False)
        with phases("rollout"):
            sequences, scores = self.rollout(new_tokens)
        width = self.prompts.shape[1]
        tokens = sequences[:, width:]
        parts = torch.arange(len(sequences), device=self.device).split(size)
        with phases("score"), torch.no_grad():
            old, ref = (
                torch.cat([self.policy(role, sequences[rows], tokens[rows])[0] for rows in parts])
                for role in ("default", "reference")
            )
            old_values = torch.cat([self.values(sequences[rows], width) for rows in parts])
            advantages, returns = self.advantages(old, ref, old_values, scores)
        with phases("update"):
            self.train(True)
            return [
                self.epoch(sequences, tokens, parts, old, old_values, advantages, returns)
                for _ in range(self.config.ppo.num_ppo_epochs)
            ]

    def rollout(self, new_tokens: int) -> tuple[Tensor, Tensor]:
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": self.pad}
        generation = GenerationConfig(max_new_tokens=new_tokens, **options)
        with self.autocast(), self.model("default") as model:
            size = self.config.rollout.generation_batch_size
            parts = [
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation)
                for ids in self.prompts.split(size)
            ]
        sequences = torch.cat(parts)
        rewards = self.reward(sequences[:, self.prompts.shape[1] :].tolist())
        return sequences, torch.tensor(rewards, device=self.device)

    def policy(self, role: str, sequences: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completions and their mean entropy."""
        with self.autocast(), self.model(role) as model:
            logits = model(input_ids=sequences, attention_mask=torch.ones_like(sequences), use_cache=False).logits
        log_p = torch.log_softmax(logits[:, -tokens.shape[1] - 1 : -1].float() / self.temperature, -1)
        return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1).mean()

    @property
    def temperature(self) -> float:
        return self.config.rollout.temperature

    def values(self, sequences: Tensor, width: int) -> Tensor:
        with self.autocast(), self.model("value") as model:
            backbone = getattr(model, "get_base_model", lambda: model)().model
            out = backbone(input_ids=sequences, attention_mask=torch.ones_like(sequences), use_cache=False)
        return self.value_head(out.last_hidden_state[:, width - 1 : -1].float()).squeeze(-1)

    def advantages(self, old: Tensor, ref: Tensor, values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        ppo = self.config.ppo
        rewards = -ppo.kl_coef * (old - ref)
        rewards[:, -1] += scores
        advantages, last = torch.zeros_like(rewards), torch.zeros_like(scores)
        for t in reversed(range(rewards.shape[1])):
            after = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(scores)
            last = rewards[:, t] + ppo.gamma * after - values[:, t] + ppo.gamma * ppo.lam * last
            advantages[:, t] = last
        returns = advantages + values
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns

    def epoch(self, sequences, tokens, parts, old, old_values, advantages, returns) -> float:
        ppo, total = self.config.ppo, 0.0
        for rows in parts:
            new, entropy = self.policy("default", sequences[rows], tokens[rows])
            ratio = (new - old[rows]).exp()
            clipped = ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high)
            loss = -torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).mean()
            share = len(rows) / len(sequences)
            ((loss - ENTROPY * entropy) * share).backward()
            total += loss.item() * share
        for rows in parts:
            values = self.values(sequences[rows], self.prompts.shape[1])
            near = old_values[rows] + (values - old_values[rows]).clamp(-ppo.cliprange_value, ppo.cliprange_value)
            error = torch.maximum((values - returns[rows]) ** 2, (near - returns[rows]) ** 2)
            (ppo.vf_coef * 0.5 * error.mean() * len(rows) / len(sequences)).backward()
        torch.nn.utils.clip_grad_norm_(self.clipped, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def four_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
