"""Models whose parameters, gradients and optimizer states are divided among the ranks, by torch's FSDP2."""

from __future__ import annotations

import contextlib
import copy
import pickle
import types
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fastppo.algorithms.ranks import T
from fastppo.errors import ConfigError, one_line
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
            "mp_policy": fsdp.MixedPrecisionPolicy(autocast, torch.float32, cast_forward_inputs=False),
            "reshard_after_forward": True,  # of the root, too: else a later pass would not see what an optimizer did
        }
        if cpu_offload:
            self._options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type != "cpu")
        self._skeletons: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def load(self, load: Callable[..., nn.Module]) -> nn.Module:
        with self.agreed():
            model = load(on="cpu") if self.rank == 0 else None
        try:
            skeleton = self.first(lambda: pickle.dumps(_skeleton(model)))
            with self.agreed():
                return pickle.loads(skeleton) if model is None else model
        except (AttributeError, ImportError, TypeError, pickle.PickleError) as error:
            why = f"its model cannot be sent to other processes ({one_line(error, 200)})"
            raise ConfigError(f"distributed.strategy: {why}; replicate reads it in each of them") from error

    def place(self, model: nn.Module) -> None:
        self._skeletons[model] = _skeleton(model)
        head = model.head if isinstance(model, ValueModel) else model if isinstance(model, ValueHead) else None
        if model is not head:
            self._shard(model if head is None else model.backbone)
        if head is not None:
            self._receive(head)
            for name, parameter in list(head.named_parameters()):
                # Too small to be sharded; as a DTensor the optimizer can step it together with those that are.
                setattr(head, name, nn.Parameter(distribute_tensor(parameter.detach(), self._mesh, [Replicate()])))

    def _receive(self, module: nn.Module) -> None:
        """Put rank 0's parameters on this device, in place of those of the module that are not sharded yet."""
        received: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
        for owner in module.modules():
            for name, old in list(owner.named_parameters(recurse=False)):
                if old not in received and not isinstance(old, DTensor):
                    new = old.detach() if self.rank == 0 else torch.empty_like(old, device=self.device)
                    dist.broadcast(new := new.to(self.device).contiguous(), 0)
                    received[old] = nn.Parameter(new, old.requires_grad)
                setattr(owner, name, received.get(old, old))

    def _shard(self, model: nn.Module) -> None:
        kinds = set(getattr(causal_of(model), "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        if not layers:
            raise ConfigError(
                f"distributed.strategy: {type(model).__name__} has no decoder layers that could be sharded; replicate "
                "keeps a copy of the model on every rank"
            )
        for module in (*layers, model):
            self._receive(module)  # so that one layer at a time is whole on the device
            fsdp.fully_shard(module, **self._options)
            module.set_gradient_divide_factor(1.0)  # a sum: losses have the weights of the whole mini-batch
            module.set_force_sum_reduction_for_comms(True)
        model.within = types.MethodType(_within, model)
        fsdp.register_fsdp_forward_method(model, "within")
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


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have no values."""
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def _within(model: fsdp.FSDPModule, function: Callable[[], T]) -> T:
    """function(), with the parameters gathered that belong to no layer; see `PolicyModels.within`."""
    return function()


@contextlib.contextmanager
def _gathered(model: fsdp.FSDPModule) -> Iterator[None]:
    """All parameters stay gathered, so that ranks may run different numbers of passes without gradients."""
    parts = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for part in parts:
        part.unshard()
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()
