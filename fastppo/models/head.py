"""A causal language model taken apart at its last step: hidden states, and the head that makes logits of them.

    input_ids [B, T] ── backbone ──> hidden [B, T, D] ── W [V, D], b [V] ──> · logit_scale ──> soft cap ──> logits

The operators of fastppo take the hidden states and the head, so the [B, T, V] logits on the right are never made.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# How architectures multiply their logits: name of the configuration entry, and whether it divides.
_SCALES = {
    "logit_scale": False,  # Cohere
    "lm_head_multiplier": False,  # Falcon-H1
    "logits_mup_width_multiplier": True,  # Inkling, which divides the hidden states
    "logits_scaling": True,  # Granite; MiniCPM3 divides the hidden states
}
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma, RecurrentGemma


class LMHead(NamedTuple):
    """What the logits are made with: ``softcap·tanh(logit_scale·(h Wᵀ + b)/softcap)``."""

    weight: Tensor
    """[V, D], the parameter itself, or base + adapter, through which gradients reach both."""
    bias: Tensor | None
    """[V]"""
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits [..., V] of hidden states [..., D]. For checks: training never makes them."""
        z = F.linear(hidden, self.weight, self.bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, LMHead]:
    """Take a causal language model apart.

    Cheap enough for every step, and meant for it: a LoRA-wrapped head has a new weight after each optimizer step.

    Args:
        model: any AutoModelForCausalLM, its weights tied or not, wrapped by peft or not.

    Returns:
        The module that maps input_ids to ``.last_hidden_state`` [B, T, D], and its head. Where adapters of another
        precision sit on the head, the weight is in the wider of the two: bf16 would round their updates away.

    Raises:
        ValueError: the head is of a kind that is not ``h Wᵀ + b``.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = causal.get_output_embeddings()
    if output is None:
        raise ValueError(f"{type(causal).__name__} has no language-model head")
    weight, bias = _weight_and_bias(output)
    config = causal.config.get_text_config()
    backbone = causal.base_model
    if backbone is causal:  # a text-only class whose prefix is the multimodal wrapper's, as in Llama 4
        backbone = causal.model
    return backbone, LMHead(weight, bias, _logit_scale(config), _softcap(config))


def check_head(model: nn.Module) -> None:
    """Run a few tokens through a model whole and taken apart, and with and without padding.

    Architectures scale and cap logits under many names, and some recurrent ones read padding as tokens. One that is not
    known here would otherwise train on wrong probabilities without a sign.

    Raises:
        ValueError: the logits by `backbone_and_head` are not the model's own, or depend on padding.
    """
    name = type(model).__name__
    try:
        backbone, head = backbone_and_head(model)
        ids = torch.tensor([[3, 1, 4, 15]], device=head.weight.device) % head.weight.shape[0]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            hidden = token_hidden(backbone, ids, mask)
            padded = token_hidden(backbone, F.pad(ids, (2, 0)), F.pad(mask, (2, 0)))[:, 2:]
            ours = head.logits(hidden.to(head.weight.dtype)).float()
            own = model(input_ids=ids, attention_mask=mask).logits.float()
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be taken apart into a backbone and a head ({error})") from error
    exact = hidden.dtype in (torch.float32, torch.float64)
    # Both went through the same products, so only the rounding of the scale and the cap is left.
    if own.shape != ours.shape or not _close(ours, own, 1e-4 if exact else 3e-2):
        raise ValueError(
            f"{name} makes its logits in a way that is not a linear head with a constant scale and soft cap, so its "
            "log-probabilities cannot be computed from hidden states"
        )
    # In half precision the rounding of a deep model is too near to what padding does to tell them apart.
    if exact and not hidden_close(padded, hidden):
        raise ValueError(f"the hidden states of {name} depend on padding, so sequences cannot be batched")


def token_hidden(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states of every token, the same wherever the padding is.

    Args:
        backbone: from `backbone_and_head`.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens, 0 for padding on either side.

    Returns:
        [B, T, D] in the backbone's dtype; what stands at padding is arbitrary but finite.
    """
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
    accepted = _parameters(type(backbone))
    if "position_ids" in accepted:
        # A sequence starts at position 0 wherever it lies in its row.
        arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    return backbone(**arguments).last_hidden_state


def hidden_close(given: Tensor, expected: Tensor) -> bool:
    """Whether float32 hidden states are the same but for rounding."""
    return _close(given, expected, 1e-3)


def _close(given: Tensor, expected: Tensor, tolerance: float) -> bool:
    # `<=` rather than its opposite, so that NaN is not close to anything.
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max())


@functools.cache
def _parameters(backbone_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(backbone_class.forward).parameters)


def _weight_and_bias(output: nn.Module) -> tuple[Tensor, Tensor | None]:
    if hasattr(output, "modules_to_save"):  # peft trains a whole copy of the head
        active = None if output.disable_adapters else next(iter(output.active_adapters), None)
        copies = output.modules_to_save
        output = copies[active] if active in copies else output.original_module  # noqa: SIM401 (no dict, has no get)
    base = output.get_base_layer() if hasattr(output, "lora_A") else output
    # A head of its own kind may learn more than W and b (Dory: a scale a token), which no probe of its logits reveals.
    if type(base).forward is not nn.Linear.forward:
        raise ValueError(f"the language-model head is a {type(base).__name__}, not a torch.nn.Linear")
    weight, bias = base.weight, base.bias
    if base is output or output.disable_adapters or output.merged:
        return weight, bias
    for adapter in output.active_adapters:
        if adapter not in output.lora_A:
            continue
        down, up = output.lora_A[adapter], output.lora_B[adapter]
        if output.lora_variant.get(adapter) is not None or up.bias is not None:
            raise ValueError(
                "only plain LoRA is possible on the language-model head (no DoRA or other variant, no bias)"
            )
        weight = weight + output.scaling[adapter] * (up.weight @ down.weight)  # [V, r] @ [r, D]
    return weight, bias


def _logit_scale(config: object) -> float:
    scale = 1.0
    for name, divides in _SCALES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if name == "logits_scaling" and config.model_type.startswith(_MULTIPLIES_BY_LOGITS_SCALING):
            divides = False
        scale = scale / value if divides else scale * value
    return scale


def _softcap(config: object) -> float | None:
    return next((value for name in _SOFTCAPS if (value := getattr(config, name, None))), None)
