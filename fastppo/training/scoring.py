"""Sample and score: rewards of a rollout, and what the models say of it; evaluation on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.algorithms.algorithm import Algorithm, head_arguments
from fastppo.algorithms.correction import importance_weights
from fastppo.algorithms.experience import Experience, check_finite, count_tokens
from fastppo.algorithms.learner import NonFiniteError
from fastppo.algorithms.ranks import Pass, Ranks
from fastppo.errors import quote
from fastppo.models import LMHead
from fastppo.models.policy_models import PolicyModels
from fastppo.ops import reference as formulas
from fastppo.ops.linear_kl import linear_kl
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.rollout.choose import open_engine
from fastppo.rollout.draw import sequence_keys
from fastppo.rollout.prompt import Prompt
from fastppo.rollout.sample import Rollout, sample
from fastppo.training.config import Config
from fastppo.training.distributed.join import join_rewards, join_rollouts, on_cpu
from fastppo.training.health import perplexity
from fastppo.training.plan import machine_of
from fastppo.training.plan.phases import engine_of
from fastppo.training.plan.vllm_share import vllm_memory_utilization
from fastppo.training.rewards import RewardError, RewardFunctions, RewardOutput
from fastppo.training.rng import rng_state, seed_everything, set_rng_state

_SCORES = {
    "old_logprobs": "log-probabilities under the policy",
    "old_values": "values of the critic",
    "ref_logprobs": "log-probabilities under the reference",
    "kl": "KL to the reference",
}


class Scorer:
    """Sample completions, compute their rewards, and evaluate the models on them.

    Args:
        config: the run's configuration.
        tokenizer, models, rewards: the run's own, not copies.
        algorithm: the algorithm that `score` is for; not needed for evaluations.
        ranks: divide the work among them; each gets all results.
        held_out: rewards that are evaluated but not optimized.
        texts: token ids of texts, whose perplexity is evaluated.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        models: PolicyModels,
        rewards: RewardFunctions,
        algorithm: Algorithm | None = None,
        *,
        ranks: Ranks | None = None,
        held_out: RewardFunctions | None = None,
        texts: list[list[int]] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.models, self.rewards = config, tokenizer, models, rewards
        self.ranks, self.held_out, self._texts = ranks or Ranks(), held_out, texts
        share = None
        if engine_of(config, models.device.type) == "vllm":
            machine = machine_of(config, None, self.ranks.size)
            share = self.ranks.first(lambda: vllm_memory_utilization(config, machine))
        longest = config.data.max_prompt_length + config.rollout.max_new_tokens
        limits = {"max_length": longest, "gpu_memory_utilization": share}
        self.engine = open_engine(models.policy, config.rollout, models.device, **limits)
        sequences = config.rollout.num_prompts * config.rollout.num_generations
        self.micro_batch_size = config.algorithm_config.micro_batch_size(sequences)
        self.max_tokens = config.batch.max_tokens
        self._update_starts_with_scored_pass = algorithm is None or algorithm.update_starts_with_scored_pass

    def sample(self, prompts: list[Prompt], name: str, progress: Callable[[int], None] = lambda ended: None) -> Rollout:
        """Sample one completion of each prompt.

        Args:
            name: of this rollout in the run. Together with the run's seed it decides the random numbers.
            progress: is told how many completions have ended, as if all ranks had got as far as this one.
        """
        keys = sequence_keys(f"{self.config.seed}/{name}", len(prompts))
        options = {"engine": self.engine, "device": self.models.device}
        options["progress"] = lambda ended: progress(min(ended * self.ranks.size, len(prompts)))
        share = self.ranks.share(len(prompts))
        mine = slice(share.start, max(share.stop, share.start + 1))  # one at least, so that there is a rollout

        def own() -> Rollout:
            return sample(self.models.policy, self.tokenizer, prompts[mine], keys[mine], self.config.rollout, **options)

        with self.models.autocast(), self.models.gathered():
            if self.ranks.size == 1:
                return own()
            parts = self.ranks.each(lambda: on_cpu(own(), len(share)))
        return join_rollouts(parts, prompts, self.tokenizer.pad_token_id, self.models.device)

    def reward(
        self, prompts: list[Prompt], rollout: Rollout, functions: RewardFunctions | None = None, *, update: bool = True
    ) -> RewardOutput:
        """Rewards of B completions, by default those of training; `update` lets running normalizers take them in."""
        names = sorted({name for prompt in prompts for name in prompt.columns})
        tokens = rollout.sequences[:, -rollout.mask.shape[1] :].cpu()
        share = self.ranks.share(len(prompts))
        mine = slice(share.start, share.stop)
        ids = [row[real].tolist() for row, real in zip(tokens[mine], rollout.mask[mine].cpu(), strict=True)]

        def gather(call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            def own() -> dict[str, Tensor]:
                try:
                    return call() if share else {}
                except RewardError as error:
                    if getattr(error, "row", None) is not None:
                        error.row += share.start
                    raise

            joined = join_rewards(self.ranks.each(own))
            if self.ranks.size > 1:  # a function may have drawn more random numbers on one rank than on others
                set_rng_state(*self.ranks.first(rng_state))
            return joined

        return (functions or self.rewards)(
            [prompt.text for prompt in prompts[mine]],
            rollout.completions[mine],
            {name: [prompt.columns.get(name) for prompt in prompts[mine]] for name in names},
            completion_ids=ids,
            update=update,
            gather=gather,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout, rewards: RewardOutput, *, update_follows: bool = True) -> Experience:
        """Old log-probabilities, values and the KL to the reference of a rollout: one forward of each model.

        Args:
            rollout, rewards: of the same B completions, padded to T tokens.
            update_follows: whether the result is for an update; otherwise it has no values.

        Returns:
            Experience with `old_logprobs`, `kl` and `ref_logprobs` [B, T], `old_values` [B, T] or [B, T, K] and
            `ref_hidden` [B, T, D]: detached, 0 at padding, None where the configuration does not use them; and with
            `importance_weights` [B, T], where the configuration has a correction.

        Raises:
            NonFiniteValue: one of them is NaN or infinite.
        """
        length = rollout.mask.shape[1]
        size = {"most_sequences": self.micro_batch_size, "max_tokens": self.max_tokens, "padded": self._padded}
        passes = self.ranks.passes(*count_tokens(rollout.attention_mask, length), **size)
        # The update can start with this pass if all of its activations fit in memory, so if there is a single part.
        keep = update_follows and self._update_starts_with_scored_pass and len(passes) == self.ranks.size == 1
        keep = keep and not self.config.model.gradient_checkpointing
        keep = keep and self.config.algorithm_config.num_mini_batches == 1
        parts = self.models.within(
            lambda: [self._score_part(rollout, part, update_follows, keep) for part in passes], reference=True
        )
        self.models.park()
        scores = {
            name: None if value is None else passes.join([part[name] for part in parts], length)
            for name, value in parts[0].items()
        }
        checked = {what: scores[name] for name, what in _SCORES.items()}
        for what, values in (checked | {"log-probabilities at sampling": rollout.logprobs}).items():
            if values is not None:
                check_finite(what, values, rollout.mask)
        experience = Experience(
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
            **scores,
        )
        if self.config.rollout.correction != "none":
            experience.importance_weights, _ = self._correction(experience)
        return experience

    def _correction(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Each token's importance weight [B, T], and whether a bound has changed it."""
        rollout = self.config.rollout
        options = (rollout.correction, rollout.correction_min, rollout.correction_max)
        return importance_weights(experience.old_logprobs, experience.rollout_logprobs, experience.mask, *options)

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """How far the engine's log-probabilities are from the policy's, log π − log μ, and the weights they lead to."""
        mask = experience.mask
        if not mask.any():
            return {}
        gap = (experience.old_logprobs - experience.rollout_logprobs)[mask].double()
        gaps = {"mean": gap.mean(), "min": gap.min(), "max": gap.max()}
        metrics = {f"rollout/logprob_gap_{name}": value.item() for name, value in gaps.items()}
        if experience.importance_weights is not None:
            weights, changed = self._correction(experience)
            metrics["rollout/importance_weight"] = weights[mask].double().mean().item()
            metrics["rollout/corrected_fraction"] = changed[mask].double().mean().item()
        return metrics

    def _score_part(self, rollout: Rollout, part: Pass, with_values: bool, keep: bool) -> dict[str, Tensor | None]:
        length, config, rows = part.completion, self.config.algorithm_config, part.rows.to(self.models.device)
        width = rollout.sequences.shape[1] - rollout.mask.shape[1]
        columns = slice(width - part.prompt, width + length)  # those that any of the rows uses
        ids, attention, mask = (
            x[rows]
            for x in (rollout.sequences[:, columns], rollout.attention_mask[:, columns], rollout.mask[:, :length])
        )
        targets = ids[:, -length:].masked_fill(~mask, -100)
        result: dict[str, Tensor | None] = dict.fromkeys(("old_values", "kl", "ref_logprobs", "ref_hidden"))
        with self.models.autocast():
            policy_hidden = self.models.hidden_before_update if keep else self.models.hidden
            hidden, head = policy_hidden(ids, attention, length)
            result["old_logprobs"] = self._logprobs(hidden, head, targets)
            if with_values and self.models.value is not None:
                values = self.models.values(hidden, ids, attention, length)
                result["old_values"] = values.masked_fill(~(mask if values.dim() == 2 else mask[..., None]), 0.0)
            if self.models.has_reference:
                ref_hidden, ref_head = self.models.reference_hidden(ids, attention, length)
                result["ref_logprobs"] = self._logprobs(ref_hidden, ref_head, targets)
                if config.kl_estimator == "exact":
                    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_head.weight, "ref_bias": ref_head.bias}
                    result["kl"] = linear_kl(hidden, mask=mask, **reference, **self._head_arguments(head))
                    result["ref_hidden"] = ref_hidden if config.kl_in == "loss" else None
                else:
                    logprobs = result["old_logprobs"], result["ref_logprobs"]
                    result["kl"] = formulas.sampled_kl(*logprobs, config.kl_estimator)
        return result

    @property
    def _padded(self) -> bool:
        """Whether the models compute padding, so that a budget of tokens must count it."""
        return self.max_tokens is not None and not self.models.packs

    def _logprobs(self, hidden: Tensor, head: LMHead, targets: Tensor) -> Tensor:
        return linear_logprob(hidden, targets=targets, **self._head_arguments(head)).logprobs

    def _head_arguments(self, head: LMHead) -> dict[str, Any]:
        return head_arguments(head, self.config.rollout.temperature, self.config.backend_name)

    def reward_metrics(self, rewards: RewardOutput) -> dict[str, float]:
        """Means of the rewards as the functions returned them; normalized ones would not show a rise."""
        weighted = self._weighted(rewards)
        metrics = {"reward/mean": weighted.mean().item(), "reward/std": weighted.std(correction=0).item()}
        return metrics | {f"reward/{name}": values.double().mean().item() for name, values in rewards.by_name.items()}

    def _weighted(self, rewards: RewardOutput) -> Tensor:
        """[B] float64: the weighted sum, without constraints, whose weights change during a run."""
        objectives = (reward for reward in self.rewards.rewards if reward.multiplier is None)
        return sum(reward.weight * rewards.by_name[reward.name].double() for reward in objectives)

    def evaluate(
        self, prompts: list[Prompt], phase: Callable[[str], None] = lambda _: None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample and score held-out prompts, each time with the same random numbers; restores the generators.

        Args:
            phase: is told what is done now: "sample 8/32", "reward", "score".

        Returns:
            Metrics named `eval/...`, and one row a sample: prompt, completion, reward, rewards.

        Raises:
            NonFiniteError: a probability or a reward is not finite.
        """
        state = rng_state()
        try:
            seed_everything(self.config.seed)  # reward functions may draw too
            phase(f"sample 0/{len(prompts)}")
            rollout = self.sample(prompts, "evaluation", lambda ended: phase(f"sample {ended}/{len(prompts)}"))
            phase("reward")
            rewards = self.reward(prompts, rollout, update=False)
            held_out = self.reward(prompts, rollout, self.held_out, update=False).by_name if self.held_out else {}
            phase("score")
            experience = self.score(rollout, rewards, update_follows=False)
        except FloatingPointError as error:
            raise NonFiniteError(f"evaluation: {with_prompt(error, prompts)}") from error
        finally:
            set_rng_state(*state)
        measured = {"reward": self._weighted(rewards), **rewards.by_name, **held_out}
        measured["length"] = rollout.mask.sum(1)
        if experience.kl is not None:
            measured["kl"] = experience.kl.double().sum(1)
        metrics = {"eval/num_prompts": float(len(prompts))}
        for name, values in measured.items():
            values = values.double()
            metrics |= {f"eval/{name}": values.mean().item(), f"eval/{name}_std": values.std(correction=0).item()}
        if self._texts is not None:
            options = {"pad": self.tokenizer.pad_token_id, "most_sequences": self.micro_batch_size}
            options |= {"max_tokens": self.max_tokens, "padded": self._padded}
            options |= {"device": self.models.device, "backend": self.config.backend_name}
            with self.models.autocast():
                models = {"eval/perplexity": self.models.hidden}
                if self.models.has_reference:
                    models["eval/perplexity_reference"] = self.models.reference_hidden
                for name, hidden in models.items():
                    measure = partial(perplexity, hidden, self._texts, **options)
                    metrics[name] = self.models.within(measure, reference=True)
            self.models.park()
        totals, by_name = measured["reward"].tolist(), {**rewards.by_name, **held_out}
        rows = [
            {"prompt": prompt.text, "completion": completion, "reward": total}
            | {"rewards": {name: values[i].item() for name, values in by_name.items()}}
            for i, (prompt, completion, total) in enumerate(zip(prompts, rollout.completions, totals, strict=True))
        ]
        return metrics, rows


def with_prompt(error: FloatingPointError, prompts: list[Prompt]) -> str:
    """The error's message, with the prompt of the completion that it names."""
    row = getattr(error, "row", None)
    return str(error) if row is None else f"{error}, prompt {quote(prompts[row].text)}"
