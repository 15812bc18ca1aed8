"""How parameters move: epochs of mini-batches, gradients accumulated in parts, non-finite ones caught before a step.

    experience ── shuffled, split ──> mini-batches ── split ──> micro-batches ── loss, backward ──> gradients ── step

What an algorithm asks of the models goes through here; it never sees a transformers model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import Head, Loss, StepOutput
from fastppo.algorithms.experience import Experience
from fastppo.models.policy_models import PolicyModels
from fastppo.training.config import Config


class NonFiniteError(RuntimeError):
    """A NaN or Inf in a loss or gradient, caught before the optimizer step that it would have spoilt."""


class Policy:
    """The policy of `models` as a function of its trained parameters."""

    def __init__(self, models: PolicyModels, changes: Callable[[], None]) -> None:
        self._models, self._changes = models, changes

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name: all of the policy, or its adapters."""
        return self._models.policy_parameters()

    def hidden(self, batch: Experience, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, Head]:
        """The states [b, T, D] that predict `batch.targets`, and the head; see `fastppo.algorithms.algorithm.Policy`.

        With `parameters` the model is called through `torch.func.functional_call`, so derivatives of either mode pass
        through them, and a tied head follows its embedding. Checkpointed activations would be computed again from the
        policy's own parameters, so there are none then.
        """
        arguments = (batch.sequences, batch.attention_mask, batch.mask.shape[1])
        with self._models.autocast(), self._models.training(parameters is None):
            return self._models.hidden(*arguments, parameters=parameters)

    def autocast(self) -> AbstractContextManager:
        """The precision in which the head's products are meant to be made."""
        return self._models.autocast()

    @torch.no_grad()
    def load(self, parameters: dict[str, Tensor]) -> None:
        """Copy these values into the policy."""
        self._changes()
        own = self.parameters()
        for name, value in parameters.items():
            own[name].copy_(value)


class Learner:
    """The models of a run, their optimizer, and the ways to move them.

    Args:
        config: the whole run.
        models: policy and critic.
        optimizer: over the parameters of both.
        part_weight: an algorithm's `part_weight`.
        phase, warn: tell a person what is being done, and what was skipped.
    """

    def __init__(
        self,
        config: Config,
        models: PolicyModels,
        optimizer: torch.optim.Optimizer,
        part_weight: Callable[[Experience, Experience, int], float],
        *,
        phase: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config, self.models, self.optimizer = config, models, optimizer
        self.policy = Policy(models, self._changes)
        self.where = ""
        """Where the run stands, for messages."""
        self.changed = False
        """Whether parameters have been changed since this was last set to False."""
        self._part_weight, self._phase, self._warn = part_weight, phase, warn

    def _changes(self) -> None:
        self.changed = True

    def parameters(self) -> dict[str, Tensor]:
        """Everything that is trained, the critic's under `value.`."""
        values = {f"value.{name}": parameter for name, parameter in self.models.value_parameters().items()}
        return values | self.models.policy_parameters()

    def micro_batches(self, experience: Experience) -> Iterator[Experience]:
        """Parts that fit one forward and backward pass, in order."""
        for rows in torch.arange(len(experience)).split(micro_batch_size(self.config)):
            yield experience.select(rows.to(self.models.device))

    def descend(
        self,
        experience: Experience,
        loss: Loss,
        *,
        num_epochs: int,
        num_mini_batches: int,
        target_kl: float | None = None,
    ) -> dict[str, float]:
        """Epochs of mini-batches over one rollout, on policy and critic together.

        Args:
            experience: B sequences with advantages.
            loss: an algorithm's loss, called for a micro-batch at a time.
            num_epochs: times every sequence is seen.
            num_mini_batches: optimizer steps in an epoch.
            target_kl: end before a step for which policy/approx_kl exceeds this (nats a token).

        Returns:
            Over the optimizer steps: means, extremes of `_min` and `_max`, and how many were skipped.

        Raises:
            NonFiniteError: a loss or gradient is not finite, with `on_nonfinite: stop`.
        """
        return self._epochs(experience, partial(self.backward, loss), num_epochs, num_mini_batches, target_kl)

    def descend_values(
        self,
        experience: Experience,
        loss: Callable[[Experience, Tensor], StepOutput],
        *,
        num_epochs: int,
        num_mini_batches: int,
    ) -> dict[str, float]:
        """As `descend`, on the critic alone: the policy, a shared backbone included, gets no gradient."""
        return self._epochs(experience, partial(self.backward_values, loss), num_epochs, num_mini_batches, None)

    def gradient(self, experience: Experience, loss: Loss) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The gradient of a loss, by the names of the policy's parameters, and its metrics; nothing moves."""

        def backward(batch: Experience, weight: float) -> dict[str, Tensor]:
            value, metrics = self._policy_loss(loss, batch, None)
            (weight * value).backward()
            return metrics

        self._phase("gradient")
        metrics = self.accumulate_gradients(experience, backward)
        parameters = self.policy.parameters()
        gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return gradient, metrics

    @torch.no_grad()
    def measure(
        self, experience: Experience, loss: Loss, parameters: dict[str, Tensor] | None = None
    ) -> dict[str, float]:
        """What a loss reports of the policy, by its own or other parameters."""
        return self.accumulate_gradients(
            experience, lambda batch, _: self._policy_loss(loss, batch, parameters).metrics
        )

    def _policy_loss(self, loss: Loss, batch: Experience, parameters: dict[str, Tensor] | None) -> StepOutput:
        with self.models.autocast():
            hidden, head = self.policy.hidden(batch, parameters)
            ref_head = self.models.reference_head() if batch.ref_hidden is not None else None
            return loss(batch, hidden, head, None, ref_head)

    def backward(self, loss: Loss, batch: Experience, weight: float) -> dict[str, Tensor]:
        """Add the gradients of weight · loss of a micro-batch; returns the loss's metrics."""
        with self.models.autocast():
            hidden, head = self.policy.hidden(batch)
            values = self.models.values(hidden, batch.sequences, batch.attention_mask)
            ref_head = self.models.reference_head() if batch.ref_hidden is not None else None
            value, metrics = loss(batch, hidden, head, values, ref_head)
        (weight * value).backward()
        return metrics

    def backward_values(
        self, loss: Callable[[Experience, Tensor], StepOutput], batch: Experience, weight: float
    ) -> dict[str, Tensor]:
        """As `backward`, for the critic's parameters alone."""
        with self.models.autocast():
            with torch.no_grad():
                hidden, _ = self.policy.hidden(batch)
            values = self.models.values(hidden, batch.sequences, batch.attention_mask)
            value, metrics = loss(batch, values)
        (weight * value).backward()
        return metrics

    def _epochs(
        self,
        experience: Experience,
        backward: Callable[[Experience, float], dict[str, Tensor]],
        num_epochs: int,
        num_mini_batches: int,
        target_kl: float | None,
    ) -> dict[str, float]:
        history: dict[str, list[float]] = defaultdict(list)
        with self.models.training():
            for epoch in range(num_epochs):
                self._phase(f"update {epoch + 1}/{num_epochs}")
                order = torch.randperm(len(experience))
                for rows in order.tensor_split(num_mini_batches):
                    mini_batch = experience.select(rows.to(self.models.device))
                    metrics = self.accumulate_gradients(mini_batch, backward)
                    for name, value in metrics.items():
                        history[name].append(value)
                    if target_kl is not None and metrics["policy/approx_kl"] > target_kl:
                        self.optimizer.zero_grad(set_to_none=True)
                        return _summary(history) | {"policy/stopped_early": 1.0}
                    self._optimizer_step(history, epoch)
        return _summary(history) | ({"policy/stopped_early": 0.0} if target_kl is not None else {})

    def accumulate_gradients(
        self, mini_batch: Experience, backward: Callable[[Experience, float], dict[str, Tensor]]
    ) -> dict[str, float]:
        """Gradients of one mini-batch's loss, a micro-batch at a time. Returns its metrics.

        Args:
            backward: backward(batch, weight) adds the gradients of weight · loss of a micro-batch and returns metrics.
        """
        totals: dict[str, float] = defaultdict(float)
        for batch in self.micro_batches(mini_batch):
            weight = self._part_weight(batch, mini_batch, self.config.rollout.max_new_tokens)
            share = batch.token_share(mini_batch)
            if share == 0.0:
                continue
            for name, value in backward(batch, weight).items():
                _fold(totals, name, value.item(), weight if name.startswith("loss/") else share)
        return totals

    def _optimizer_step(self, history: dict[str, list[float]], epoch: int) -> None:
        """Clip and step, unless a loss or gradient is not finite: then stop or skip, as configured."""
        parameters = list(self.parameters().values())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        losses = {name: values[-1] for name, values in history.items() if name.startswith("loss/")}
        if math.isfinite(norm) and all(math.isfinite(value) for value in losses.values()):
            if self.config.optim.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.max_grad_norm, norm)
            self._changes()
            self.optimizer.step()
            history["grad_norm"].append(norm.item())
        else:
            self.skip_nonfinite(self._nonfinite_report(losses, norm.item(), epoch))
            history["skipped"].append(1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def forget_policy_moments(self) -> None:
        """Start the optimizer anew for the policy: its next steps have another goal than those before."""
        for parameter in self.policy.parameters().values():
            self.optimizer.state.pop(parameter, None)

    def skip_nonfinite(self, what: str) -> None:
        """Something is not finite: stop the run, or tell a person that a step is skipped, as configured.

        Raises:
            NonFiniteError: with `on_nonfinite: stop`.
        """
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"{self.where}, {what}")
        self._warn(f"{self.where}, {what}; this optimizer step is skipped")

    def _nonfinite_report(self, losses: dict[str, float], norm: float, epoch: int) -> str:
        names = self.parameters().items()
        first = next((n for n, p in names if p.grad is not None and not torch.isfinite(p.grad).all()), None)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        gradient = f", first non-finite gradient in {first}" if first else ""
        return f"epoch {epoch + 1}: not finite ({shown}, gradient norm {norm:.4g}{gradient})"


def micro_batch_size(config: Config) -> int:
    """Sequences in one forward (and backward) pass."""
    sequences = config.rollout.num_prompts * config.rollout.num_generations
    algorithm = config.algorithm_config
    return math.ceil(sequences / (algorithm.num_mini_batches * algorithm.gradient_accumulation_steps))


def _fold(totals: dict[str, float], name: str, value: float, weight: float) -> None:
    """Extremes keep the extreme, everything else the weighted mean."""
    if name.endswith("_max"):
        totals[name] = max(totals.get(name, value), value)
    elif name.endswith("_min"):
        totals[name] = min(totals.get(name, value), value)
    else:
        totals[name] += weight * value


def _summary(history: dict[str, list[float]]) -> dict[str, float]:
    """Over a step's optimizer steps: extremes of extremes, counts of skips, means of the rest."""
    reduce = {"_max": max, "_min": min}
    summary = {}
    for name, values in history.items():
        if name == "skipped":
            summary["policy/skipped_steps"] = sum(values)
        else:
            summary[name] = reduce.get(name[-4:], lambda v: sum(v) / len(v))(values)
    return summary
