"""Base weights in 4 bits for adapters on top (QLoRA; Dettmers et al., 2023, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from fastppo.errors import ConfigError, one_line
from fastppo.extras import install_command
from fastppo.models.source import ModelError, hub_offline

_OLDEST = "0.50"  # earlier ones forget the dtype of the weights that they quantized


def check_bitsandbytes(key: str) -> None:
    """Raise ConfigError if bitsandbytes, which this key of the configuration needs, is missing or too old."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key} needs bitsandbytes; {install_command('demo')}")
    found = importlib.metadata.version("bitsandbytes")
    if Version(found) < Version(_OLDEST):
        raise ConfigError(
            f'{key} needs bitsandbytes {_OLDEST} or later, this is {found}; pip install "bitsandbytes>={_OLDEST}"'
        )


def import_bitsandbytes(key: str) -> ModuleType:
    """Import bitsandbytes, without a look at the Hugging Face Hub for native code; see `check_bitsandbytes`."""
    check_bitsandbytes(key)
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # it warns that it did not get that code
        with hub_offline():
            import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:  # its native library does not fit, or another package
        raise ConfigError(f"{key}: bitsandbytes cannot be imported ({one_line(error, 200)})") from error
    finally:
        logging.disable(before)
    return bitsandbytes


def quantize_(model: nn.Module, *, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Put the model on the device with the weights of its linear layers in 4 bits (nf4, its scales in 8 bits).

    The head, the embeddings and what is no `nn.Linear` stay as they are. The weights move one by one, so that the
    device never holds more than one that is not quantized, and the host frees each one.

    Args:
        model: a dense causal language model, on the host where the device has no room for it.
        compute_dtype: of the products, for which a layer's weight is expanded.

    Raises:
        ConfigError: there is no bitsandbytes that can do it.
        ModelError: too little of the model is in linear layers.
    """
    modules = import_bitsandbytes("model.quantization").nn
    options = {"compress_statistics": True, "quant_type": "nf4"}
    for parent, name in layers_to_quantize(model):
        layer = getattr(parent, name)
        shape = layer.in_features, layer.out_features, layer.bias is not None
        whole = device.type != "cpu" or layer.in_features % 64 == 0
        layer_type = modules.Linear4bit if whole else _layer_of_broken_rows()
        quantized = layer_type(*shape, compute_dtype=compute_dtype, device="meta", **options)
        weight = modules.Params4bit(layer.weight.detach(), module=quantized, **options)
        quantized.weight, quantized.bias = weight.to(device), layer.bias
        # Where the processor multiplies bfloat16, the first forward in eval mode would repack the weight for a
        # product without a derivative: adapters below it got no gradient, and state_dict() returned wrong weights.
        quantized.support_avx512bf16_for_cpu = False
        setattr(parent, name, quantized.train(layer.training))
    model.is_loaded_in_4bit = True  # peft then takes adapters that suit such layers
    model.to(device)


def layers_to_quantize(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers of a language model but its head: of each the parent, and its name there.

    Raises:
        ModelError: they have less than half of the weights. GPT-2 has layers of another kind, and a mixture of experts
            has most of its weights in parameters that are no layers.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    found = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer is not head
    ]
    apart = [layer.weight for layer in (head, embeddings) if layer is not None]
    others = sum(p.numel() for p in model.parameters() if all(p is not weight for weight in apart))
    share = sum(getattr(parent, name).weight.numel() for parent, name in found) / max(others, 1)
    if share < 0.5:
        raise ModelError(
            f"model.quantization: linear layers, which alone are put in 4 bits, have {share:.0%} of the weights of "
            f"{type(model).__name__} without head and embeddings; set it to null"
        )
    return found


def is_quantized(layer: nn.Module) -> bool:
    """Whether `quantize_` has made this layer."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


@torch.no_grad()
def dense_layer(layer: nn.Linear, added: Tensor | float = 0) -> nn.Linear:
    """A quantized layer as a plain one on the CPU, with the weight that it computes with; `added` is added to it."""
    weight = _expanded(layer.weight)
    dtype = weight.dtype
    weight = (weight.float() + added).to(dtype)
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.cpu(), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to("cpu", dtype, copy=True), requires_grad=False)
    return dense.train(layer.training)


def _expanded(weight: Tensor) -> Tensor:
    """The weight [out, in] of a quantized layer.

    Its blocks of 64 go on from row to row. Where a row has no whole number of them, bitsandbytes' code for AVX-512
    (0.50.2) takes scales of other blocks, so it is given a single row.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.shape = torch.Size((1, state.shape.numel()))
    return dequantize_4bit(weight.detach(), state).view(weight.quant_state.shape)


@functools.cache
def _layer_of_broken_rows() -> type[nn.Module]:
    from bitsandbytes.nn import Linear4bit

    class BrokenRowsLinear4bit(Linear4bit):
        """`Linear4bit` on a CPU, for rows that are no whole number of blocks; see `_expanded`."""

        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return _Product.apply(x.to(self.compute_dtype), self.weight, bias).to(x.dtype)

    return BrokenRowsLinear4bit


class _Product(torch.autograd.Function):
    """x Wᵀ + b of frozen W, which is expanded in either direction and not kept, and b."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, _expanded(weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ _expanded(ctx.weight).to(gradient.dtype), None, None
