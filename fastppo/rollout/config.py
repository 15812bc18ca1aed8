"""The `rollout` section of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastppo.config_fields import STRICT, FiniteFloat, PositiveInt


@dataclass(config=STRICT)
class RolloutConfig:
    """How completions are sampled."""

    num_prompts: PositiveInt = 8
    """Prompts per step."""
    num_generations: PositiveInt = 4
    """Completions per prompt."""
    max_new_tokens: PositiveInt = 32
    """Maximum length of a completion in tokens."""
    temperature: Annotated[FiniteFloat, Field(ge=1e-10, le=1e10)] = 1.0  # as the operators take it
    """Divides the logits, for sampling and for log-probabilities, entropy and KL."""
    generation_batch_size: PositiveInt = 64
    """Maximum number of sequences that are decoded together."""
