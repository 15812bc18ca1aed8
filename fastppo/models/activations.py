"""Keep the activations of a forward pass in the host's memory until the backward pass needs them.

With gradient checkpointing they are the checkpoints, one state a layer. `torch.autograd.graph.save_on_cpu` would move
all that autograd saves; this leaves weights where they are.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_MIN_BYTES = 4096  # a copy of less takes longer than it is worth


def offloaded(model: nn.Module) -> contextlib.AbstractContextManager:
    """Move what a pass of this model saves for its backward pass off the GPU as it is saved; on a CPU, nothing."""
    # Autocast saves copies of weights, and peft and transformers make others.
    shapes = {parameter.shape for parameter in model.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        expanded = tensor.untyped_storage().nbytes() < tensor.nbytes  # its copy would be larger than it is
        if tensor.nbytes < _MIN_BYTES or expanded or _is_weight(tensor, shapes):
            return tensor
        return tensor.device, _to_host(tensor)

    def unpack(packed: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


def _is_weight(tensor: Tensor, shapes: set[torch.Size]) -> bool:
    """Whether it is a parameter, a view of one, or made from a single parameter or from none, with a weight's shape."""
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, nn.Parameter):
        return True
    origins = [] if whole.grad_fn is None else [type(node).__name__ for node, _ in whole.grad_fn.next_functions]
    return whole.shape in shapes and origins in ([], ["AccumulateGrad"])


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, with the same strides; the tensor itself if it is there."""
    if not tensor.is_cuda:
        return tensor.to("cpu")
    # Neither copy is waited for: both are in the order of the stream, and so is the reuse of the memory.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
