"""What a rollout is worth and what the models say of it; evaluation on held-out prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.algorithms.experience import Experience
from fastppo.models import LMHead
from fastppo.models.policy_models import PolicyModels
from fastppo.ops import reference as formulas
from fastppo.ops.linear_kl import linear_kl
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.rollout.prompt import Prompt
from fastppo.rollout.sample import Rollout, sample
from fastppo.training.config import Config
from fastppo.training.health import Hidden, load_texts, perplexity
from fastppo.training.rewards import RewardFunctions, RewardOutput, build_rewards
from fastppo.training.rng import rng_state, seed_everything, set_rng_state


class Scorer:
    """Samples from the policy, asks the reward functions, and computes what an algorithm needs of the result.

    Args:
        config: the whole run.
        tokenizer, models, rewards: what it works with; their state stays the caller's.

    Raises:
        RewardError, DataError: a held-out reward or the text for the perplexity cannot be had.
    """

    held_out: RewardFunctions | None
    """Rewards of evaluations alone."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, models: PolicyModels, rewards: RewardFunctions
    ) -> None:
        self.config, self.tokenizer, self.models, self.rewards = config, tokenizer, models, rewards
        sequences = config.rollout.num_prompts * config.rollout.num_generations
        self.micro_batch_size = config.algorithm_config.micro_batch_size(sequences)
        self.held_out = self._texts = None
        if config.eval.rewards:
            self.held_out = build_rewards(config.eval.rewards, device=models.device, model_defaults=config.model)
        if config.eval.perplexity is not None:
            self._texts = load_texts(config.eval.perplexity, tokenizer, context_length=models.context_length)

    def sample(self, prompts: list[Prompt]) -> Rollout:
        """One completion for every prompt."""
        cap = getattr(self.config.algorithm_config, "importance_sampling_cap", None)
        with self.models.autocast():
            return sample(
                self.models.policy,
                self.tokenizer,
                prompts,
                self.config.rollout,
                device=self.models.device,
                with_logprobs=cap is not None,
            )

    def reward(self, prompts: list[Prompt], rollout: Rollout, *, update: bool = True) -> RewardOutput:
        """Scores [B]; `update` lets running normalizers learn from them."""
        return self._ask(self.rewards, prompts, rollout, update=update)

    @staticmethod
    def _ask(functions: RewardFunctions, prompts: list[Prompt], rollout: Rollout, *, update: bool) -> RewardOutput:
        names = {name for prompt in prompts for name in prompt.columns}
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}
        tokens = rollout.sequences[:, -rollout.mask.shape[1] :]
        completion_ids = [row[real].tolist() for row, real in zip(tokens.cpu(), rollout.mask.cpu(), strict=True)]
        return functions(
            [prompt.text for prompt in prompts],
            rollout.completions,
            columns,
            completion_ids=completion_ids,
            update=update,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout, rewards: RewardOutput, *, update_follows: bool = True) -> Experience:
        """Old log-probabilities, values and the KL to the reference of a rollout: one forward of each model."""
        all_rows = torch.arange(len(rewards.total)).split(self.micro_batch_size)
        # An update in one part begins with this very pass. More parts would not fit in memory at once.
        keep = update_follows and len(all_rows) == 1 and not self.config.model.gradient_checkpointing
        parts = [
            self._score_part(rollout, rows, update_follows and self.models.value is not None, keep) for rows in all_rows
        ]

        def join(name: str) -> Tensor | None:
            return None if parts[0][name] is None else torch.cat([part[name] for part in parts])

        return Experience(
            sequences=rollout.sequences,
            attention_mask=rollout.attention_mask,
            mask=rollout.mask,
            scores=rewards.total,
            ended=rollout.ended,
            groups=rollout.groups,
            rollout_logprobs=rollout.logprobs,
            objective_scores=rewards.objectives,
            objective_token_scores=rewards.token_objectives,
            objectives=rewards.weights,
            **{name: join(name) for name in ("old_logprobs", "old_values", "kl", "ref_logprobs", "ref_hidden")},
        )

    def _score_part(self, rollout: Rollout, rows: Tensor, with_values: bool, keep: bool) -> dict[str, Tensor | None]:
        ids, attention, mask = rollout.sequences[rows], rollout.attention_mask[rows], rollout.mask[rows]
        length, config = mask.shape[1], self.config.algorithm_config
        targets = ids[:, -length:].masked_fill(~mask, -100)
        result: dict[str, Tensor | None] = dict.fromkeys(("old_values", "kl", "ref_logprobs", "ref_hidden"))
        with self.models.autocast():
            policy_hidden = self.models.hidden_before_update if keep else self.models.hidden
            hidden, head = policy_hidden(ids, attention, length)
            result["old_logprobs"] = self._logprobs(hidden, head, targets)
            if with_values:
                values = self.models.values(hidden, ids, attention)
                real = mask if values.dim() == 2 else mask[..., None]
                result["old_values"] = values.masked_fill(~real, 0.0)
            if self.models.has_reference:
                ref_hidden, ref_head = self.models.reference_hidden(ids, attention, length)
                result["ref_logprobs"] = self._logprobs(ref_hidden, ref_head, targets)
                if config.kl_estimator == "exact":
                    result["kl"] = linear_kl(
                        hidden,
                        head.weight,
                        ref_hidden,
                        ref_head.weight,
                        mask=mask,
                        bias=head.bias,
                        ref_bias=ref_head.bias,
                        temperature=self.config.rollout.temperature,
                        logit_scale=head.logit_scale,
                        softcap=head.softcap,
                        backend=self.config.backend_name,
                    )
                    result["ref_hidden"] = ref_hidden if config.kl_in == "loss" else None
                else:
                    result["kl"] = formulas.sampled_kl(
                        result["old_logprobs"], result["ref_logprobs"], config.kl_estimator
                    )
        return result

    def _logprobs(self, hidden: Tensor, head: LMHead, targets: Tensor) -> Tensor:
        return linear_logprob(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=self.config.rollout.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            backend=self.config.backend_name,
        ).logprobs

    def reward_metrics(self, rewards: RewardOutput, prefix: str = "reward") -> dict[str, float]:
        """Means of the rewards as the functions gave them: normalization would hide whether they rise."""
        weighted = self._weighted(rewards)
        metrics = {f"{prefix}/mean": weighted.mean().item(), f"{prefix}/std": weighted.std(correction=0).item()}
        return metrics | {f"{prefix}/{name}": values.mean().item() for name, values in rewards.by_name.items()}

    def _weighted(self, rewards: RewardOutput) -> Tensor:
        """[B], without constraints, whose weights move."""
        objectives = (reward for reward in self.rewards.rewards if reward.multiplier is None)
        return sum(reward.weight * rewards.by_name[reward.name] for reward in objectives)

    def evaluate(self, prompts: list[Prompt]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample held-out prompts, always with the same random numbers and without touching the run's.

        Returns:
            Metrics named `eval/...`, and one row a sample: prompt, completion, reward, rewards.
        """
        state = rng_state()
        try:
            seed_everything(self.config.seed)
            rollout = self.sample(prompts)
            rewards = self.reward(prompts, rollout, update=False)
            held_out = self._ask(self.held_out, prompts, rollout, update=False).by_name if self.held_out else {}
            experience = self.score(rollout, rewards, update_follows=False)
        finally:
            set_rng_state(*state)
        named = self.reward_metrics(rewards, "eval")
        metrics = {"eval/reward": named.pop("eval/mean"), "eval/reward_std": named.pop("eval/std"), **named}
        metrics["eval/num_prompts"] = len(prompts)
        measured = {"eval/length": rollout.mask.sum(1).float()}
        if experience.kl is not None:
            measured["eval/kl"] = experience.kl.sum(1)
        for name, values in measured.items():
            metrics |= {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}
        for name, values in held_out.items():
            metrics |= {f"eval/{name}": values.mean().item(), f"eval/{name}_std": values.std(correction=0).item()}
        if self._texts is not None:
            metrics["eval/perplexity"] = self._perplexity(self.models.hidden)
            if self.models.has_reference:
                metrics["eval/perplexity_reference"] = self._perplexity(self.models.reference_hidden)
        totals = self._weighted(rewards).tolist()
        rows = [
            {
                "prompt": prompt.text,
                "completion": completion,
                "reward": totals[i],
                "rewards": {name: values[i].item() for name, values in {**rewards.by_name, **held_out}.items()},
            }
            for i, (prompt, completion) in enumerate(zip(prompts, rollout.completions, strict=True))
        ]
        return metrics, rows

    def _perplexity(self, hidden: Hidden) -> float:
        with self.models.autocast():
            return perplexity(
                hidden,
                self._texts,
                pad=self.tokenizer.pad_token_id,
                batch_size=self.micro_batch_size,
                device=self.models.device,
                backend=self.config.backend_name,
            )
