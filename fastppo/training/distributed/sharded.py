"""Models whose parameters, gradients and optimizer states are divided among the ranks, by torch's FSDP2."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fastppo.algorithms.ranks import T
from fastppo.errors import ConfigError
from fastppo.models import ValueHead, ValueModel
from fastppo.models.head import causal_of
from fastppo.training.distributed.processes import Processes


class ShardedProcesses(Processes):
    """All processes of the default group, with every model sharded over them.

    Args:
        device: this rank's.
        autocast: the precision of the models' products, in which parameters are gathered; None for their own.
        cpu_offload: keep the shards and the optimizer's states in the host's memory.
    """

    def __init__(self, device: torch.device, *, autocast: torch.dtype | None, cpu_offload: bool) -> None:
        super().__init__(device)
        self._mesh = init_device_mesh(device.type, (self.size,))
        self._options = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(autocast, torch.float32, cast_forward_inputs=False),
            "reshard_after_forward": True,  # of the root, too: else a later pass would not see what an optimizer did
        }
        if cpu_offload:
            self._options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
        self._skeletons: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def place(self, model: nn.Module) -> None:
        self._check_same(model)
        self._skeletons[model] = copy.deepcopy(model, {id(p): _meta(p) for p in model.parameters()})
        head = model.head if isinstance(model, ValueModel) else model if isinstance(model, ValueHead) else None
        if model is not head:
            self._shard(model if head is None else model.backbone)
        for name, parameter in () if head is None else list(head.named_parameters()):
            # Too small to be sharded; as a DTensor the optimizer can step it together with those that are.
            replica = distribute_tensor(parameter.detach(), self._mesh, [Replicate()])
            setattr(head, name, nn.Parameter(replica))

    def _shard(self, model: nn.Module) -> None:
        kinds = set(getattr(causal_of(model), "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        if not layers:
            raise ConfigError(
                f"distributed.strategy: {type(model).__name__} has no decoder layers that could be sharded; replicate "
                "keeps a copy of the model on every rank"
            )
        for module in (*layers, model):
            fully_shard(module, **self._options)
            module.set_gradient_divide_factor(1.0)  # a sum: losses have the weights of the whole mini-batch
            module.set_force_sum_reduction_for_comms(True)
        model.within = types.MethodType(_within, model)
        register_fsdp_forward_method(model, "within")
        model.gathered = types.MethodType(_gathered, model)
        with torch.no_grad():
            model.within(lambda: None)  # FSDP2 takes the first module that runs for the root

    def whole(self, model: nn.Module | None) -> nn.Module | None:
        if model is None:
            return None
        state = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                state[name] = full.cpu()
        if self.rank != 0:
            return None
        plain = copy.deepcopy(self._skeletons[model])
        plain.load_state_dict(state, assign=True)
        if hasattr(plain, "tie_weights"):
            plain.tie_weights()
        return plain


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _within(model: FSDPModule, function: Callable[[], T]) -> T:
    """function(), with the parameters gathered that belong to no layer; see `PolicyModels.within`."""
    return function()


@contextlib.contextmanager
def _gathered(model: FSDPModule) -> Iterator[None]:
    """All parameters stay gathered, so that ranks may run different numbers of passes without gradients."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()
