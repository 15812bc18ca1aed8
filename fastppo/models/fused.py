"""Swap a model's layers for CPU kernels that compute the same, during one pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.engines import cpu, extension
from fastppo.models import layers

# What attention and the gated MLP of most architectures call, in this order, on one tensor.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Product = Callable[[Tensor], "tuple[Tensor, ...]"]


@contextlib.contextmanager
def fused_layers(model: nn.Module, product: Callable[[list[nn.Linear]], Product] | None = None) -> Iterator[None]:
    """Run a model by the layers of `fastppo.models.layers`: forward in here and, later, backward.

    Nothing happens but on a CPU under bfloat16 autocast, without gradient checkpointing (which runs the layers again,
    outside of this), derivatives of forward mode and compilation.

    Args:
        model: what is called in here.
        product: makes one product of linear layers that are given the same tensor; by default `layers.dense`, where the
            processor has bfloat16 instructions.
    """
    if product is None and "bfloat16" in cpu.PRODUCTS:
        product = _dense
    forwards = _forwards(model, product) if _usable(model) else {}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def _usable(model: nn.Module) -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and layers.only_reverse_mode()
        and not any(map(_runs_elsewhere, model.modules()))
    )


def _runs_elsewhere(module: nn.Module) -> bool:
    """Whether a module is run again in the backward pass, or by a program compiled from it."""
    checkpointed = getattr(module, "gradient_checkpointing", False) and module.training
    wrapped = "_checkpoint_wrapped_module" in module._modules or "_orig_mod" in module._modules
    return checkpointed or wrapped or module._compiled_call_impl is not None


def _forwards(model: nn.Module, product: Callable[[list[nn.Linear]], Product] | None) -> dict[nn.Module, Callable]:
    """The forward that each module gets."""
    forwards: dict[nn.Module, Callable] = {}
    for module in model.modules():
        if extension.load() is None or "forward" in module.__dict__:  # somebody has put another in its place
            continue
        if _is_rms_norm(module):
            forwards[module] = functools.partial(_rms_norm, module, _eps(module))
        elif _is_gated_mlp(module):
            forwards[module] = functools.partial(_gated_mlp, module)
    for group in _groups(model) if product else []:
        shared = _Shared(product(group), len(group))
        forwards |= {layer: functools.partial(shared, index) for index, layer in enumerate(group)}
    return forwards


class _Shared:
    """The outputs of a product, handed out one after the other."""

    def __init__(self, product: Product, count: int) -> None:
        self.product, self.count = product, count
        self.last: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())  # what it was given, and its outputs

    def __call__(self, index: int, x: Tensor) -> Tensor:
        given, outputs = self.last
        if x is not given:
            outputs = self.product(x)
        self.last = (None, ()) if index == self.count - 1 else (x, outputs)
        return outputs[index]


def _dense(group: list[nn.Linear]) -> Product:
    def product(x: Tensor) -> tuple[Tensor, ...]:
        weights, biases = [layer.weight for layer in group], [layer.bias for layer in group]
        if torch.is_autocast_enabled("cpu") and layers.fits_dense(x, weights):
            return layers.dense(x, weights, biases)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    return product


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    """Every plain linear layer once, those that go together in one list."""
    groups, seen = [], set()
    for module in model.modules():
        for names in _TOGETHER:
            group = [module._modules.get(name) for name in names]
            if (
                all(map(_is_plain, group))
                and len({(layer.weight.shape[1], layer.bias is None) for layer in group}) == 1
            ):
                groups.append(group)
                seen.update(group)
    return groups + [[module] for module in model.modules() if _is_plain(module) and module not in seen]


def _is_plain(module: nn.Module | None) -> bool:
    """A linear layer whose forward is its class's, with nothing to do before it, such as making the weight."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not module._forward_pre_hooks


def _rms_norm(module: nn.Module, eps: float, x: Tensor) -> Tensor:
    if layers.fits_rms_norm(x, module.weight):
        return layers.rms_norm(x, module.weight, eps)
    return type(module).forward(module, x)


def _is_rms_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or _eps(module) is None:
        return False
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return (
        tensors == [module._parameters.get("weight")]
        and not module._modules
        and tensors[0].dim() == 1
        and _computes(module, tensors[0], _plain_rms_norm)
    )


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _plain_rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, _eps(module))


def _gated_mlp(module: nn.Module, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(layers.gated(gate, up) if layers.fits_gated(gate, up) else F.silu(gate) * up)


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = {name: module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")}
    others = [part for name, part in module._modules.items() if name not in parts]
    return (
        all(map(_is_plain, parts.values()))
        and not module._parameters
        and not module._buffers
        # An activation, of which nobody watches what it does.
        and all(not [*part.parameters(), *part.buffers(), *part._forward_hooks] for part in others)
        and _computes(module, parts["gate_proj"].weight, _plain_gated_mlp)
    )


def _plain_gated_mlp(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))


_tried: dict[tuple, bool] = {}


def _computes(module: nn.Module, weight: Tensor, formula: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Whether a module of one tensor computes a formula: tried out once for a class with its settings.

    Args:
        weight: the module's first, whose last dimension is its input's.
    """
    settings = tuple((name, x) for name, x in sorted(vars(module).items()) if isinstance(x, int | float | str))
    activation = getattr(module, "act_fn", None)
    key = (type(module), settings, type(activation), getattr(activation, "__name__", None), weight.dtype, weight.device)
    if key not in _tried:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                _tried[key] = _agree(module, weight, formula)
            except Exception:  # whatever another module has to say to rows that are not its own
                _tried[key] = False
    return _tried[key]


def _agree(module: nn.Module, weight: Tensor, formula: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    # From values that leave an activation linear to ones that any clamp would cut.
    scales = torch.tensor([1e-3, 1.0, 30.0, 1e4]).view(4, 1)
    x = (scales * torch.linspace(-3.0, 2.0, weight.shape[-1])).to(weight.device, weight.dtype)
    given, expected = type(module).forward(module, x), formula(module, x)
    size = expected.abs().amax(-1)
    error = (given - expected).abs().amax(-1)
    return bool((size > 0).all() and (error <= 16 * torch.finfo(weight.dtype).eps * size).all())
