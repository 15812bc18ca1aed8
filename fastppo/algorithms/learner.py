"""How parameters move: mini-batches, gradient accumulation, optimizer steps, checks for NaN and Inf.

    experience ── shuffled, split ──> mini-batches ── split ──> micro-batches ── loss, backward ──> gradients ── step

An algorithm reaches the models only through a `Learner`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fastppo.algorithms.experience import Experience, count_tokens
from fastppo.algorithms.ranks import Pass, Passes, Ranks, T
from fastppo.errors import FastPPOError
from fastppo.models.head import LMHead

if TYPE_CHECKING:  # importing it loads transformers, which `fastppo keys` does not need
    from fastppo.models.policy_models import PolicyModels


class NonFiniteError(FastPPOError, RuntimeError):
    """A NaN or Inf stopped the run, as `on_nonfinite: stop` asks; the message says which and where.

    Whatever finds one raises a FloatingPointError, and whoever can go on without it catches that and calls
    `Learner.skip_nonfinite`, which decides.
    """


class StepOutput(NamedTuple):
    """loss: scalar, differentiable. metrics: detached 0-dim tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


Loss = Callable[[Experience, "Tensor | None", "LMHead | None", "Tensor | None", "LMHead | None"], StepOutput]
"""loss(batch, hidden [b, T, D], head, values [b, T] or None, ref_head or None); see `Algorithm.loss`."""
Evaluate = Callable[[Experience], StepOutput]


class Learner:
    """The models of a run, their optimizer, and the ways to move them.

    Args:
        models: policy and critic.
        optimizer: over the parameters of both.
        part_weight: (micro-batch, mini-batch) -> weight of the one's loss in the other's; see `Algorithm.part_weight`.
        num_mini_batches: optimizer steps in an epoch.
        micro_batch_size: sequences in one forward and backward pass, of all ranks together.
        max_tokens: instead of that, most tokens in one pass of each rank; see `micro_batches`.
        max_grad_norm: clip the gradient's global norm to this; None does not clip.
        on_nonfinite: raise at a NaN or Inf, or skip what it is in.
        ranks: divide every batch among them.
        phase: called with a short text when a new phase of the update begins.
        warn: called with a message when something is skipped.
    """

    def __init__(
        self,
        models: PolicyModels,
        optimizer: torch.optim.Optimizer,
        part_weight: Callable[[Experience, Experience], float],
        *,
        num_mini_batches: int,
        micro_batch_size: int,
        max_tokens: int | None = None,
        max_grad_norm: float | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        ranks: Ranks | None = None,
        phase: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.models, self.optimizer, self.ranks = models, optimizer, ranks or Ranks()
        self.num_mini_batches, self.micro_batch_size, self.max_tokens = num_mini_batches, micro_batch_size, max_tokens
        self.max_grad_norm, self.on_nonfinite = max_grad_norm, on_nonfinite
        self.where = ""
        """Where the run stands, such as `step 3`; messages begin with it."""
        self.changed = False
        """Whether parameters have changed since this was last set to False."""
        self._part_weight, self._phase, self._warn = part_weight, phase, warn

    def parameters(self) -> dict[str, Tensor]:
        """All trained parameters; the critic's names begin with `value.`."""
        values = {f"value.{name}": parameter for name, parameter in self.models.value_parameters().items()}
        return values | self.policy_parameters()

    def policy_parameters(self) -> dict[str, Tensor]:
        """The policy's trained parameters by name: all, or its adapters."""
        return self.models.policy_parameters()

    @torch.no_grad()
    def load_policy(self, parameters: dict[str, Tensor]) -> None:
        """Copy values into the policy's parameters of these names."""
        self.changed = True
        own = self.policy_parameters()
        for name, value in parameters.items():
            own[name].copy_(value)

    def hidden(self, batch: Experience, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, LMHead]:
        """The states [b, T, D] that predict `batch.targets`, and the policy's head.

        `parameters` replace some or all of the policy's own. Forward- and reverse-mode derivatives pass through them,
        and a tied head follows its embedding. Gradient checkpointing is then off: it would recompute activations from
        the policy's own parameters.
        """
        arguments = (batch.sequences, batch.attention_mask, batch.mask.shape[1])
        with self.autocast(), self.models.training(parameters is None):
            return self.models.hidden(*arguments, parameters=parameters)

    def autocast(self) -> AbstractContextManager:
        """The precision of the models' products, those with the head included."""
        return self.models.autocast()

    def micro_batches(self, experience: Experience) -> Iterator[Experience]:
        """This rank's share in parts, that with the longest sequence first, without columns that none of them uses.

        Where other ranks have more parts, one without a token.
        """
        yield from self._select(experience, self._passes(experience))

    def _passes(self, experience: Experience) -> Passes:
        counts = count_tokens(experience.attention_mask, experience.mask.shape[1])
        size = {"most_sequences": self.micro_batch_size, "max_tokens": self.max_tokens}
        return self.ranks.passes(*counts, **size, padded=self.max_tokens is not None and not self.models.packs)

    def _select(self, experience: Experience, passes: Iterable[Pass]) -> Iterator[Experience]:
        for rows, counts, *longest in passes:
            batch = experience.select(rows.to(self.models.device), *longest)
            yield batch if counts else dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))

    def descend(
        self,
        experience: Experience,
        loss: Loss,
        *,
        num_epochs: int,
        target_kl: float | None = None,
        with_values: bool = True,
    ) -> dict[str, float]:
        """Epochs of mini-batches over one rollout, on policy and critic together.

        Args:
            experience: B sequences with advantages.
            loss: called on micro-batches; for policy and critic by turns if these train nothing in common.
            num_epochs: passes over the sequences, each in a new order.
            target_kl: stop before an optimizer step whose policy/approx_kl exceeds this (nats a token).
            with_values: call the loss with the critic's values; False gives it None and moves the policy alone.

        Returns:
            Metrics over the optimizer steps: means, extremes of `_min` and `_max`, and policy/skipped_steps if there
            are any.

        Raises:
            NonFiniteError: a loss or gradient is not finite, with `on_nonfinite="stop"`.
        """
        passes = [partial(self.evaluate, loss, with_values=with_values)]
        if with_values and self.models.critic_apart:
            # By themselves, so that the activations of only one of them are there at a time.
            passes = [partial(self.evaluate, loss), partial(self._evaluate_critic, loss)]
        return self._epochs(experience, passes, num_epochs, "policy/skipped_steps", target_kl)

    def descend_values(
        self, experience: Experience, loss: Callable[[Experience, Tensor], StepOutput], *, num_epochs: int
    ) -> dict[str, float]:
        """As `descend`, on the critic alone, with loss(batch, values [b, T]); a shared backbone gets no gradient.

        Skipped steps are counted in value/skipped_steps.
        """

        def evaluate(batch: Experience) -> StepOutput:
            with torch.no_grad():
                hidden = None if self.models.critic_apart else self._within(batch, lambda: self.hidden(batch)[0])
            return loss(batch, self._values(batch, hidden))

        return self._epochs(experience, [evaluate], num_epochs, "value/skipped_steps")

    def gradient(self, experience: Experience, loss: Loss) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The gradient of a loss by the names of the policy's parameters, and the metrics. `values` is None."""
        self._phase("gradient")
        try:
            metrics = self.accumulate(experience, partial(self.evaluate, loss))
            parameters = self.policy_parameters()
            return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}, metrics
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def measure(
        self, experience: Experience, loss: Loss, parameters: dict[str, Tensor] | None = None
    ) -> dict[str, float]:
        """The metrics of a loss under the policy's own or other parameters. `values` is None."""
        return self.accumulate(experience, partial(self.evaluate, loss, parameters=parameters))

    @torch.no_grad()
    def snapshot(self, experience: Experience, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, LMHead]:
        """The states [B, T, D] under the policy's own or other parameters, and the head, which is not copied."""
        passes = self._passes(experience)
        outputs = [self.hidden(batch, parameters) for batch in self._select(experience, passes)]
        return passes.join([hidden for hidden, _ in outputs], experience.mask.shape[1]), outputs[0][1]

    def evaluate(
        self, loss: Loss, batch: Experience, parameters: dict[str, Tensor] | None = None, with_values: bool = False
    ) -> StepOutput:
        """A loss on one micro-batch, under the policy's own or other parameters."""

        def evaluate() -> StepOutput:
            with self.autocast():
                hidden, head = self.hidden(batch, parameters)
                values = self._values(batch, hidden) if with_values else None
                ref_head = self.models.reference_head() if batch.ref_hidden is not None else None
                return loss(batch, hidden, head, values, ref_head)

        return self._within(batch, evaluate)

    def _evaluate_critic(self, loss: Loss, batch: Experience) -> StepOutput:
        with self.autocast():
            return loss(batch, None, None, self._values(batch), None)

    def _values(self, batch: Experience, hidden: Tensor | None = None) -> Tensor | None:
        """The critic's values of a micro-batch; `hidden` are the policy's states, which a shared backbone needs."""
        with self.autocast():
            return self.models.values(hidden, batch.sequences, batch.attention_mask, batch.mask.shape[1])

    def _within(self, batch: Experience, function: Callable[[], T]) -> T:
        return self.models.within(function, reference=batch.ref_hidden is not None)

    def accumulate(self, mini_batch: Experience, *passes: Evaluate) -> dict[str, float]:
        """Metrics of losses over micro-batches; where gradients are enabled, also sum up their gradients."""
        shares = []  # waited for before the first pass is launched
        divided = self._passes(mini_batch) if mini_batch.mask.any() else ()
        for batch in self._select(mini_batch, divided):
            shares.append((self._part_weight(batch, mini_batch), batch.token_share(mini_batch)))
        names, values, weights = [], [], []
        for evaluate, (part, (weight, share)) in itertools.product(passes, zip(divided, shares, strict=True)):
            (batch,) = self._select(mini_batch, [part])  # anew, so that one at a time is in memory
            loss, metrics = evaluate(batch)
            if torch.is_grad_enabled():
                (weight * loss).backward()
            if share == 0.0:
                continue
            names += metrics
            values += metrics.values()  # read at the end, so that no pass waits for the one before it
            weights += [weight if name.startswith("loss/") else share for name in metrics]
        if torch.is_grad_enabled():
            self.ranks.sum_gradients(self.parameters().values())
        read = torch.stack(values).tolist() if values else []
        by_name: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, *pair in itertools.chain(*self.ranks.each(lambda: list(zip(names, read, weights, strict=True)))):
            by_name[name].append(pair)
        return {name: _fold(name, *zip(*pairs, strict=True)) for name, pairs in by_name.items()}

    def _epochs(
        self,
        experience: Experience,
        passes: Sequence[Evaluate],
        num_epochs: int,
        skipped_steps: str,
        target_kl: float | None = None,
    ) -> dict[str, float]:
        history: dict[str, list[float]] = defaultdict(list)
        num_skipped, early = 0, {} if target_kl is None else {"policy/stopped_early": 0.0}
        with self.models.training():
            for epoch, mini_batch in self._mini_batches(experience, num_epochs):
                try:
                    metrics = self.accumulate(mini_batch, *passes)
                    for name, value in metrics.items():
                        history[name].append(value)
                    losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
                    too_far = target_kl is not None and metrics.get("policy/approx_kl", 0.0) > target_kl
                    if too_far and math.isfinite(sum(losses.values())):
                        early = {"policy/stopped_early": 1.0}
                        break
                    norm = self._optimizer_step(losses)
                    history["grad_norm"].append(norm)
                except FloatingPointError as error:
                    self.skip_nonfinite(f"epoch {epoch}: {error}", "this optimizer step")
                    num_skipped += 1
                finally:
                    self.optimizer.zero_grad(set_to_none=True)
                    self.models.park()
        return _summary(history) | early | ({skipped_steps: float(num_skipped)} if num_skipped else {})

    def _mini_batches(self, experience: Experience, num_epochs: int) -> Iterator[tuple[int, Experience]]:
        """Epoch, from 1, and mini-batch; every epoch has an order of its own."""
        for epoch in range(1, num_epochs + 1):
            self._phase(f"update {epoch}/{num_epochs}")
            order = torch.randperm(len(experience))
            for rows in order.tensor_split(self.num_mini_batches):
                if self.max_tokens is not None:  # then a mini-batch of all has the passes that scored them, to the bit
                    rows = rows.sort().values
                yield epoch, experience.select(rows.to(self.models.device))

    def _optimizer_step(self, losses: dict[str, float]) -> float:
        """Clip and step; returns the gradient's norm.

        Raises:
            FloatingPointError: a loss or gradient is not finite; nothing has changed.
        """
        parameters = {name: p for name, p in self.parameters().items() if p.grad is not None}
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        norm = self.ranks.norm(list(gradients.values()))
        if not math.isfinite(norm.item() + sum(losses.values())):
            found = [f"{name} {value:.4g}" for name, value in (losses | {"gradient norm": norm.item()}).items()]
            if bad := self.ranks.nonfinite(gradients):
                found.append(f"first non-finite gradient in {bad[0]}")
            raise FloatingPointError(f"not finite ({', '.join(found)})")
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.max_grad_norm, norm)
        self.changed = True
        self.optimizer.step()
        return norm.item()

    def forget_policy_moments(self) -> None:
        """Drop the optimizer's state of the policy, before it descends on another loss."""
        for parameter in self.policy_parameters().values():
            self.optimizer.state.pop(parameter, None)

    def skip_nonfinite(self, what: str, skipped: str) -> None:
        """Warn that `skipped` is skipped because of `what`, or raise NonFiniteError, as `on_nonfinite` says."""
        if self.on_nonfinite == "stop":
            raise NonFiniteError(f"{self.where}, {what}; with on_nonfinite: skip, {skipped} would be skipped")
        self._warn(f"{self.where}, {what}; {skipped} is skipped")


def _fold(name: str, values: Sequence[float], weights: Sequence[float]) -> float:
    """The extreme of a metric that is named `_max` or `_min`, the weighted sum of any other."""
    if name.endswith("_max"):
        return max(values)
    if name.endswith("_min"):
        return min(values)
    return sum(weight * value for value, weight in zip(values, weights, strict=True))


def _summary(history: dict[str, list[float]]) -> dict[str, float]:
    """Over optimizer steps: means, and extremes."""
    return {name: _fold(name, values, [1 / len(values)] * len(values)) for name, values in history.items()}
