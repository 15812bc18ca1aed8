"""A run's models without their weights, from the configurations of the models alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.algorithms.algorithm import Algorithm
from fastppo.models.attention import NAME
from fastppo.models.config import ModelConfig
from fastppo.models.head import backbone_of, causal_of
from fastppo.models.load import caps_attention, disable_dropout, enable_gradient_checkpointing, load_configuration, why
from fastppo.models.policy_models import PolicyModels
from fastppo.models.quantize import layers_to_quantize
from fastppo.models.source import ModelError
from fastppo.training.config import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH = "fastppo_plan"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def build_models(config: Config, algorithm: Algorithm, depth: int | None, device_type: str) -> PolicyModels:
    """The models of a run on the meta device, as the trainer makes them.

    Args:
        depth: number of layers; None for all.
        device_type: of the device that is planned for, which decides how attention is computed.

    Raises:
        ModelError: a configuration cannot be had, or is none of a causal language model.
    """
    by_objective = config.algorithm_config.multi_objective_aggregation == "normalize_then_sum"
    num_values = (len(config.rewards) if by_objective else None) if algorithm.needs_values else 0

    def load(read: functools.partial) -> nn.Module:
        return _causal_lm(read.args[0], depth, device_type)

    here = dataclasses.replace(config.model, offload_idle=False)  # the meta device has nothing to move
    models = PolicyModels(here, device=torch.device("meta"), num_values=num_values, load=load)
    models.device = torch.device("cpu")  # where the tensors of a trace pretend to be
    return models


def num_layers(config: PretrainedConfig) -> int | None:
    """Number of layers of a model whose layers are alike, as far as its configuration tells; None for others."""
    text = config.get_text_config()
    types = set(getattr(text, "layer_types", None) or ["full_attention"])
    count = getattr(text, "num_hidden_layers", None)
    return count if types <= _LAYER_TYPES and count and count > 4 else None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers."""
    names = set(getattr(causal_of(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _causal_lm(config: ModelConfig, depth: int | None, device_type: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    hf = copy.deepcopy(load_configuration(config))
    if depth is not None:
        text = hf.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
            ).eval()
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{config.name_or_path}: no model can be made of its configuration ({why(error)})") from error
    disable_dropout(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    chosen = model.config.get_text_config()._attn_implementation
    if device_type == "cuda" and config.attn_implementation != "eager":
        _register_flash()
        model.set_attn_implementation(FLASH)
    elif config.attn_implementation in ("eager", "sdpa"):
        model.set_attn_implementation(config.attn_implementation)
    elif chosen == "sdpa":
        model.set_attn_implementation("eager" if caps_attention(model) else NAME)
    backbone = backbone_of(model)
    backbone.fastppo_can_pack = (
        device_type == "cpu"
        and config.attn_implementation in ("auto", "sdpa")
        and set(getattr(model.config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not (getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True))
    )
    if config.quantization:
        for parent, name in layers_to_quantize(model):
            layer = Quantized(getattr(parent, name), getattr(torch, config.autocast or config.dtype))
            setattr(parent, name, layer)
        model.is_loaded_in_4bit = False  # so that peft takes these layers for plain ones
    return model


class Quantized(nn.Linear):
    """As much memory as bitsandbytes' Linear4bit: weights in 4 bits, their scales in 8 bits."""

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype, count = compute_dtype, layer.weight.numel()
        blocks = math.ceil(count / 64)
        # Each block has a scale in 8 bits, 256 of them one in 32; and tables of 256 and of 16 numbers, and an offset.
        tables = 4 * math.ceil(blocks / 256) + 4 * (256 + 16 + 1)
        self.weight = nn.Parameter(torch.empty(math.ceil(count / 2), dtype=torch.uint8, device="meta"), False)
        self.register_buffer("scales", torch.empty(blocks + tables, dtype=torch.uint8, device="meta"))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        return _QuantizedProduct.apply(x.to(self.compute_dtype), self.weight, shape, self.bias).to(x.dtype).clone()


class _QuantizedProduct(torch.autograd.Function):
    """The weight is expanded for each product, forward and backward, and not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


class _FlashAttention(torch.autograd.Function):
    """The memory of FlashAttention: it saves its arguments, its output and a number for each query and head."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query[..., : value.shape[-1]])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _flash(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _register_flash() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FLASH, _flash)
    AttentionMaskInterface.register(FLASH, lambda *args, **kwargs: None)


def fake_(models: PolicyModels, dtype: torch.dtype | None = None) -> None:
    """Give the models parameters and buffers of the FakeTensorMode that is on; of `dtype` where they are gathered."""
    made: dict[Tensor, Tensor] = {}  # tied parameters stay tied
    parts = [part for part in (models.policy, models.value, models._reference) if part is not None]
    for owner in (module for part in parts for module in part.modules()):
        for table in (owner._parameters, owner._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if old not in made:
                    kept = dtype is None or not old.is_floating_point()
                    new = torch.empty_like(old, device="cpu", dtype=old.dtype if kept else dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[old]


def tensors_of(module: nn.Module | None) -> list[Tensor]:
    """All parameters and buffers, each once."""
    if module is None:
        return []
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
