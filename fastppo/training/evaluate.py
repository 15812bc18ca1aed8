"""Evaluation of a trained policy."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastppo.models import ModelError, backbone_and_head, load_causal_lm, load_tokenizer
from fastppo.models.policy_models import PolicyModels
from fastppo.training.config import Config
from fastppo.training.data import DataError, load_prompts
from fastppo.training.device import choose_device
from fastppo.training.rewards import build_rewards
from fastppo.training.scoring import Scorer


def evaluate_policy(config: Config, model: str | None = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample a configuration's held-out prompts from a policy, score them, and measure its KL to the reference.

    Args:
        config: configuration of the prompts, the rewards, the sampling and the reference.
        model: policy to evaluate, named like `model.name_or_path`. Default: the configuration's model.

    Returns:
        Metrics named `eval/...`, and one row a sample: prompt, completion, reward, rewards.

    Raises:
        ModelError, DataError, RewardError: something cannot be loaded, or there are no held-out prompts.
    """
    device = choose_device(config.device, config.backend_name)
    tokenizer = load_tokenizer(config.model)
    rewards = build_rewards(config.rewards, device=device, model_defaults=config.model)
    models = PolicyModels(dataclasses.replace(config.model, lora=None), device=device, num_values=0)
    if model is not None:
        policy = load_causal_lm(dataclasses.replace(config.model, name_or_path=model), device=device)
        size, expected = (backbone_and_head(m)[1].weight.shape[0] for m in (policy, models.policy))
        if size != expected:
            raise ModelError(f"{model}: has a vocabulary of {size}, {config.model.name_or_path} one of {expected}")
        models.policy = policy
    data = load_prompts(
        config.data,
        tokenizer,
        context_length=models.context_length,
        max_new_tokens=config.rollout.max_new_tokens,
        allow_download=config.model.allow_download,
    )
    if not data.eval:
        raise DataError("there are no held-out prompts; give data.eval or data.eval_size")
    return Scorer(config, tokenizer, models, rewards).evaluate(data.eval[: config.eval.num_prompts])
