"""Small random models of many architectures, with head options that show when they are forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = SIZES | {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Scales and caps far from doing nothing, so that a forgotten one shows.
OPTIONS = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "mistral": {},
    "phi": {},  # a head with a bias
    "phi3": {},
    "gpt2": {"n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "bloom": {},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "falcon_h1": {
        "lm_head_multiplier": 0.3,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 2},
    "hyperclovax": {"logits_scaling": 3.0},
}


def random_model(kind: str, *, head_scale: float, **options) -> nn.Module:
    """A causal model of a kind; `options` go over those above. Skips the test where transformers has no such kind."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = CONFIG_MAPPING[kind](**SMALL | OPTIONS.get(kind, {}) | options)
    return randomize(AutoModelForCausalLM.from_config(config), head_scale)


def randomize(model: nn.Module, head_scale: float) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():  # logits large enough to be bent by a soft cap
        model.get_output_embeddings().weight.mul_(head_scale)
    return model.eval()
