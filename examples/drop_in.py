"""fastppo's loss in a training loop of your own: any transformers model, no logits. Takes seconds on a CPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastppo import linear_logprob, linear_ppo_loss

B, P, C, V = 8, 16, 32, 32000  # sequences, tokens of the longest prompt and completion, vocabulary
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=128, intermediate_size=256, num_hidden_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

# A rollout, here random: prompts are padded on the left and completions on the right, as a sampler returns them.
prompt_mask = torch.arange(P) >= torch.randint(0, P, (B, 1))  # [B, P]
mask = torch.arange(C) < torch.randint(1, C + 1, (B, 1))  # [B, C]: True for a sampled token
attention_mask = torch.cat([prompt_mask, mask], dim=1).long()  # [B, P + C]
tokens = torch.randint(1, V, (B, P + C)) * attention_mask  # [B, P + C], 0 is padding
position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at position 0
completions = tokens[:, P:]  # [B, C]
advantages = torch.randn(B, 1).expand(B, C)  # [B, C]


def hidden():  # [B, C, D]: the state at position t predicts the token at t + 1
    states = model.model(tokens, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
    return states[:, P - 1 : -1]


with torch.no_grad():  # log-probabilities under the policy that sampled, before it changes; 0 where the target is -100
    targets = completions.masked_fill(~mask, -100)
    old_logprobs = linear_logprob(hidden(), model.lm_head.weight, targets).logprobs  # [B, C]

for epoch in range(2):
    out = linear_ppo_loss(
        hidden(), model.lm_head.weight, completions, old_logprobs, advantages, mask=mask, entropy_coef=0.01
    )
    out.loss.backward()  # reaches the backbone through hidden(), and the lm_head
    optimizer.step()
    optimizer.zero_grad()
    print(epoch, {name: round(value.item(), 4) for name, value in out.metrics.items()})
