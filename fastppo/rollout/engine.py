"""The interface of what samples completions. Each engine is a file of this folder, and `choose.py` picks one for a run.

sync ──> the engine samples from the policy as it is now
sample ──> token ids, log-probabilities as sampled, ended or not
sleep, wake ──> an engine with weights of its own frees the device's memory while the policy is trained
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastppo.errors import FastPPOError


class EngineError(FastPPOError, RuntimeError):
    """An engine cannot be used, or failed; the message says what to change."""


class Completion(NamedTuple):
    tokens: list[int]  # what ended it included
    logprobs: list[float]  # of the tokens, under the distribution that each was drawn from
    ended: bool  # by EOS or a stop string, rather than by max_new_tokens


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. Only the temperature changes the policy's distribution."""

    tokenizer: PreTrainedTokenizerBase
    eos: list[int]
    """Tokens that end a completion."""
    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end a completion once its text, special tokens included, contains one. The token that completes the
    string is the last."""
    batch_size: int = 64
    """Most sequences decoded together, for engines that don't choose themselves."""


class Engine:
    """Samples completions from the policy as it was at the last `sync`."""

    def sync(self, policy: nn.Module) -> None:
        """From here on, sample from this policy as it is now, adapters included."""
        raise NotImplementedError

    def sample(
        self,
        prompts: list[list[int]],
        keys: Tensor,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> list[Completion]:
        """One completion of each prompt (at least one token id, each with an embedding).

        Args:
            keys: [B] int64, of `sequence_keys`; together with the prompt, it decides a completion.
            progress: is told how many completions have ended, whenever more have.

        Raises:
            FloatingPointError: the policy's probabilities are not finite.
            EngineError: the engine failed.
        """
        raise NotImplementedError

    def sleep(self) -> None:
        """Free what is not needed until `wake`."""

    def wake(self) -> None:
        """Get ready to `sync` and `sample`."""
