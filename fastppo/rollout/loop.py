"""Sample completions on a CPU, where reading the weights dominates the cost of a token.

For 32 completions of 24 tokens by SmolLM2-135M under bfloat16 autocast on two Zen 4 cores, in seconds: transformers'
generate() 2.7; with few random numbers a row in place of torch.multinomial's one exponential for each token of the
vocabulary 2.25; with weights laid out once for oneDNN rather than at every product 1.75; in a loop that only calls the
model and reads each prompt once, however many completions it has, 1.65; with one product for the layers that receive
the same tensor 1.4.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin

from fastppo.models.head import backbone_of, causal_of, logits_of
from fastppo.rollout.draw import draw, random_numbers
from fastppo.rollout.padded import Batch, PaddedEngine

# The linear layers that attention and the gated MLP of most architectures call on the same tensor, in this order.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LAYER_TYPES = {"full_attention", "sliding_attention"}  # of which a DynamicCache keeps the states


class LoopEngine(PaddedEngine):
    """Decodes on a CPU with a policy that `can_decode` accepts, with or without adapters.

    Meanwhile the policy's linear layers may run on prepared weights, see `_prepared_weights`.
    """

    def decode(self, ids: Tensor, mask: Tensor, keys: Tensor, batch: Batch) -> None:
        causal = causal_of(self.policy)
        backbone, cache = backbone_of(causal), DynamicCache(config=causal.config)
        arguments = {cache_name(causal): cache, "use_cache": True}

        def step(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            """[b, V] logits after the last of these tokens."""
            hidden = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, **arguments).last_hidden_state
            return logits_of(causal, hidden[:, -1])

        with _prepared_weights(self.policy, len(ids)):
            prompts, copies = torch.unique(torch.stack([mask, ids]), dim=1, return_inverse=True)
            positions = (prompts[0].cumsum(1) - 1).clamp(min=0)
            logits = step(prompts[1], prompts[0], positions)[copies]
            cache.batch_select_indices(copies)
            positions = positions[copies, -1:]
            rows = torch.arange(len(ids))  # those that go on
            for place in itertools.count():
                numbers = random_numbers(keys, place, logits.shape[1])
                tokens, logprobs = draw(logits, batch.sampling.temperature, numbers)
                going = batch.add(rows.tolist(), tokens, logprobs)
                if not going.any():
                    break
                if not going.all():
                    rows, keys, tokens, mask, positions = (x[going] for x in (rows, keys, tokens, mask, positions))
                    cache.batch_select_indices(going.nonzero().squeeze(1))
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                positions = positions + 1
                logits = step(tokens[:, None], mask, positions)


def can_decode(policy: nn.Module) -> bool:
    """Whether generate() would call this model's backbone just as `LoopEngine` does."""
    causal = causal_of(policy)
    return (
        getattr(type(causal), "prepare_inputs_for_generation", None) is GenerationMixin.prepare_inputs_for_generation
        and causal._supports_default_dynamic_cache()
        and not getattr(causal, "_is_stateful", False)
        and {"position_ids", "use_cache", cache_name(causal)} <= _accepted(backbone_of(causal))
        and set(getattr(causal.config.get_text_config(), "layer_types", None) or ()) <= _LAYER_TYPES
    )


def cache_name(causal: nn.Module) -> str:
    """transformers 5.24 renamed the argument."""
    return "cache" if "cache" in _accepted(backbone_of(causal)) else "past_key_values"


def _accepted(backbone: nn.Module) -> set[str]:
    return set(inspect.signature(backbone.forward).parameters)


@contextlib.contextmanager
def _prepared_weights(policy: nn.Module, batch: int) -> Iterator[None]:
    """Run plain linear layers on bfloat16 weights laid out for oneDNN, by the operators that torch.compile calls.

    Sets `forward` on those layers and removes it at the end, also after an exception. Layers with a `forward` or hooks
    of their own are left alone. Does nothing outside bfloat16 autocast, without oneDNN, and if any module is compiled.
    The weights take as much memory as the copies that autocast itself would cache.
    """
    layers: list[nn.Linear] = []
    try:
        for group in _groups(policy) if _can_prepare(policy) else ():
            product = _Product(group, batch)
            layers += group
            for index, layer in enumerate(group):
                layer.forward = functools.partial(product, index)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def multiplies_bfloat16() -> bool:
    """Whether oneDNN does so on this machine, on weights that it has laid out."""
    return (
        torch.backends.mkldnn.enabled
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _can_prepare(policy: nn.Module) -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and multiplies_bfloat16()
        # A compiled module has traced the forwards of its children, and other ones would be compiled anew.
        and not any(
            m._compiled_call_impl is not None or hasattr(m.forward, "_torchdynamo_orig_callable")
            for m in policy.modules()
        )
    )


def _groups(policy: nn.Module) -> Iterator[list[nn.Linear]]:
    """Plain linear layers: first groups that receive the same tensor, then the others one by one.

    Each comes once if the caller sets `forward` on a group before it asks for the next.
    """
    for module in policy.modules():
        for names in _SAME_INPUT:
            layers = [module._modules.get(name) for name in names]
            layers = [getattr(layer, "base_layer", layer) for layer in layers]  # inside peft's adapters
            if all(map(_is_plain, layers)) and len({(x.in_features, x.bias is None) for x in layers}) == 1:
                yield layers
    for module in policy.modules():
        if _is_plain(module):
            yield [module]


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a call of the module is `nn.Linear.forward` on a dense weight and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
    )


class _Product:
    """The outputs of linear layers that receive the same tensor: one product at the first call, handed out in turn."""

    def __init__(self, layers: list[nn.Linear], batch: int) -> None:
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.thread = threading.get_ident()
        weight = torch.cat([layer.weight.bfloat16() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.bfloat16() for layer in layers])
        self.x: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, index: int, x: Tensor) -> Tensor:
        # Autocast may be off for this layer. Another thread may train the model, or sample from it too.
        if not torch.is_autocast_enabled("cpu") or threading.get_ident() != self.thread:
            return F.linear(x, self.layers[index].weight, self.layers[index].bias)
        if x is not self.x:
            out = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], "")
            self.x, self.outputs = x, out.split(self.sizes, -1)
        output = self.outputs[index]
        if index == len(self.layers) - 1:
            self.x, self.outputs = None, ()
        return output
