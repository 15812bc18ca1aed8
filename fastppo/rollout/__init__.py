"""Sampling completions from the policy.

sample.py       the door: prompts in, one padded rollout out
engine.py       the interface of what samples; choose.py picks one for a run
padded.py       the engines that decode with the policy itself: loop.py on a CPU, generate.py anywhere
continuous.py   transformers' continuous batching, on the policy's own weights
vllm.py         vLLM, with weights of its own
check.py        whether an engine computes what the policy does
draw.py         a token from its logits
ending.py       where a completion ends
"""
