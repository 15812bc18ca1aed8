"""Whether an engine computes what the policy does, which it may not for architectures that it treats in its own way."""

from __future__ import annotations

import torch
from torch import nn

from fastppo.models import backbone_of
from fastppo.models.head import causal_of
from fastppo.rollout.engine import Engine, Sampling


@torch.no_grad()
def found_wrong(engine: Engine, policy: nn.Module) -> str | None:
    """Sample two tokens, and tell how far their log-probabilities are from the policy's; None if only by rounding.

    All ranks that share a sharded policy must call.

    Args:
        engine: `sync` has given it this policy.
    """
    causal, rows = causal_of(policy), backbone_of(policy).get_input_embeddings().weight.shape[0]
    prompt = [token % rows for token in (3, 1, 4, 15)]
    sampling = Sampling(tokenizer=None, eos=[], max_new_tokens=2)  # without stop strings, nothing is decoded
    tokens, logprobs, _ = engine.sample([prompt[:1], prompt], torch.zeros(2, dtype=torch.long), sampling)[1]
    ids = torch.tensor([prompt + tokens], device=causal.device)
    logits = causal(input_ids=ids).logits[0, -3:-1]
    own = logits.float().log_softmax(-1).gather(1, ids[0, -2:, None]).squeeze(1).cpu()
    gap = (own - torch.tensor(logprobs)).abs().max().item()
    tolerance = 1e-2 if logits.dtype == torch.float32 else 0.5  # that of bfloat16's rounding, amply
    return None if gap <= tolerance else f"its log-probabilities are off by {gap:.1g} for this model"
