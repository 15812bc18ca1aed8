"""The `rollout` section of the configuration."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fastppo.config_fields import STRICT, PositiveFloat, PositiveInt


@dataclass(config=STRICT)
class RolloutConfig:
    """How completions are sampled."""

    num_prompts: PositiveInt = 8
    """Prompts in a step."""
    num_generations: PositiveInt = 4
    """Completions of each prompt."""
    max_new_tokens: PositiveInt = 32
    temperature: PositiveFloat = 1.0
    """Also divides the logits that log-probabilities, entropy and KL are computed from."""
    generation_batch_size: PositiveInt = 64
    """Most sequences that are decoded at a time."""
