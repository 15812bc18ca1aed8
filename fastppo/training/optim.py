"""Optimizers and learning-rate schedules by name, and optimizer states for checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastppo.errors import quote
from fastppo.models.quantize import import_bitsandbytes
from fastppo.training.checkpoint import CheckpointError, check_like
from fastppo.training.config import OptimConfig


def build_optimizer(
    config: OptimConfig, policy_parameters: Iterable[nn.Parameter], value_parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW with two parameter groups, policy and critic, each with its own learning rate.

    `adamw_8bit` keeps its moments in 8 bits (bitsandbytes; Dettmers et al., 2022, arXiv:2110.02861), and
    `paged_adamw_8bit` keeps them in memory that CUDA moves between host and GPU as needed; on a CPU the two are one.
    """
    groups = [
        {"params": list(policy_parameters), "lr": config.learning_rate},
        {"params": list(value_parameters), "lr": config.value_learning_rate or config.learning_rate},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    arguments = {"betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    bitsandbytes = import_bitsandbytes(f"optim.name: {config.name}")
    on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
    paged = config.name == "paged_adamw_8bit" and on_gpu  # bitsandbytes warns of it on a CPU
    return bitsandbytes.optim.AdamW8bit(groups, is_paged=paged, **arguments)


def build_scheduler(config: OptimConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """One of transformers' schedules, stepped once per training step.

    A warm-up starts at rate 0 and a decay ends there. To waste no training step, step 1 uses the schedule's second
    rate, and the schedule is one step longer than the run, or than the warm-up: `polynomial` divides by what follows.
    """
    from transformers import get_scheduler

    warmup, steps = config.warmup_steps, max(total_steps, config.warmup_steps) + 1
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()
    return scheduler


def scale_learning_rate(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, factor: float) -> None:
    """Multiply every group's learning rate by `factor`, now and for the rest of its schedule; kept in checkpoints."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's `state_dict`, which may nest and hold tensors, numbers, strings and None.

    Returns:
        tensors: dotted name (`state.0.exp_avg`) -> the optimizer's own tensor, not a copy.
        meta: everything else as JSON values: other states, hyperparameters, the parameters' shapes.

    Raises:
        TypeError: a state of another type; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    packed = {key: _pack(value, key, tensors) for key, value in optimizer.state_dict().items()}
    return tensors, {"state_dict": packed, "shapes": _shapes(optimizer)}


def parameter_of_state(optimizer: torch.optim.Optimizer, name: str) -> Tensor | None:
    """The parameter that a state belongs to, by its name in `optimizer_tensors`; None for a name that is no state's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = name.split(".")[1] if name.startswith("state.") else ""
    return parameters[int(number)] if number.isdecimal() and int(number) < len(parameters) else None


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Restore what `optimizer_tensors` returned, hyperparameters included, to the bit and on the optimizer's devices.

    torch's `load_state_dict` casts every tensor to its parameter's dtype, which rounds the float32 moments of a
    bfloat16 parameter. Here each state keeps the dtype it was saved with. No memory is shared with `tensors`.

    Raises:
        CheckpointError: the parameters' shapes differ, or the optimizer does not take a state.
        Exception: whatever else nonsense makes it raise.
    """
    for group, (was, now) in enumerate(zip_longest(meta["shapes"], _shapes(optimizer), fillvalue=[])):
        for index, (old, new) in enumerate(zip_longest(was, now)):
            if old != new:
                parameter = f"group {group}, parameter {index} has shape {new}, was saved with shape {quote(old)}"
                raise CheckpointError(f"the optimizer's parameters are not the checkpoint's: {parameter}")
    state_dict = {key: _unpack(value, tensors) for key, value in meta["state_dict"].items()}
    own = optimizer.state_dict()["param_groups"]
    check_like(state_dict["param_groups"], own, "param_groups")
    # torch's own versions differ in their flags.
    state_dict["param_groups"] = [{**mine, **its} for mine, its in zip(own, state_dict["param_groups"], strict=True)]
    paged = getattr(optimizer, "is_paged", False)
    before = dict(optimizer.state)
    # The optimizer chooses the devices and may nest states its own way. Paged ones may not fit on the GPU at once.
    optimizer.load_state_dict(state_dict, **({"move_to_device": False} if paged else {}))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):  # torch numbers them in this order
        if number in state_dict["state"]:
            state = _as_saved(optimizer.state[parameter], state_dict["state"][number])
            _check_state(optimizer, f"state.{number}", state, parameter)
            if paged:
                state = _paged(optimizer, parameter, state, before.get(parameter, {}))
            optimizer.state[parameter] = state
    taken, _ = optimizer_tensors(optimizer)
    lost = [name for name in tensors if name not in taken or taken[name].dtype != tensors[name].dtype]
    if lost:
        raise CheckpointError(f"the optimizer ({type(optimizer).__name__}) did not take the states {', '.join(lost)}")


def _paged(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    """A state of a paged bitsandbytes optimizer where it belongs: moments in paged memory, the rest on the GPU.

    Args:
        before: the parameter's state until now, whose memory is used again: bitsandbytes never frees what is paged.
    """
    placed = {}
    for name, value in state.items():
        if name in ("state1", "state2"):
            there = before.get(name)
            if there is None or there.dtype != value.dtype:
                there = optimizer.get_state_buffer(parameter, dtype=value.dtype)
            value = there.copy_(value)
        placed[name] = value.to(parameter.device) if name.startswith(("qmap", "absmax")) else value
    return placed


def _check_state(optimizer: torch.optim.Optimizer, name: str, state: dict[str, Any], parameter: Tensor) -> None:
    """Check the states of the optimizers above, whose kernels read them without a look at their sizes."""
    like, blocks = list(parameter.shape), [-(-parameter.numel() // 256)]
    kinds: dict[str, tuple[Any, Any]] = {}  # name: shape, dtypes
    if type(optimizer) is torch.optim.AdamW:
        kinds = dict.fromkeys(("exp_avg", "exp_avg_sq"), (like, (parameter.dtype, torch.float32)))
        kinds["step"] = ([], (torch.float32,))
    elif type(optimizer).__name__ == "AdamW8bit":
        whole = getattr(state.get("state1"), "dtype", None) != torch.uint8  # as those of small tensors are kept
        kinds = dict.fromkeys(("state1", "state2"), (like, (torch.float32 if whole else torch.uint8,)))
        if not whole:
            kinds |= dict.fromkeys(("qmap1", "qmap2"), ([256], (torch.float32,)))
            kinds |= dict.fromkeys(("absmax1", "absmax2"), (blocks, (torch.float32,)))
        if not isinstance(state.get("step"), int):
            raise CheckpointError(f"{name}.step: expected int, got {quote(state.get('step'))}")
    for key, (shape, dtypes) in kinds.items():
        value = state.get(key)
        if not isinstance(value, Tensor) or list(value.shape) != shape or value.dtype not in dtypes:
            given = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else quote(value)
            raise CheckpointError(f"{name}.{key}: expected {dtypes[0]} {shape}, got {given}")


def _as_saved(loaded: Any, saved: Any) -> Any:
    """Copy `saved` to the devices of `loaded`; dict keys that only `loaded` has keep its values."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device, copy=True)
    if isinstance(saved, dict):
        return {key: _as_saved(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_as_saved(*pair) for pair in zip(loaded, saved, strict=True))
    return saved


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; tensors are moved to `tensors` and become {"$tensor": name}, tuples and other dicts a tag."""
    if isinstance(value, Tensor):
        while name in tensors:  # a key may itself hold a dot
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict) and all(isinstance(key, int | str) for key in value):
        items = [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$dict": items}
    raise TypeError(f"optimizer: {name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"$dict": items}:
            return {key: _unpack(item, tensors) for key, item in items}
        case dict():
            return {key: _unpack(item, tensors) for key, item in value.items()}
        case list():
            return [_unpack(item, tensors) for item in value]
    return value


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
