"""Causal language models from transformers, and what the operators need of them."""

# ruff: noqa: F401
from fastppo.models.adapters import apply_lora, merge_lora
from fastppo.models.head import LMHead, backbone_and_head, backbone_of, check_head, readable_ids, token_hidden
from fastppo.models.load import (
    context_length,
    disable_dropout,
    load_causal_lm,
    load_context_length,
    load_tokenizer,
)
from fastppo.models.source import ModelError, ModelSource, resolve
from fastppo.models.value import ValueHead, ValueModel
