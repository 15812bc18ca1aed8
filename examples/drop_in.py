"""fastppo's loss in a loop of your own: any transformers model, no logits. A few seconds on a CPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastppo import linear_logprob, linear_ppo_loss

model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=128, intermediate_size=256, num_hidden_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.randint(0, 32000, (8, 48))  # [B, T + 1]: prompts of 16 tokens, and what was sampled after them
mask = (torch.arange(47) >= 15).expand(8, 47)  # [B, T]: True for a sampled token
advantages = torch.randn(8, 1).expand(8, 47)  # [B, T]


def hidden():  # [B, T, D]: the state at t predicts the token at t + 1
    return model.model(tokens).last_hidden_state[:, :-1]


with torch.no_grad():  # of the policy that sampled, before it changes
    old_logprobs = linear_logprob(hidden(), model.lm_head.weight, tokens[:, 1:].masked_fill(~mask, -100)).logprobs

for epoch in range(2):
    out = linear_ppo_loss(
        hidden(), model.lm_head.weight, tokens[:, 1:], old_logprobs, advantages, mask=mask, entropy_coef=0.01
    )
    out.loss.backward()  # reaches the backbone through hidden(), and the lm_head
    optimizer.step()
    optimizer.zero_grad()
    print(epoch, {name: round(value.item(), 4) for name, value in out.metrics.items()})
