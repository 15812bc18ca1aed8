"""Low-rank adapters (peft): made, switched, merged, saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastppo.errors import one_line, quote
from fastppo.extras import install_command
from fastppo.models.head import causal_of, check_head
from fastppo.models.load import quiet, why
from fastppo.models.quantize import dense_layer, is_quantized
from fastppo.models.source import ModelError, hub_offline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastppo.models.config import LoraConfig

POLICY, VALUE = "default", "value_adapter"
"""Names of adapters: peft's own, whose saved folder it reads; and one that no module of a model has, since peft leaves
out of one adapter's weights all that have another adapter's name in theirs (BERT and RWKV have modules `value`)."""
WEIGHTS_FILE = "adapter_model.safetensors"


def apply_lora(model: PreTrainedModel, lora: LoraConfig, *, critic: bool = False) -> nn.Module:
    """Wrap the model with low-rank adapters; only the adapters stay trainable.

    Args:
        critic: also add adapters of the same kind for a critic, under the name of `VALUE`. Those of `POLICY` compute
            until `using` switches.

    Raises:
        ModelError: peft is not installed, or the configuration does not fit the model.
    """
    with _peft() as peft:
        try:
            adapters = peft.LoraConfig(
                r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
            )
            adapted = peft.get_peft_model(model, adapters).eval()
            head = causal_of(adapted).get_output_embeddings() if getattr(model, "is_loaded_in_4bit", False) else None
            if hasattr(head, "lora_A"):
                raise ModelError(
                    f"model.lora.target_modules: {quote(lora.target_modules)} names the head, which stays dense under "
                    "model.quantization, and whose adapter takes memory of the head's size twice in every pass; leave "
                    "it out (all-linear does)"
                )
            if critic:
                adapted.add_adapter(VALUE, copy.deepcopy(adapters))
                for name, parameter in adapted.named_parameters():
                    parameter.requires_grad_(parameter.requires_grad or is_critics(name))
            check_head(adapted, padding=False)  # peft also wraps layers that do not return a tensor
            return adapted
        except (re.error, RecursionError) as error:  # RecursionError: thousands of parentheses
            given = f"{quote(lora.target_modules)} is not a regular expression"
            raise ModelError(f"model.lora.target_modules: {given} ({one_line(error)})") from None
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(f"model.lora: {why(error)}") from error


def is_critics(name: str) -> bool:
    """Whether the parameter of this name belongs to a critic's adapters."""
    return re.search(rf"\.lora_\w+\.{VALUE}(\.|$)", name) is not None


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that `using` switches."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextlib.contextmanager
def using(layers: Iterable[nn.Module], name: str | None) -> Iterator[None]:
    """Compute with the adapters of this name, or with none.

    peft's `set_adapter` and `disable_adapter` also freeze the others, so that of two adapters in one graph only the
    last would get a gradient.
    """
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer, active, _ in before:
            layer._active_adapter, layer._disable_adapters = active if name is None else name, name is None
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


def same_adapters(layers: list[nn.Module]) -> tuple[contextlib.AbstractContextManager, ...]:
    """Contexts of a forward pass and of its recomputation, which comes when other adapters may be active."""
    first = layers[0]
    return contextlib.nullcontext(), using(layers, None if first.disable_adapters else first.active_adapters[0])


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """Copy a model to the CPU with its adapters merged into the weights, as a plain model that computes the same.

    Quantized layers become dense, one at a time. If either of two tied embeddings has adapters, the copy's are not
    tied: merging would change the other one too.
    """
    instead: dict[int, Any] = {}  # what the copy has in place of an object
    for module in model.modules():
        if not is_quantized(module) or id(module) in instead:
            continue
        if hasattr(module, "lora_A"):
            added = sum(module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A)
            instead[id(module)] = instead[id(module.get_base_layer())] = dense_layer(module.get_base_layer(), added)
        else:
            instead[id(module)] = dense_layer(module)
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            instead[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
    merged = copy.deepcopy(model, instead).to("cpu")
    base = merged.get_base_model()
    base.is_loaded_in_4bit = False
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head.weight is embeddings.weight and (hasattr(head, "lora_A") or hasattr(embeddings, "lora_A")):
        linear = head.get_base_layer() if hasattr(head, "lora_A") else head
        linear.weight = nn.Parameter(linear.weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    return merged.merge_and_unload()


def save_adapters(model: nn.Module, folder: str | Path, name: str = POLICY) -> None:
    """Write the adapters of this name, without the model, as a folder that peft reads."""
    with _peft() as peft:
        tensors = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        model.peft_config[name].save_pretrained(str(folder))
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder, WEIGHTS_FILE))


def load_adapters(model: PreTrainedModel, folder: str | Path) -> nn.Module:
    """Put saved adapters on the model that they were made for, not to be trained.

    Raises:
        ModelError: they are damaged, or were made for another model.
    """
    with _peft() as peft:
        try:
            adapted = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(str(folder))).eval()
            result = peft.set_peft_model_state_dict(adapted, load_file(Path(folder, WEIGHTS_FILE)))
            if lacking := [name for name in result.missing_keys if "lora_" in name] + result.unexpected_keys:
                raise ModelError(f"{quote(lacking[0])} is in one of them only")
            check_head(adapted, padding=False)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}: not adapters of this model ({one_line(error, 200)})") from error
    return adapted.requires_grad_(False)


@contextlib.contextmanager
def _peft() -> Iterator[Any]:
    """peft, which imports bitsandbytes, without a look at the Hub and without output."""
    with hub_offline(), quiet():
        try:
            import peft
        except ImportError:
            raise ModelError(f"model.lora: needs peft; {install_command('demo')}") from None
        yield peft
