"""What a run reads besides its models: tokenizer, prompts, rewards and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from fastppo.errors import ConfigError
from fastppo.models import load_context_length, load_tokenizer
from fastppo.training.config import Config
from fastppo.training.data import load_prompts
from fastppo.training.health import load_texts
from fastppo.training.rewards import RewardFunctions, build_rewards


class Inputs:
    """Loaded and checked before the models, so that a mistake is told at once and not after minutes of reading weights.

    Args:
        config: the run's configuration.
        device: device of reward models.
        rewards: Python functions to use instead of `config.rewards`.

    Raises:
        ModelError, DataError, RewardError: something cannot be loaded, or a reward needs a column that is not there.
        ConfigError: a sequence does not fit in a pass of `batch.max_tokens`.
    """

    held_out: RewardFunctions | None
    """Rewards that are evaluated but not optimized."""
    texts: list[list[int]] | None
    """Token ids of the texts for the perplexity."""

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device,
        rewards: Sequence[Callable[..., Sequence[float]]] | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(config.model)
        context_length = load_context_length(config.model)
        self.data = load_prompts(
            config.data,
            self.tokenizer,
            context_length=context_length,
            max_new_tokens=config.rollout.max_new_tokens,
            allow_download=config.model.allow_download,
        )
        self.held_out = self.texts = None
        if config.eval.perplexity is not None:
            self.texts = load_texts(config.eval.perplexity, self.tokenizer, context_length=context_length)
        self._check_budget(config)
        self.rewards = build_rewards(rewards or config.rewards, device=device, model_defaults=config.model)
        if config.eval.rewards:
            self.held_out = build_rewards(config.eval.rewards, device=device, model_defaults=config.model)
        for functions, prompts in (
            (self.rewards, self.data.train),
            (self.rewards, self.data.eval),
            (self.held_out, self.data.eval),
        ):
            if functions is not None and prompts:
                functions.check_columns({name for prompt in prompts for name in prompt.columns})

    def _check_budget(self, config: Config) -> None:
        """Raise ConfigError if a sequence of this run may have more tokens than one pass takes."""
        if (most := config.batch.max_tokens) is None:
            return
        prompt = max(len(prompt.input_ids) for prompt in self.data.train + self.data.eval)
        new = config.rollout.max_new_tokens
        sequences = {
            f"a prompt of {prompt} tokens and rollout.max_new_tokens {new}": prompt + new,
            "the longest text of eval.perplexity": max(map(len, self.texts or [[]])),
        }
        for what, tokens in sequences.items():
            if tokens > most:
                raise ConfigError(
                    f"batch.max_tokens: {most} tokens are less than one sequence can have, {tokens} ({what}); set it "
                    f"to {tokens} or more"
                )

    def facts(self) -> dict[str, str]:
        """What all ranks of a run must have in common."""
        digests = {"prompts": hashlib.sha256(), "texts for the perplexity": hashlib.sha256()}
        for prompt in self.data.train + self.data.eval:
            digests["prompts"].update(repr((prompt.text, prompt.input_ids)).encode())
        for text in self.texts or ():
            digests["texts for the perplexity"].update(repr(text).encode())
        counts = f"{len(self.data.train)} and {len(self.data.eval)} held out"
        names = ", ".join(reward.name for reward in self.rewards.rewards)
        return {"number of prompts": counts, "rewards": names} | {
            f"sha256 of the {name}": digest.hexdigest()[:16] for name, digest in digests.items()
        }
