"""A transformers model whose forward also returns log-probabilities, entropy and loss, without computing logits.

    input_ids [B, T] ── backbone ──> hidden [B, T, D] ── lm_head, labels shifted by one ──> logprobs, entropy [B, T - 1]

`patch_model` replaces the forward of one model (an attribute of the instance); class, parameters and signature stay.
Only calls with ``return_logprobs=True`` take the new path, so generation and everything else that needs logits works as
before. Tested with transformers 4.57.6 and 5.24.0.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.integrations.patching import origin, require
from fastppo.models.head import backbone_and_head, backbone_of, causal_of, check_head
from fastppo.ops.checks import ARGUMENTS, check_shape, check_targets, positive
from fastppo.ops.linear_logprob import linear_logprob

SUPPORTED = ">=4.57,<6"
IGNORED = -100  # transformers' own

SLOT = "_fastppo_patch"  # the attribute of a patched model that holds its `LogprobForward`


def patch_model(model: nn.Module, *, temperature: float = 1.0, backend: str | None = None) -> nn.Module:
    """Give a causal language model a forward without logits; `unpatch_model` takes it away.

    ``model(input_ids=..., attention_mask=..., labels=..., return_logprobs=True)`` then returns a `CausalLMLogprobs`, or
    a tuple with ``return_dict=False``. Without ``return_logprobs`` the forward is the model's own. Works under
    autocast, torch.compile, gradient checkpointing, DDP and FSDP2, with LoRA adapters (also on the head), tied weights,
    and 4- or 8-bit base weights.

    Args:
        model: any AutoModelForCausalLM or a vision-language model, wrapped by peft or not; patched in place.
        temperature: divides the logits, as the sampler's does.
        backend: backend of `linear_logprob`; None selects it by device.

    Returns:
        The model.

    Raises:
        ImportError: transformers is missing, or its version is outside the supported range.
        TypeError: not a transformers model.
        RuntimeError: fastppo or another library has replaced the model's forward already.
        ValueError: its head is not ``h Wᵀ + b`` with a constant scale and soft cap; the model is unchanged.
    """
    require("transformers", SUPPORTED)
    from fastppo.integrations.model_output import CausalLMLogprobs

    install(model, LogprobForward("return_logprobs", CausalLMLogprobs, temperature, backend=backend))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Restore the forward that the model had before `patch_model` or `fastppo.integrations.trl`; returns the model.

    Raises:
        RuntimeError: the model is not patched by fastppo, or another library has patched over it since.
    """
    causal = _causal(model)
    patch = vars(causal).get(SLOT)
    if patch is None:
        raise RuntimeError(f"{type(causal).__name__} is not patched by fastppo")
    if (other := origin(vars(causal).get("forward"))) != __name__:
        raise RuntimeError(f"{other} has replaced fastppo's forward of {type(causal).__name__}; undo that first")
    if patch.replaced is None:
        del causal.forward
    else:
        causal.forward = patch.replaced
    delattr(causal, SLOT)
    return model


@dataclass
class LogprobForward:
    """Settings of a patched forward; stored in the model, so that a deep copy of the model gets its own."""

    keyword: str
    """The forward's argument that requests log-probabilities."""
    output: Callable[..., Any]
    """Makes the ModelOutput of the library whose convention this is of the fields of `CausalLMLogprobs`."""
    temperature: float
    backend: str | None = None
    float32_head: bool = False
    """Compute log-probabilities in float32, outside autocast, with the weight cast to float32."""
    replaced: Callable | None = None
    """The instance's own forward before (accelerate sets one that moves inputs), or None."""


def install(model: nn.Module, patch: LogprobForward) -> None:
    """`patch_model` for any library's convention; raises the same errors."""
    require("transformers", SUPPORTED)
    ARGUMENTS["temperature"]("temperature", patch.temperature)
    if patch.backend is not None:
        ARGUMENTS["backend"]("backend", patch.backend)
    causal = _causal(model)
    name = type(causal).__name__
    if (earlier := vars(causal).get(SLOT)) is not None:
        raise RuntimeError(f"{name} is already patched by fastppo ({earlier.keyword}=True); call unpatch_model first")
    if (other := _foreign_forward(causal)) is not None:
        raise RuntimeError(
            f"{other} has replaced the forward of {name}. Two patches of one forward give wrong numbers: undo that "
            "one, or do without this one"
        )
    if any(hasattr(parameter, "ds_id") for parameter in causal.parameters()):
        raise RuntimeError(f"{name} is partitioned by DeepSpeed ZeRO-3, which hides the lm_head; use FSDP2 instead")
    output = causal.get_output_embeddings()
    if not patch.float32_head and output is not None and _foreign_instance_forward(output) is not None:
        raise RuntimeError(f"the forward of {name}'s lm_head has been replaced; undo that first")
    if not any(parameter.is_meta or hasattr(parameter, "full_tensor") for parameter in causal.parameters()):
        # Not without values, nor with shards of them: a forward there would be a collective call.
        training = [part for part in causal.modules() if part.training]
        causal.eval()
        try:
            check_head(causal, _probe_ids(causal), padding=False)
        finally:
            for part in training:
                part.training = True
    patch.replaced = vars(causal).get("forward")
    setattr(causal, SLOT, patch)
    causal.forward = _make_forward(type(causal), type(backbone_of(causal))).__get__(causal)


def _make_forward(model_class: type[nn.Module], backbone_class: type[nn.Module]) -> Callable:
    own = model_class.forward
    positional = tuple(inspect.signature(own).parameters)[1:]  # the backbone's order may differ
    caches = "use_cache" in inspect.signature(backbone_class.forward).parameters

    @functools.wraps(own)  # generate() and Trainer read the signature
    def forward(self, *args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        patch = getattr(self, SLOT)
        targets = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not kwargs.pop(patch.keyword, False):
            kwargs |= {name: value for name, value in targets.items() if value is not None}
            return own(self, *args, **kwargs) if patch.replaced is None else patch.replaced(*args, **kwargs)
        kwargs |= zip(positional, args, strict=False)
        as_tuple = kwargs.pop("return_dict", None) is False
        kwargs = {name: value for name, value in kwargs.items() if name != "use_cache"}
        kwargs |= {"use_cache": False} if caches else {}
        output = patch.output(**_without_logits(self, patch, kwargs, **targets))
        return output.to_tuple() if as_tuple else output

    return forward


def _without_logits(
    causal: nn.Module,
    patch: LogprobForward,
    inputs: dict[str, Any],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> dict[str, Tensor | None]:
    if labels is None and shift_labels is None:
        raise ValueError(f"labels: required with {patch.keyword}=True; use -100 where no log-probability is needed")
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    ARGUMENTS["targets"](name, given)
    if not isinstance(num_items_in_batch, (Tensor, type(None))):
        positive("num_items_in_batch", num_items_in_batch)
    config = causal.config.get_text_config()
    if inputs.get("output_router_logits") is None and getattr(config, "output_router_logits", False):
        inputs["output_router_logits"] = True
    # Looked up on every call: FSDP replaces parameters, and LoRA on the head adds an adapter to the weight.
    backbone, head = backbone_and_head(causal)
    outputs = backbone(**inputs)
    hidden = outputs.last_hidden_state
    check_shape(name, given, hidden.shape[:-1], "one for each token")
    if shift_labels is None:  # no state predicts the first token
        given = F.pad(labels[..., 1:], (1, 0), value=IGNORED)
    check_targets(given, hidden.shape[:-1], head.weight.shape[0], IGNORED, name=name)
    # The last state has no label; -100 for it avoids the copy that hidden[:, :-1] would make.
    shifted = given.roll(-1, -1) if shift_labels is None else given

    device = hidden.device.type
    if patch.float32_head:
        hidden = hidden.float()
        head = head._replace(weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())
    elif not torch.is_autocast_enabled(device):
        hidden = hidden.to(head.weight.dtype)  # adapters on the head may have a wider precision
    if hidden.device != head.weight.device:  # a model split over devices by device_map
        hidden, shifted = hidden.to(head.weight.device), shifted.to(head.weight.device)
    options = {"temperature": patch.temperature, "return_entropy": True, "backend": patch.backend}
    with torch.autocast(device, enabled=False) if patch.float32_head else contextlib.nullcontext():
        scored = linear_logprob(hidden, targets=shifted, **head._asdict(), **options)
    keep = slice(None, -1) if shift_labels is None else slice(None)
    mask = (shifted != IGNORED)[..., keep]
    # Copies: FSDP2 would lose its hook on a view that the caller changes in place.
    logprobs, entropy = scored.logprobs[..., keep].clone(), scored.entropy[..., keep].clone()
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(logprobs.device)
    loss = -logprobs.sum() / count
    aux_loss = None
    if inputs.get("output_router_logits"):
        aux_loss = _load_balancing_loss(causal, config, outputs.router_logits, inputs.get("attention_mask"))
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
    return {"loss": loss, "logprobs": logprobs, "entropy": entropy, "label_mask": mask, "aux_loss": aux_loss}


def _load_balancing_loss(causal: nn.Module, config: Any, router_logits: Any, mask: Tensor | None) -> Tensor:
    """The model's own load-balancing loss: every architecture's module has a function of this name."""
    formula = getattr(sys.modules[type(causal).__module__], "load_balancing_loss_func", None)
    experts = getattr(causal, "num_experts", getattr(config, "num_experts", None))
    chosen = getattr(causal, "num_experts_per_tok", getattr(config, "num_experts_per_tok", None))
    if formula is None or experts is None or chosen is None:
        raise ValueError(
            f"output_router_logits: the load-balancing loss of {type(causal).__name__} is not known; switch it off"
        )
    return formula(router_logits, experts, chosen, mask)


def _causal(model: nn.Module) -> nn.Module:
    """The transformers model inside its peft wrapper, if it has one."""
    causal = causal_of(model)
    if not (hasattr(causal, "get_output_embeddings") and hasattr(causal, "config")):
        raise TypeError(
            f"model: expected a transformers model or one wrapped by peft, got {type(model).__name__}; patch it before "
            "it is wrapped for distributed training or compiled"
        )
    return causal


def _foreign_instance_forward(module: nn.Module) -> str | None:
    """The module that set this instance's forward; accelerate's hooks, which only move inputs, do not count."""
    forward = vars(module).get("forward")
    if forward is None or "_hf_hook" in vars(module):
        return None
    if "_original_forward" in vars(module):
        return "Accelerator.prepare (patch the model before it is prepared)"
    return origin(forward)


def _foreign_forward(causal: nn.Module) -> str | None:
    """The module that replaced the forward of the instance or of its class, if any."""
    if (who := _foreign_instance_forward(causal)) is not None:
        return who
    owner = next(cls for cls in type(causal).__mro__ if "forward" in vars(cls))
    function = vars(owner)["forward"]
    known = {owner.__module__.partition(".")[0], "transformers", "torch"}  # decorators live there
    while function is not None:
        where = origin(function)
        function = getattr(function, "__wrapped__", None)
        # The function at the bottom is the class's own; above it there are only decorators.
        if where.partition(".")[0] not in known or (function is None and where != owner.__module__):
            return where
    return None


def _probe_ids(causal: nn.Module) -> Tensor:
    """[1, 5] ordinary tokens; a special one, such as an image's placeholder, would need further inputs."""
    entries = [*vars(causal.config).items(), *vars(causal.config.get_text_config()).items()]
    special = [value for name, value in entries if name.endswith(("token_id", "token_index"))]
    weight = causal.get_input_embeddings().weight
    ordinary = (token for token in range(1, weight.shape[0]) if token not in special)
    return torch.tensor([list(itertools.islice(ordinary, 5))], device=weight.device)
