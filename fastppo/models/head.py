"""Split a causal language model into its backbone and its head, which turns hidden states into logits.

    input_ids [B, T] ── backbone ──> hidden [B, T, D] ── W [V, D], b [V] ──> · logit_scale ──> soft cap ──> logits

The operators of fastppo take the hidden states and the head, so the logits [B, T, V] are never materialized.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.models.source import ModelError
from fastppo.ops.checks import looks_at_values

# Configuration entries that scale the logits, and whether they divide.
_SCALES = {
    "logit_scale": False,  # Cohere
    "lm_head_multiplier": False,  # Falcon-H1
    "logits_mup_width_multiplier": True,  # Inkling, which divides the hidden states
    "logits_scaling": True,  # Granite; MiniCPM3 divides the hidden states
}
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma, RecurrentGemma


class LMHead(NamedTuple):
    """The head that computes logits: ``softcap·tanh(logit_scale·(h Wᵀ + b)/softcap)``.

    The fields are named as the operators' keyword arguments.
    """

    weight: Tensor  # [V, D]: the parameter itself, or base + adapter, through which gradients reach both
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits [..., V] of hidden states [..., D]. For checks; training never computes them."""
        return _transform(F.linear(hidden, self.weight, self.bias), self.logit_scale, self.softcap)


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, LMHead]:
    """Split a causal language model into backbone and head.

    Call it in every step: a LoRA-wrapped head has a new weight after each optimizer step.

    Args:
        model: any AutoModelForCausalLM, its weights tied or not, wrapped by peft or not.

    Returns:
        The module that maps input_ids to ``.last_hidden_state`` [B, T, D], and the head. If the head has adapters of
        another precision, the weight has the wider of the two, since bfloat16 would round their updates away.

    Raises:
        ValueError: the model has no head, or one that is not ``h Wᵀ + b``.
    """
    causal = causal_of(model)
    weight, bias = _weight_and_bias(_output(causal))
    return backbone_of(model), LMHead(weight, bias, *_scale_and_softcap(causal))


def backbone_of(model: nn.Module) -> nn.Module:
    """The backbone alone: `backbone_and_head` adds an adapter of the head to a copy of its weight."""
    causal = causal_of(model)
    backbone = causal.base_model
    # A text-only class whose prefix is the multimodal wrapper's, as in Llama 4, is its own base model.
    return causal.model if backbone is causal else backbone


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """The model's own logits [N, V] of hidden states [N, D], by its head's module: adapters stay products of low rank.

    As a matrix, `hidden` is multiplied as it is. Of more dimensions and not contiguous, as the last states of padded
    rows are, PyTorch takes a product for each row, and in bfloat16 on a CPU a copy of a frozen weight for each too.
    """
    causal = causal_of(model)
    return _transform(_output(causal)(hidden), *_scale_and_softcap(causal))


def check_head(model: nn.Module, ids: Tensor | None = None, *, padding: bool = True) -> None:
    """Compare a model's own logits on a few tokens with those by `backbone_and_head`, with and without padding.

    Architectures scale and cap logits under many names, some recurrent ones read padding as tokens, and encoders read
    later tokens. An architecture unknown here would otherwise silently train on wrong probabilities.

    Args:
        model: any AutoModelForCausalLM, in eval mode.
        ids: [1, T] tokens to try; None takes four.
        padding: also compare with padding on either side and without the last token.

    Raises:
        ValueError: the logits by `backbone_and_head` are not the model's own, not finite, or depend on padding or on
            later tokens.
    """
    name = type(model).__name__
    try:
        backbone, head = backbone_and_head(model)
        if head.weight.is_meta:  # another process has the weights, and checks them
            return
        if ids is None:
            ids = torch.tensor([[3, 1, 4, 15]], device=head.weight.device) % head.weight.shape[0]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            hidden = token_hidden(backbone, ids, mask)
            # The tokens after padding, and all but the last of them before padding.
            rows, real = (torch.cat([F.pad(x, (2, 0)), F.pad(x[:, :-1], (0, 3))]) for x in (ids, mask))
            whole, shorter = token_hidden(backbone, rows, real) if padding else (None, None)
            ours = head.logits(hidden.to(head.weight)).float()
            own = model(input_ids=ids, attention_mask=mask).logits.float().to(ours.device)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be split into a backbone and a head ({error})") from error
    if not own.isfinite().all() and not ours.isfinite().all():
        raise ValueError(f"the logits of {name} are not finite: its weights are damaged, or their dtype is too narrow")
    exact = hidden.dtype in (torch.float32, torch.float64)
    # Both come from the same products, so only the scale and the cap round differently.
    if own.shape != ours.shape or not close(ours, own, 1e-4 if exact else 3e-2):
        raise ValueError(
            f"the logits of {name} are not those of a linear head with a constant scale and soft cap, so its "
            "log-probabilities cannot be computed from hidden states"
        )
    # In half precision the rounding of a deep model is as large as the effect of padding.
    if padding and exact and not close(whole[2:], hidden[0]):
        raise ValueError(f"the hidden states of {name} depend on padding, so sequences cannot be batched")
    if padding and exact and not close(shorter[:-3], hidden[0, :-1]):
        raise ValueError(f"the hidden states of {name} depend on later tokens, so they cannot predict these")


def token_hidden(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states of every token, independent of where the padding is.

    Args:
        backbone: from `backbone_and_head`.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens, 0 for padding on either side.

    Returns:
        [B, T, D] in the backbone's dtype, arbitrary but finite at padding.

    Raises:
        ModelError: a token that is not padding has no embedding.
    """
    arguments = {"input_ids": readable_ids(backbone, input_ids, attention_mask), "attention_mask": attention_mask}
    accepted = inspect.signature(type(backbone).forward).parameters
    if "position_ids" in accepted:
        # A sequence starts at position 0 wherever it lies in its row.
        arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    return backbone(**arguments).last_hidden_state


def readable_ids(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Token ids [B, T] with 0 at padding, since a pad token that was added to a tokenizer may have no embedding.

    Raises:
        ModelError: a token that is not padding has no embedding; of ids on a CPU, since others would have to be waited
            for (`sample` looks at prompts before they are moved).
    """
    ids = input_ids.masked_fill(attention_mask == 0, 0)
    if not looks_at_values(ids) or not ids.numel():
        return ids
    embeddings = backbone.get_input_embeddings()
    rows = getattr(getattr(embeddings, "base_layer", embeddings), "num_embeddings", None)  # inside peft's adapters
    if (least := int(ids.min())) < 0:
        raise ModelError(f"token {least} is below 0, so it cannot be read")
    if rows is not None and (largest := int(ids.max())) >= rows:
        raise ModelError(
            f"token {largest} has no embedding, the model has {rows}: it was added to the tokenizer but not to the "
            "model (model.resize_token_embeddings adds it)"
        )
    return ids


def close(given: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether two tensors differ by at most a share of the largest value; by default, that of float32 hidden states."""
    # NaN is not close to anything: every comparison with it is false.
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max())


def causal_of(model: nn.Module) -> nn.Module:
    """The transformers model inside peft's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _output(causal: nn.Module) -> nn.Module:
    if (output := causal.get_output_embeddings()) is None:
        raise ValueError(f"{type(causal).__name__} has no language-model head")
    return output


def _weight_and_bias(output: nn.Module) -> tuple[Tensor, Tensor | None]:
    if hasattr(output, "modules_to_save"):  # peft trains a whole copy of the head
        active = None if output.disable_adapters else next(iter(output.active_adapters), None)
        copies = output.modules_to_save
        output = copies[active] if active in copies else output.original_module  # noqa: SIM401 (no dict, has no get)
    base = output.get_base_layer() if hasattr(output, "lora_A") else output
    # Another kind of head may learn more than W and b (Dory: a scale per token), which its logits need not show yet.
    if type(base).forward is not nn.Linear.forward:
        kind = f"{type(base).__module__}.{type(base).__name__}"
        raise ValueError(f"the language-model head is a {kind}, not a torch.nn.Linear")
    weight, bias = base.weight, base.bias
    if base is output or output.disable_adapters or output.merged:
        return weight, bias
    for adapter in output.active_adapters:
        if adapter not in output.lora_A:
            continue
        down, up = output.lora_A[adapter], output.lora_B[adapter]
        plain = isinstance(up, nn.Linear) and up.bias is None and output.lora_variant.get(adapter) is None
        if not plain:
            raise ValueError("the language-model head supports only plain LoRA (no DoRA or other variant, no bias)")
        weight = weight + output.scaling[adapter] * (up.weight @ down.weight)  # [V, r] @ [r, D]
    return weight, bias


def _transform(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _scale_and_softcap(causal: nn.Module) -> tuple[float, float | None]:
    scale, config = 1.0, causal.config.get_text_config()
    for name, divides in _SCALES.items():
        if (value := getattr(config, name, None)) is None:
            continue
        if name == "logits_scaling" and config.model_type.startswith(_MULTIPLIES_BY_LOGITS_SCALING):
            divides = False
        scale = scale / value if divides else scale * value
    return scale, next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
