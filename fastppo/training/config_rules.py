"""Rules between fields: keys that are missing, contradict each other, or would have no effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastppo.algorithms.config import AlgorithmConfig
from fastppo.algorithms.correction import BOUNDS
from fastppo.errors import ConfigError, quote
from fastppo.rollout.config import VLLMConfig

if TYPE_CHECKING:
    from fastppo.training.config import Config

# Metrics that evaluation logs beside the rewards, whose names must differ.
_TAKEN = {"mean", "std", "reward", "reward_std", "length", "length_std", "kl", "kl_std", "num_prompts", "perplexity"}
_TAKEN |= {"perplexity_reference"}

# A step's sequences are lists and tensors in memory. Far beyond what one machine samples; it stops a slip of the hand.
_MAX_SEQUENCES, _MAX_TOKENS = 2**20, 2**28


def check_consistency(config: Config) -> None:
    """Check the rules between fields.

    Raises:
        ConfigError: fields that are missing or don't go together.
    """
    for rules in (_run, _rollout, _model, _rewards, _watch, _other_algorithms, _algorithm, _options_in_use):
        for problem in rules(config):
            raise ConfigError(problem)


def _run(config: Config) -> Iterator[str]:
    if not config.model.name_or_path:
        yield "model.name_or_path: required, but not given"
    if not config.data.train:
        yield "data.train: required, but not given"
    if len(set(config.report_to)) < len(config.report_to):
        yield f"report_to: the same tracker is given twice in {config.report_to}"
    rollout = config.rollout
    sequences = rollout.num_prompts * rollout.num_generations
    if sequences > _MAX_SEQUENCES or sequences * rollout.max_new_tokens > _MAX_TOKENS:
        yield (
            f"rollout: {sequences} sequences (num_prompts x num_generations) of up to {rollout.max_new_tokens} tokens "
            f"are too much for a step, which holds at most {_MAX_SEQUENCES} sequences and {_MAX_TOKENS} tokens"
        )
    if config.optim.name == "paged_adamw_8bit" and config.algorithm == "cpi":
        yield (
            "optim.name: with paged_adamw_8bit every step of cpi takes more memory, since it drops the moments, which "
            "bitsandbytes does not free; set optim.name: adamw_8bit"
        )
    if config.optim.lr_scheduler_type == "constant" and config.optim.warmup_steps:
        yield "optim.warmup_steps: the constant schedule has no warm-up; take constant_with_warmup"


def _rollout(config: Config) -> Iterator[str]:
    rollout, engine, device = config.rollout, config.rollout.engine, config.device
    if engine == "loop" and device not in ("auto", "cpu"):
        yield f"rollout.engine: loop samples on a CPU, and device is {quote(device)}; set it to auto"
    if engine not in ("auto", "vllm"):
        for key in _changed(rollout.vllm):
            yield f"rollout.vllm.{key}: has no effect with rollout.engine: {engine}; set that to vllm"
    if rollout.correction == "none":
        for key in ("correction_min", "correction_max"):
            if getattr(rollout, key) is not None:
                yield f"rollout.{key}: has no effect without rollout.correction; set that to {', '.join(BOUNDS)}"
        return
    lowest, highest = BOUNDS[rollout.correction]
    if lowest is None:
        if rollout.correction_min is not None:
            yield f"rollout.correction_min: has no effect with correction: {rollout.correction}, which lacks that bound"
        return
    low, high = rollout.correction_min or lowest, rollout.correction_max or highest
    if not low <= 1 <= high or low == high:
        yield (
            f"rollout.correction_{'min' if low > 1 else 'max'}: {low:g} to {high:g} ({rollout.correction}'s bounds) "
            "leave out ratios around 1, those of an engine that samples as the policy does; take 1 between them"
        )


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.quantization is not None:
        if model.lora is None:
            yield "model.quantization: weights in 4 bits cannot be trained; set model.lora, whose adapters can"
        if model.value_model == "separate":
            yield (
                "model.value_model: all parameters of a separate critic are trained, which model.quantization keeps in "
                "4 bits; set it to adapter, or to shared"
            )
        if getattr(config.algorithm_config, "fisher_method", None) == "gauss_newton":
            yield (
                f"{config.algorithm}.fisher_method: gauss_newton needs forward-mode derivatives, which products with "
                "weights in 4 bits (model.quantization) do not have; set it to finite_difference"
            )
    if model.value_model == "adapter" and model.lora is None:
        yield "model.value_model: adapter needs model.lora, which says what adapters the critic has"


def _rewards(config: Config) -> Iterator[str]:
    keyed = [(f"rewards.{index}", reward) for index, reward in enumerate(config.rewards)]
    keyed += [(f"eval.rewards.{index}", reward) for index, reward in enumerate(config.eval.rewards)]
    names = [reward.name for _, reward in keyed]
    for key, reward in keyed:
        name, constraint, held_out = reward.name, reward.threshold is not None, key.startswith("eval.")
        if name in _TAKEN:
            yield f"{key}.name: {quote(name)} is the name of a metric already; call the reward something else"
        if (reward.function is None) == (reward.model is None):
            yield f"{key}: give exactly one of `function` and `model`"
        if names.count(name) > 1:
            yield f"{key}.name: {quote(name)} is used twice; metrics are kept by name"
        if not constraint and reward.multiplier_learning_rate != type(reward)("_").multiplier_learning_rate:
            yield f"{key}.multiplier_learning_rate: only a constraint (`threshold`) has one"
        if constraint and reward.weight < 0:
            yield f"{key}.weight: the initial multiplier of a constraint must be at least 0, got {reward.weight:g}"
        for other in (f"{name}_std", *([f"{name}_effect"] if held_out else [])):
            if other in names:
                yield f"{key}.name: a reward named {other} hides its metrics"
        if held_out and (reward.weight != 1.0 or reward.normalize or constraint):
            yield f"{key}: a reward that is not trained on has no weight, normalization or threshold"
    if config.rewards and all(reward.threshold is not None for reward in config.rewards):
        yield "rewards: at least one must be an objective, without a threshold"


def _watch(config: Config) -> Iterator[str]:
    for index, rule in enumerate(config.watch.rules):
        key = f"watch.rules.{index}"
        if rule.above is None and rule.below is None:
            yield f"{key}: give `above`, `below` or both; {rule.metric} is not bounded"
        if rule.above is not None and rule.below is not None and rule.below >= rule.above:
            yield f"{key}: every value is below {rule.below:g} or above {rule.above:g}"
        if rule in config.watch.rules[:index]:
            yield f"{key}: the same rule is given twice"
        if rule.action == "rollback" and not config.checkpoint.every:
            yield f"{key}.action: rollback needs checkpoints; set checkpoint.every"
        if rule.metric.startswith("eval/") and rule.action != "warn" and not config.eval.every:
            yield f"{key}: {rule.metric} is known only after the last step; set eval.every"


def _other_algorithms(config: Config) -> Iterator[str]:
    chosen = config.algorithm
    for name in (f.name for f in dataclasses.fields(config) if f.name != chosen):
        section = getattr(config, name)
        for key in _changed(section) if isinstance(section, AlgorithmConfig) else ():
            where = f"set {chosen}.{key}" if hasattr(config.algorithm_config, key) else f"{chosen} has no such key"
            yield f"{name}.{key}: has no effect, since algorithm is {chosen!r}; {where}, or drop all with --{name} {{}}"


def _algorithm(config: Config) -> Iterator[str]:
    name, section, no_reference = config.algorithm, config.algorithm_config, config.model.reference == "none"
    sequences = config.rollout.num_prompts * config.rollout.num_generations
    parts = section.num_mini_batches * section.gradient_accumulation_steps
    if sequences < parts:
        yield (
            f"{name}.num_mini_batches: {parts} parts (num_mini_batches x gradient_accumulation_steps) cannot be made "
            f"of {sequences} sequences (rollout.num_prompts x rollout.num_generations)"
        )
    if config.batch.max_tokens is not None and section.gradient_accumulation_steps > 1:
        yield (
            f"{name}.gradient_accumulation_steps: must be 1 with batch.max_tokens, which decides how many passes there "
            "are; give one of the two"
        )
    if no_reference and section.kl_coef > 0:
        yield f"{name}.kl_coef: must be 0 when model.reference is none (there is nothing to compare with)"
    if no_reference and section.kl_controller == "linear":
        yield f"{name}.kl_controller: there is no KL to weigh when model.reference is none"
    if no_reference and section.reference_refresh_steps:
        yield f"{name}.reference_refresh_steps: there is no reference when model.reference is none"
    if config.model.lora is not None and section.reference_refresh_steps:
        yield f"{name}.reference_refresh_steps: not possible with model.lora, whose reference is the adapter turned off"
    penalized = section.kl_coef > 0 or section.kl_controller == "linear"  # which may rise from 0
    if section.kl_estimator == "exact" and section.kl_in == "loss" and not penalized:
        yield f"{name}.kl_estimator: exact in the loss needs {name}.kl_coef above 0"
    if section.kl_controller == "adaptive" and section.kl_coef == 0:
        yield f"{name}.kl_coef: must be above 0 for the adaptive controller, which multiplies it"
    if section.multi_objective_aggregation == "normalize_then_sum":
        no_place = f"{name}.multi_objective_aggregation: normalize_then_sum leaves no place for {name}"
        if section.missing_eos_penalty:
            yield f"{no_place}.missing_eos_penalty, which belongs to no objective; write it as a reward"
        if penalized and section.kl_in == "reward":
            yield f"{no_place}.kl_in: reward, which belongs to no objective; put it in the loss ({name}.kl_in: loss)"
    half = config.model.autocast is not None or config.model.dtype != "float32"
    if half and getattr(section, "fisher_method", None) == "finite_difference":
        yield f"{name}.fisher_method: finite_difference needs model.dtype float32 and no model.autocast"
    if sequences < 2 and getattr(section, "step_size", None) == "held_out":
        yield f"{name}.step_size: held_out needs at least 2 sequences a step, to set some aside"
    if config.rollout.num_generations < 2 and (estimator := _estimator(section)) in ("rloo", "grpo"):
        yield f"rollout.num_generations: {estimator} compares the completions of a prompt and needs at least 2"


def _options_in_use(config: Config) -> Iterator[str]:
    section, estimator = config.algorithm_config, _estimator(config.algorithm_config)
    critic = estimator in ("gae", "learned")
    uses = {  # key: what it has an effect with, and whether that is there
        "vf_coef": ("a value function", critic),
        "cliprange_value": ("a value function", critic),
        "lam": ("GAE", critic and getattr(section, "n_steps", None) is None),
        "scale_rewards": ("grpo", estimator == "grpo"),
        "held_out_fraction": ("step_size: held_out", getattr(section, "step_size", None) == "held_out"),
        "kl_target": ("kl_controller: adaptive", section.kl_controller == "adaptive"),
        "kl_horizon": ("kl_controller: adaptive or linear", section.kl_controller != "fixed"),
        "kl_coef_final": ("kl_controller: linear", section.kl_controller == "linear"),
    }
    if config.model.value_name_or_path is not None:
        if not critic:
            yield "model.value_name_or_path: has no effect without a value function"
        if (kind := config.model.value_model) != "separate":
            yield f"model.value_name_or_path: has no effect with model.value_model: {kind}; set it to separate"
    copied = config.model.lora is None and config.model.reference == "frozen"
    if config.model.offload_idle and not copied and not (critic and config.model.value_model == "separate"):
        yield (
            "model.offload_idle: has no effect without a separate critic, or a reference that is a copy, as it is "
            "without model.lora"
        )
    for key in _changed(section):
        needed, there = uses.get(key, ("", True))
        if not there:
            yield f"{config.algorithm}.{key}: has no effect without {needed}"


def _changed(section: AlgorithmConfig | VLLMConfig) -> list[str]:
    return [f.name for f in dataclasses.fields(section) if getattr(section, f.name) != getattr(type(section)(), f.name)]


def _estimator(section: AlgorithmConfig) -> str:
    return getattr(section, "adv_estimator", getattr(section, "baseline", "gae"))
