"""Models, taken from outside and taken apart for the operators."""

from fastppo.models.head import LMHead, backbone_and_head, check_head, token_hidden
from fastppo.models.load import (
    ModelError,
    ModelSource,
    apply_lora,
    context_length,
    disable_dropout,
    freeze_copy,
    load_causal_lm,
    load_tokenizer,
    resolve,
)
from fastppo.models.value import ValueHead, ValueModel

__all__ = [
    "LMHead",
    "ModelError",
    "ModelSource",
    "ValueHead",
    "ValueModel",
    "apply_lora",
    "backbone_and_head",
    "check_head",
    "context_length",
    "disable_dropout",
    "freeze_copy",
    "load_causal_lm",
    "load_tokenizer",
    "resolve",
    "token_hidden",
]
