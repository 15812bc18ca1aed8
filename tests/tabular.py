"""A token MDP small enough for exact answers: all completions are enumerated, in float64.

    state = prompt and prefix      policy = softmax(features[state] Wᵀ)      reward = a table over whole completions

The policy has hidden states and a head, so the algorithms that train language models run on it unchanged.
With depth 1 it is a contextual bandit.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.algorithms import ALGORITHMS
from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.learner import Learner
from fastppo.models.head import LMHead
from fastppo.training.config import Config, build_config


def fresh_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**63 - 1, ()))


class Tree:
    """A prompt is one token, a completion up to `depth` tokens of `vocab`; token 0 ends one early if `eos`.

    Everything is [M] or [M, depth] over all M completions, with equally likely prompts.
    """

    def __init__(
        self, *, prompts: int = 2, vocab: int = 3, depth: int = 2, eos: bool = False, seed: int | None = None
    ) -> None:
        self.prompts, self.vocab, self.depth, self.eos = prompts, vocab, depth, eos
        self.generator = torch.Generator()
        self.generator.manual_seed(fresh_seed() if seed is None else seed)
        axes = [torch.arange(prompts), *[torch.arange(vocab)] * depth]
        self.sequences = torch.cartesian_prod(*axes)  # [M, 1 + depth]
        self.mask = self._mask(self.sequences)
        if eos:  # completions that differ only after their end are one
            real = torch.cat([torch.ones(len(self.sequences), 1, dtype=torch.bool), self.mask], dim=1)
            self.sequences = torch.unique(self.sequences.masked_fill(~real, 0), dim=0)
            self.mask = self._mask(self.sequences)
        self.rewards = torch.rand(len(self.sequences), generator=self.generator, dtype=torch.float64)
        self.num_states = sum(prompts * vocab**t for t in range(depth))

    def _mask(self, sequences: Tensor) -> Tensor:
        if not self.eos:
            return torch.ones_like(sequences[:, 1:], dtype=torch.bool)
        ended = (sequences[:, 1:] == 0).cumsum(1)
        return (ended - (sequences[:, 1:] == 0).long()) == 0

    def states(self, sequences: Tensor) -> Tensor:
        """[B, T]: the number of the state before each completion token of sequences [B, 1 + T], T at most depth."""
        code, offset, states = sequences[:, 0], 0, []
        for t in range(sequences.shape[1] - 1):
            states.append(offset + code)
            offset += self.prompts * self.vocab**t
            code = code * self.vocab + sequences[:, t + 1]
        return torch.stack(states, dim=1)

    def token_logprobs(self, logits: Tensor, sequences: Tensor | None = None) -> Tensor:
        """[B, depth] of each token, from the policy's logits [S, V] of every state; 0 on padding."""
        sequences = self.sequences if sequences is None else sequences
        rows = logits.log_softmax(-1)[self.states(sequences)]  # [B, depth, V]
        chosen = rows.gather(2, sequences[:, 1:, None]).squeeze(2)
        return chosen.masked_fill(~self._mask(sequences), 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[M], of every prompt and completion; they sum to 1."""
        return self.token_logprobs(logits).sum(1).exp() / self.prompts

    def objective(self, logits: Tensor, rewards: Tensor | None = None) -> Tensor:
        """E[R], exactly and differentiably."""
        return (self.probabilities(logits) * (self.rewards if rewards is None else rewards)).sum()

    def best(self) -> float:
        """The greatest E[R] of any policy."""
        prompt = self.sequences[:, 0]
        return torch.stack([self.rewards[prompt == p].max() for p in range(self.prompts)]).mean().item()

    def visits(self, logits: Tensor) -> Tensor:
        """[S]: how often a completion passes through each state, on average."""
        weight = self.probabilities(logits)[:, None] * self.mask
        return torch.zeros(self.num_states, dtype=weight.dtype).index_add(
            0, self.states(self.sequences).flatten(), weight.flatten()
        )

    def advantages(self, logits: Tensor) -> Tensor:
        """A(s, a) [M, depth] of every token of every completion, 0 on padding."""
        probabilities = self.token_logprobs(logits).exp()
        values = []
        for t in range(self.depth + 1):  # of each completion's first t tokens
            same = (self.sequences[:, None, : t + 1] == self.sequences[None, :, : t + 1]).all(2)
            values.append((same * probabilities[:, t:].prod(1) * self.rewards).sum(1))
        values = torch.stack(values, 1)
        return (values[:, 1:] - values[:, :-1]).masked_fill(~self.mask, 0.0)

    def kl(self, logits: Tensor, other: Tensor) -> Tensor:
        """KL(π ‖ other) of whole completions, nats."""
        log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
        return (self.visits(logits) * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()

    def sample(self, logits: Tensor, count: int, *, groups_of: int = 1) -> Tensor:
        """[count]: numbers of completions drawn from the policy; each prompt serves `groups_of` in a row."""
        probabilities = self.probabilities(logits.detach())
        prompts = torch.randint(self.prompts, (count // groups_of,), generator=self.generator)
        given = torch.stack([probabilities * (self.sequences[:, 0] == p) for p in range(self.prompts)])  # [P, M]
        return torch.multinomial(
            given[prompts.repeat_interleave(groups_of)], 1, replacement=True, generator=self.generator
        ).squeeze(1)

    def stratified_sample(self, logits: Tensor, count: int) -> Tensor:
        """[count], each completion as often as is expected of it, to within one."""
        points = (torch.arange(count) + torch.rand((), generator=self.generator)) / count
        return torch.searchsorted(self.probabilities(logits.detach()).cumsum(0), points.double()).clamp(
            max=len(self.sequences) - 1
        )


class TabularModels:
    """Policy, critic and reference over a Tree, with what a Learner asks of `fastppo.models.policy_models`.

    Args:
        tree: the MDP.
        features: D of random features, trained with the head; None gives every state a logit row of its own.
        with_values: a table of values [S], trained; or K tables.
    """

    device = torch.device("cpu")
    critic_apart = False
    packs = True

    def __init__(self, tree: Tree, *, features: int | None = None, with_values: bool | int = True) -> None:
        self.tree = tree

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=tree.generator, dtype=torch.float64)

        self.trains_features = features is not None
        self.features = normal(tree.num_states, features) if features else torch.eye(tree.num_states).double()
        self.weight = (0.5 * normal(tree.vocab, self.features.shape[1])).requires_grad_()
        self.features.requires_grad_(self.trains_features)
        shape = (tree.num_states,) if with_values is True else (tree.num_states, int(with_values))
        self.value = (0.1 * normal(*shape)).requires_grad_() if with_values else None
        self.reference = {name: p.detach().clone() for name, p in self._all().items()}

    def _all(self) -> dict[str, Tensor]:
        return {"features": self.features, "head": self.weight}

    def within(self, function, *, reference: bool = False):
        return function()

    def policy_parameters(self) -> dict[str, Tensor]:
        return self._all() if self.trains_features else {"head": self.weight}

    def value_parameters(self) -> dict[str, Tensor]:
        return {} if self.value is None else {"table": self.value}

    def logits(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """[S, V] of every state."""
        own = self._all() | (parameters or {})
        return own["features"] @ own["head"].T

    def hidden(
        self, sequences: Tensor, attention_mask: Tensor, length: int, parameters: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, LMHead]:
        own = self._all() | (parameters or {})
        return own["features"][self.tree.states(sequences)], LMHead(own["head"], None, 1.0, None)

    def values(
        self, hidden: Tensor | None, sequences: Tensor, attention_mask: Tensor, num_completion: int
    ) -> Tensor | None:
        return None if self.value is None else self.value[self.tree.states(sequences)]

    def reference_logits(self) -> Tensor:
        return self.logits(self.reference)

    def reference_head(self) -> LMHead:
        return LMHead(self.reference["head"], None, 1.0, None)

    def autocast(self):
        return contextlib.nullcontext()

    def park(self):
        pass

    def training(self, mode: bool = True):
        return contextlib.nullcontext()

    @torch.no_grad()
    def experience(self, rows: Tensor, *, groups_of: int = 1, kl_estimator: str = "k1") -> Experience:
        """What a rollout of the tree's completions `rows` [B] would give an algorithm, float64."""
        tree = self.tree
        sequences, mask = tree.sequences[rows], tree.mask[rows]
        old = tree.token_logprobs(self.logits(), sequences)
        ref = tree.token_logprobs(self.reference_logits(), sequences)
        states = tree.states(sequences)
        if kl_estimator == "exact":
            log_p, log_q = self.logits().log_softmax(-1), self.reference_logits().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)[states].masked_fill(~mask, 0.0)
        else:
            kl = old - ref
        values = None
        if self.value is not None:
            real = mask if self.value.dim() == 1 else mask[..., None]
            values = self.value[states].masked_fill(~real, 0.0)
        return Experience(
            sequences=sequences,
            attention_mask=torch.cat([torch.ones(len(rows), 1, dtype=torch.long), mask.long()], dim=1),
            mask=mask,
            old_logprobs=old,
            old_values=values,
            scores=tree.rewards[rows],
            objective_scores=tree.rewards[rows, None],
            objectives={"reward": 1.0},
            kl=kl,
            ref_logprobs=ref,
            ref_hidden=self.reference["features"][states],
            ended=(mask & (sequences[:, 1:] == 0)).any(1) if tree.eos else torch.ones(len(rows), dtype=torch.bool),
            groups=torch.arange(len(rows)) // groups_of,
        )


def make_config(name: str, sequences: int, depth: int, *, groups_of: int = 1, **options: Any) -> Config:
    """A configuration whose only use is its algorithm's section and the rollout's size."""
    return build_config(
        {
            "algorithm": name,
            name: options,
            "model": {"name_or_path": "none"},
            "data": {"train": "none"},
            "rollout": {
                "num_prompts": sequences // groups_of,
                "num_generations": groups_of,
                "max_new_tokens": depth,
            },
            "optim": {"max_grad_norm": None},
        }
    )


def needs_values(config: Config) -> bool:
    """Whether the algorithm of `config` has a critic."""
    return ALGORITHMS[config.algorithm](config.algorithm_config).needs_values


def make_learner(
    models: TabularModels, config: Config, optimizer: torch.optim.Optimizer | None = None, *, lr: float = 0.1
) -> tuple[Algorithm, Learner]:
    """The algorithm of `config`, and a learner on the tabular models (plain gradient descent without an optimizer)."""
    algorithm = ALGORITHMS[config.algorithm](config.algorithm_config)
    parameters = [*models.policy_parameters().values(), *models.value_parameters().values()]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=lr)
    sequences = config.rollout.num_prompts * config.rollout.num_generations
    return algorithm, Learner(
        models,
        optimizer,
        partial(algorithm.part_weight, max_new_tokens=config.rollout.max_new_tokens),
        num_mini_batches=config.algorithm_config.num_mini_batches,
        micro_batch_size=config.algorithm_config.micro_batch_size(sequences),
        max_grad_norm=config.optim.max_grad_norm,
    )


def rollout(tree: Tree, models: TabularModels, algorithm: Algorithm, count: int) -> Experience:
    """`count` sequences by the policy, and the algorithm's advantages."""
    experience = models.experience(tree.sample(models.logits(), count))
    algorithm.estimate_advantages(experience)
    return experience


def rollout_without_luck(tree: Tree, models: TabularModels, algorithm: Algorithm, count: int) -> Experience:
    """The same with true advantages and sequences as often as they are probable."""
    rows = tree.stratified_sample(models.logits(), count)
    experience = models.experience(rows)
    algorithm.estimate_advantages(experience)
    experience.advantages = tree.advantages(models.logits().detach())[rows]
    return experience
