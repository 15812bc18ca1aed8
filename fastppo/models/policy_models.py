"""The models of a run: the policy, its reference and its value function."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastppo.models.activations import offloaded
from fastppo.models.adapters import VALUE, adapted_layers, apply_lora, is_critics, same_adapters, using
from fastppo.models.config import ModelConfig
from fastppo.models.head import LMHead, backbone_and_head, backbone_of, causal_of
from fastppo.models.load import context_length, enable_gradient_checkpointing, load_causal_lm
from fastppo.models.packing import can_pack, completion_hidden, completion_states
from fastppo.models.parked import Parked
from fastppo.models.source import ModelError
from fastppo.models.value import ValueHead, ValueModel

T = TypeVar("T")


class PolicyModels:
    """Policy, reference and critic of a run.

    Args:
        config: the model section of the configuration.
        device: where everything goes.
        num_values: K, how many values the critic gives a state; None for a single one without a dimension of its own;
            0 for no critic, with `value` None.
        load: is called with each function that reads a model's weights, and returns its model; on a process that gets
            its share from another by `place`, parameters may be on the meta device.
        place: is called with each model once it is whole and nothing more is copied from it; may shard it in place.

    Raises:
        ModelError: a model cannot be loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device,
        num_values: int | None = None,
        load: Callable[[Callable[..., nn.Module]], nn.Module] = lambda load: load(),
        place: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        self.config, self.device = config, device
        policy = load(partial(load_causal_lm, config, device=device))
        self.context_length = context_length(policy)
        self.value: ValueHead | ValueModel | None = None
        self._critic_adapter = num_values != 0 and config.value_model == "adapter"
        if num_values != 0 and config.value_model != "separate":
            self.value = ValueHead(backbone_and_head(policy)[1].weight.shape[1], num_values).to(device)
        elif num_values != 0:
            source = policy
            if config.value_name_or_path is not None:
                value_config = dataclasses.replace(config, name_or_path=config.value_name_or_path)
                source = load(partial(load_causal_lm, value_config, device=device))
                reads, writes = (len(m.get_input_embeddings().weight) for m in (source, policy))
                if reads < writes:
                    raise ModelError(
                        f"model.value_name_or_path: it reads {reads} tokens, the policy writes {writes}; they must "
                        "share a tokenizer"
                    )
            self.value = ValueModel.from_causal_lm(source, num_values, take=source is not policy)
        self._parked: dict[str, Parked] = {}
        if self.value is not None:
            place(self.value)
            if config.offload_idle and isinstance(self.value, ValueModel):
                self._parked["value"] = Parked(self.value, device)
        self._reference: nn.Module | None = None
        if config.lora is not None:
            policy = apply_lora(policy, config.lora, critic=self._critic_adapter)
            if self._critic_adapter and config.gradient_checkpointing:
                layers = adapted_layers(policy)
                enable_gradient_checkpointing(causal_of(policy), context_fn=partial(same_adapters, layers))
        elif config.reference == "frozen":
            self._reference = copy.deepcopy(policy).eval().requires_grad_(False)
            if config.autocast:
                _round_products(self._reference, getattr(torch, config.autocast))
            place(self._reference)
            if config.offload_idle:
                self._parked["reference"] = Parked(self._reference, device)
        self.policy = policy
        place(policy)
        self.has_reference = config.reference == "frozen"
        self._kept: _KeptPass | None = None

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.autocast) if self.config.autocast else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def within(self, function: Callable[[], T], *, reference: bool = False) -> T:
        """function(), which may use the policy's head, and with `reference` the reference's.

        Of models that are sharded, layers gather their own parameters, but head and embeddings are only there inside.
        """
        models = (self.policy, self._reference) if reference else (self.policy,)
        for model in models:
            if hasattr(model, "within"):
                function = partial(model.within, function)
        return function()

    def gathered(self) -> contextlib.AbstractContextManager:
        """The policy whole on every rank, for sampling."""
        return self.policy.gathered() if hasattr(self.policy, "gathered") else contextlib.nullcontext()

    def hidden(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        num_completion: int,
        parameters: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LMHead]:
        """The policy's states that predict the completion tokens, and its head; see `completion_hidden`.

        With `parameters`, by the names of `policy_parameters`, these are used in place of the policy's own.
        """
        arguments = (sequences, attention_mask, num_completion)
        if parameters is not None:
            named = {f"policy.{name}": value for name, value in parameters.items()}
            return functional_call(_CompletionHidden(self.policy), named, arguments)
        if torch.is_grad_enabled() and self._kept is not None:
            kept, self._kept = self._kept, None
            states = kept.states(_version(self.policy), *arguments)
            if states is not None:
                return states, kept.head
        with self._offloaded(self.policy):
            return completion_hidden(self.policy, *arguments)

    def hidden_before_update(
        self, sequences: Tensor, attention_mask: Tensor, num_completion: int
    ) -> tuple[Tensor, LMHead]:
        """As `hidden`, detached, and keep the pass with its activations.

        The next `hidden` under the same parameters uses it if all of its sequences, in any order, are in this pass. An
        update that begins with all sequences saves a forward pass.
        """
        with torch.enable_grad():
            states, head = self.hidden(sequences, attention_mask, num_completion)
        row_of = {row: index for index, row in enumerate(_rows(sequences, attention_mask))}
        self._kept = _KeptPass(_version(self.policy), row_of, states, head)
        return states.detach(), head

    def drop_kept_pass(self) -> None:
        """Free the pass that `hidden_before_update` kept, where no update follows after all."""
        self._kept = None

    @cached_property
    def packs(self) -> bool:
        """Whether all models compute packed sequences, so that padding costs nothing."""
        backbones = [backbone_of(self.policy)]
        if isinstance(self.value, ValueModel):
            self.fetch_critic()  # to be tried where it computes
            backbones.append(self.value.backbone)
        with self.autocast():
            return self.within(lambda: all(can_pack(backbone) for backbone in backbones))

    @property
    def critic_apart(self) -> bool:
        """Whether there is a critic that trains nothing of the policy's, so that it can have passes of its own."""
        return self._critic_adapter or isinstance(self.value, ValueModel)

    def values(
        self, hidden: Tensor | None, sequences: Tensor, attention_mask: Tensor, num_completion: int
    ) -> Tensor | None:
        """Values [B, T] or [B, T, K] float32 before each completion token; None without a critic.

        Args:
            hidden: [B, T, D], the policy's states there; None will do for a critic that is `critic_apart`.
            sequences, attention_mask, num_completion: as for `completion_hidden`.
        """
        if self.value is None:
            return None
        if isinstance(self.value, ValueHead):
            if self._critic_adapter:
                with using(adapted_layers(self.policy), VALUE), self._offloaded(self.policy):
                    arguments = (sequences, attention_mask, num_completion, self.value.weight.shape[-1])
                    hidden = completion_states(backbone_of(self.policy), *arguments)
            return self.value(hidden)
        self.fetch_critic()
        with self._offloaded(self.value):
            arguments = (sequences, attention_mask, num_completion, self.value.head.weight.shape[-1])
            return self.value.head(completion_states(self.value.backbone, *arguments))

    def _offloaded(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Where a pass of the model runs, so that its activations are offloaded if the configuration says so."""
        needed = self.config.activation_offloading and torch.is_grad_enabled()
        return offloaded(model) if needed else contextlib.nullcontext()

    def fetch_critic(self) -> None:
        """Move a critic that is parked in the host's memory to the device, as its passes do by themselves."""
        if "value" in self._parked:
            self._parked["value"].fetch()

    def park(self) -> None:
        """Say that reference and critic are idle from here on; `offload_idle` moves them to the host's memory."""
        for parked in self._parked.values():
            parked.park()

    @torch.no_grad()
    def reference_hidden(self, sequences: Tensor, attention_mask: Tensor, num_completion: int) -> tuple[Tensor, LMHead]:
        """As `hidden`, of the reference: a frozen copy, or the policy with its adapters off."""
        if "reference" in self._parked:
            self._parked["reference"].fetch()
        with self._as_reference() as model:
            return completion_hidden(model, sequences, attention_mask, num_completion)

    def reference_head(self) -> LMHead:
        """The reference's head alone, on the device."""
        with self._as_reference() as model:
            head = backbone_and_head(model)[1]
        weight, bias = (None if tensor is None else tensor.to(self.device) for tensor in (head.weight, head.bias))
        return head._replace(weight=weight, bias=bias)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        if self._reference is not None:
            yield self._reference
        else:
            with using(adapted_layers(self.policy), None):
                yield self.policy

    @contextlib.contextmanager
    def training(self, mode: bool = True) -> Iterator[None]:
        """Set train mode (or eval mode) with gradient checkpointing, which needs it; drop the kept pass at the end.

        Dropout is off in either mode.
        """
        checkpointed = (self.policy, self.value) if self.config.gradient_checkpointing else ()
        models, before = nn.ModuleList(m for m in checkpointed if m is not None), self.policy.training
        models.train(mode)
        try:
            yield
        finally:
            self._kept = None  # `_version` misses the steps of fused optimizers
            models.train(before)

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's trained parameters by name: all, or its adapters."""
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        return {name: p for name, p in trained.items() if not (self._critic_adapter and is_critics(name))}

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's parameters by name: its own model's, or its head's and its adapters'."""
        parameters = {} if self.value is None else dict(self.value.named_parameters())
        if self._critic_adapter:
            parameters |= {name: p for name, p in self.policy.named_parameters() if is_critics(name)}
        return parameters

    def reference_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of a reference that is a copy, by name; with adapters there are none."""
        return {} if self._reference is None else dict(self._reference.named_parameters())

    @torch.no_grad()
    def refresh_reference(self) -> None:
        """Copy the policy's parameters into a reference that is a copy."""
        self.park()  # which would let go of changes that are made on the device
        policy = dict(self.policy.named_parameters())
        for name, parameter in self.reference_parameters().items():
            parameter.copy_(policy[name])


class _KeptPass(NamedTuple):
    """A forward pass whose backward pass has not run yet."""

    version: int  # `_version` of the policy at the time of the pass
    row_of: dict[tuple[int, ...], int]  # by the tokens and the attention mask of a sequence
    hidden: Tensor  # [B, T, D], with its graph
    head: LMHead  # with its graph: if the head has adapters, they are added to its weight once

    def states(self, version: int, sequences: Tensor, attention_mask: Tensor, num_completion: int) -> Tensor | None:
        """States [B, T, D] of sequences of this pass, in any order; None for others or if the parameters changed."""
        # Equal sequences have equal states, so one row may stand for several of them.
        order = [self.row_of.get(row) for row in _rows(sequences, attention_mask)]
        if None in order or (version, len(order), num_completion) != (self.version, *self.hidden.shape[:2]):
            return None
        return self.hidden[torch.tensor(order, device=self.hidden.device)]


def _version(model: nn.Module) -> int:
    """A number that grows with every in-place change of a parameter, except by fused optimizers."""
    return sum(parameter._version for parameter in model.parameters())


def _rows(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.cat(tensors, 1).tolist()]


class _CompletionHidden(nn.Module):
    """`completion_hidden` as a module, as functional_call needs it."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *arguments) -> tuple[Tensor, LMHead]:
        return completion_hidden(self.policy, *arguments)


def _round_products(reference: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a frozen backbone's linear layers once, as autocast would at every product."""
    backbone, head = backbone_and_head(reference)
    for module in backbone.modules():
        if type(module) is nn.Linear and module.weight is not head.weight:
            module.to(dtype)
