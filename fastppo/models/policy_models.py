"""The models of a run held together: the policy, its reference, and the value function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastppo import models
from fastppo.config_fields import ConfigError
from fastppo.models import LMHead, ValueHead, ValueModel, backbone_and_head, token_hidden
from fastppo.models.config import ModelConfig
from fastppo.models.packing import Packed, can_pack, pack, packed_hidden


class PolicyModels:
    """Policy, reference and critic of a run.

    Args:
        config: the model section of the configuration.
        device: where everything goes.
        num_values: how many values the critic gives a state: K, or None for one that needs no dimension of its own;
            0 makes no critic, and `value` is None.

    Raises:
        ModelError: a model cannot be had.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device, num_values: int | None = None) -> None:
        self.config, self.device = config, device
        policy = models.load_causal_lm(config, device=device)
        self.context_length = models.context_length(policy)
        self.value: ValueHead | ValueModel | None = None
        if num_values == 0:
            pass
        elif config.value_model == "separate":
            self.value = _separate_value_model(config, policy, device, num_values)
        else:
            _, head = backbone_and_head(policy)
            self.value = ValueHead(head.weight.shape[1], num_values).to(device)
        self._reference: nn.Module | None = None
        if config.lora is not None:
            policy = models.apply_lora(policy, config.lora)
        elif config.reference == "frozen":
            self._reference = models.freeze_copy(policy)
            if config.autocast:
                _round_products(self._reference, getattr(torch, config.autocast))
        self.policy = policy
        self._kept: _KeptPass | None = None

    @property
    def has_reference(self) -> bool:
        return self.config.reference == "frozen"

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.autocast) if self.config.autocast else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def hidden(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        num_completion: int,
        parameters: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LMHead]:
        """The policy's states [B, T, D] that predict the last T = `num_completion` tokens, and its head.

        With `parameters`, by the names of `policy_parameters`, these stand in for the policy's own.
        """
        if parameters is None and torch.is_grad_enabled() and self._kept is not None:
            kept, self._kept = self._kept, None
            states = kept.states(self._versions(), sequences, attention_mask)
            if states is not None:
                return states, backbone_and_head(self.policy)[1]
        layout = _layout(self.policy, sequences, attention_mask, num_completion)
        arguments = (sequences, attention_mask, num_completion, layout)
        if parameters is None:
            return _states_and_head(self.policy, *arguments)
        named = {f"policy.{name}": value for name, value in parameters.items()}
        return functional_call(_StatesAndHead(self.policy), named, arguments)

    def hidden_before_update(
        self, sequences: Tensor, attention_mask: Tensor, num_completion: int
    ) -> tuple[Tensor, LMHead]:
        """As `hidden`, detached; but the pass is kept, with its activations, for the first `hidden` of these sequences
        (in any order) under these parameters: a forward pass less in every step whose update begins with all of them.
        """
        with torch.enable_grad():
            states, head = self.hidden(sequences, attention_mask, num_completion)
        self._kept = _KeptPass(self._versions(), sequences, attention_mask, states)
        return states.detach(), head

    def _versions(self) -> int:
        """Grows whenever a parameter of the policy is copied into. A fused optimizer's step leaves no trace here: what
        makes steps does so within `training`, which lets go of the kept pass at its end."""
        return sum(parameter._version for parameter in self.policy.parameters())

    def values(self, hidden: Tensor, sequences: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Values [B, T] or [B, T, K] float32 before each completion token; `hidden` is the policy's there."""
        if self.value is None:
            return None
        if isinstance(self.value, ValueHead):
            return self.value(hidden)
        return self.value(sequences, attention_mask)[:, -hidden.shape[1] - 1 : -1]

    @torch.no_grad()
    def reference_hidden(self, sequences: Tensor, attention_mask: Tensor, num_completion: int) -> tuple[Tensor, LMHead]:
        """As `hidden`, of the reference: a frozen copy, or the policy with its adapters off."""
        with self._as_reference() as model:
            layout = _layout(model, sequences, attention_mask, num_completion)
            return _states_and_head(model, sequences, attention_mask, num_completion, layout)

    def reference_head(self) -> LMHead:
        """The reference's head alone."""
        with self._as_reference() as model:
            return backbone_and_head(model)[1]

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        if self._reference is not None:
            yield self._reference
        else:
            with self.policy.disable_adapter():
                yield self.policy

    @contextlib.contextmanager
    def training(self, mode: bool = True) -> Iterator[None]:
        """Train mode (or eval mode) where gradient checkpointing asks for it; dropout is off in either."""
        checkpointed = (
            [m for m in (self.policy, self.value) if m is not None] if self.config.gradient_checkpointing else []
        )
        before = [module.training for module in checkpointed]
        for module in checkpointed:
            module.train(mode)
        try:
            yield
        finally:
            self._kept = None
            for module, was in zip(checkpointed, before, strict=True):
                module.train(was)

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained of the policy, by name: all of it, or its adapters."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def value_parameters(self) -> dict[str, nn.Parameter]:
        return {} if self.value is None else dict(self.value.named_parameters())

    def reference_parameters(self) -> dict[str, nn.Parameter]:
        """Those of a reference that is a copy; with adapters there is none."""
        return {} if self._reference is None else dict(self._reference.named_parameters())

    @torch.no_grad()
    def refresh_reference(self) -> None:
        """The policy as it is now becomes the reference, which must be a copy."""
        policy = dict(self.policy.named_parameters())
        for name, parameter in self.reference_parameters().items():
            parameter.copy_(policy[name])


class _KeptPass(NamedTuple):
    """A forward pass that a backward pass may still go through."""

    versions: int
    sequences: Tensor
    attention_mask: Tensor
    hidden: Tensor
    """[B, T, D] with its graph."""

    def states(self, versions: int, sequences: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The states of these sequences, where they are the ones of this pass in some order."""
        if versions != self.versions or sequences.shape != self.sequences.shape:
            return None
        row_of = {row: index for index, row in enumerate(self._rows(self.sequences, self.attention_mask))}
        order = [row_of.get(row) for row in self._rows(sequences, attention_mask)]
        # Equal sequences have equal states, so one row may stand for several of them.
        return None if None in order else self.hidden[torch.tensor(order, device=self.hidden.device)]

    @staticmethod
    def _rows(*tensors: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row) for row in torch.cat(tensors, 1).tolist()]


class _StatesAndHead(nn.Module):
    """A policy whose call gives what training needs of it, for `functional_call`: it may replace parameters there."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *arguments) -> tuple[Tensor, LMHead]:
        return _states_and_head(self.policy, *arguments)


def _round_products(reference: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of a frozen backbone's linear layers as autocast would round them at every product."""
    backbone, head = backbone_and_head(reference)
    can_pack(backbone)  # tried out without autocast, so while the types still agree
    for module in backbone.modules():
        if type(module) is nn.Linear and module.weight is not head.weight:
            module.to(dtype)


def _layout(model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_completion: int) -> Packed | None:
    """How to compute these sequences' states with less, where the model allows it and it is less."""
    backbone, head = backbone_and_head(model)
    if not can_pack(backbone):
        return None
    return pack(sequences, attention_mask, num_completion, head.weight.shape[1])


def _states_and_head(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_completion: int, layout: Packed | None
) -> tuple[Tensor, LMHead]:
    backbone, head = backbone_and_head(model)
    if layout is not None:
        return packed_hidden(backbone, layout), head
    return token_hidden(backbone, sequences, attention_mask)[:, -num_completion - 1 : -1], head


def _separate_value_model(
    config: ModelConfig, policy: nn.Module, device: torch.device, num_values: int | None
) -> ValueModel:
    if config.value_name_or_path is None:
        return ValueModel.from_causal_lm(policy, num_values)
    source = ModelConfig(**(vars(config) | {"name_or_path": config.value_name_or_path, "lora": None}))
    return ValueModel.from_causal_lm(models.load_causal_lm(source, device=device), num_values)


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device
