"""Sample completions from the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fastppo.errors import quote
from fastppo.models import ModelError, backbone_of, readable_ids
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.engine import Engine, Sampling
from fastppo.rollout.padded import pad_left
from fastppo.rollout.prompt import Prompt


class Rollout(NamedTuple):
    """B sampled completions: prompts of P columns padded on the left, completions of T columns padded on the right."""

    sequences: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] int64
    mask: Tensor  # [B, T] bool: sampled tokens, what ended them included
    completions: list[str]  # decoded, without special tokens
    ended: Tensor  # [B] bool: whether EOS or a stop string ended the completion, rather than max_new_tokens
    groups: Tensor  # [B] int64: completions of the same prompt have the same number
    logprobs: Tensor  # [B, T] float32, of the tokens as they were sampled, 0 on padding


def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    keys: Tensor,
    config: RolloutConfig,
    *,
    engine: Engine,
    device: torch.device,
    eos_ids: list[int] | None = None,
    progress: Callable[[int], None] = lambda ended: None,
) -> Rollout:
    """Sample one completion for every prompt (repeat a prompt for several), from the policy's own distribution.

    Only the temperature changes that distribution, so log-probabilities that are computed of the tokens later equal
    those at sampling time, up to rounding and to how differently the engine computes.

    Args:
        keys: of `sequence_keys`, one for every prompt. A completion depends on its prompt and key and on no other's, up
            to the rounding of the model's products.
        engine: what samples. It is woken, given the policy as it is now, and put to sleep again, also after an error.
        device: of the result.
        eos_ids: tokens that end a completion; by default the policy's own, or the tokenizer's.
        progress: is told how many completions have ended, whenever more have.

    Raises:
        FloatingPointError: the policy's probabilities are not finite.
        ModelError: a prompt holds a token without an embedding, or none at all; or the policy's `eos_token_id`
            is no token id or list of them.
        EngineError: the engine failed.
    """
    for number, prompt in enumerate(prompts):
        if not prompt.input_ids:  # nothing that the first token could be predicted from
            raise ModelError(f"prompt {number} of the batch has no tokens; begin it with the tokenizer's BOS or EOS")
    ids, prompt_mask = pad_left([prompt.input_ids for prompt in prompts], tokenizer.pad_token_id)
    readable_ids(backbone_of(policy), ids, prompt_mask)
    sampling = Sampling(
        tokenizer,
        eos=_eos_ids(policy, tokenizer) if eos_ids is None else eos_ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop=tuple(config.stop),
        batch_size=config.generation_batch_size,
    )
    try:
        engine.wake()
        engine.sync(policy)
        completions = engine.sample([prompt.input_ids for prompt in prompts], keys, sampling, progress)
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is what must be mended
            engine.sleep()
        raise
    engine.sleep()

    tokens = _pad_right([completion.tokens for completion in completions], tokenizer.pad_token_id, torch.long)
    lengths = torch.tensor([len(completion.tokens) for completion in completions])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    numbers: dict[int, int] = {}  # of each prompt, which is one object however often it is repeated
    groups = [numbers.setdefault(id(prompt), len(numbers)) for prompt in prompts]
    return Rollout(
        sequences=torch.cat([ids, tokens], dim=1).to(device),
        attention_mask=torch.cat([prompt_mask, mask.long()], dim=1).to(device),
        mask=mask.to(device),
        completions=tokenizer.batch_decode(tokens, skip_special_tokens=True),
        ended=torch.tensor([completion.ended for completion in completions], device=device),
        groups=torch.tensor(groups, device=device),
        logprobs=_pad_right([completion.logprobs for completion in completions], 0.0, torch.float32).to(device),
    )


def _eos_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The policy's own end-of-sequence tokens, of which chat models often have several; or the tokenizer's."""
    own = policy.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if own is None else own
    eos = [eos] if isinstance(eos, int) else eos
    if not isinstance(eos, list) or not all(isinstance(token, int) for token in eos):
        raise ModelError(f"the model's eos_token_id: expected a token id or a list of them, got {quote(eos)}")
    return eos


def _pad_right(rows: list[list], fill: float, dtype: torch.dtype) -> Tensor:
    """Rows as one tensor, filled on the right."""
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=fill)
