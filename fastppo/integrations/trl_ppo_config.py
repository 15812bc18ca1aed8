"""TRL's PPOConfig: transformers' TrainingArguments and PPO's options, with TRL's names and defaults."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from fastppo.algorithms import config as algorithms


def _option(default: Any, explanation: str) -> Any:
    return field(default=default, metadata={"help": explanation})  # for transformers.HfArgumentParser


@dataclass
class PPOConfig(TrainingArguments):
    """transformers' TrainingArguments and PPO's options, with TRL's names and defaults.

    A step (`logging_steps`, `save_steps`, `eval_steps`, `max_steps`) is a rollout of ``per_device_train_batch_size ·
    gradient_accumulation_steps`` prompts in each process.
    """

    learning_rate: float = _option(3e-6, "Initial learning rate of both models.")
    logging_steps: float = _option(10, "Rollouts between two logs.")
    total_episodes: int | None = _option(None, "Number of completions; by default num_train_epochs of the dataset.")
    num_ppo_epochs: int = _option(4, "Passes over a rollout.")
    num_mini_batches: int = _option(1, "Optimizer steps in a pass.")
    local_rollout_forward_batch_size: int = _option(64, "Sequences generated, or scored without gradients, at a time.")
    num_sample_generations: int = _option(10, "How often in a run completions of eval_dataset are printed; 0: never.")
    response_length: int = _option(53, "Maximum number of tokens of a completion.")
    stop_token: Literal["eos"] | None = _option(None, "`eos`: the tokenizer's ends completions; by default none does.")
    stop_token_id: int | None = _option(None, "Id of the token that ends a completion.")
    temperature: float = _option(0.7, "Divides the logits, in sampling and in scoring.")
    missing_eos_penalty: float | None = _option(None, "Subtracted from the score of a completion without an EOS.")
    whiten_rewards: bool = _option(False, "Divide rewards by their standard deviation.")
    kl_coef: float = _option(0.05, "Weight of the KL to the reference in the rewards.")
    kl_estimator: Literal["k1", "k2", "k3"] = _option("k1", "Estimator of a token's KL.")
    cliprange: float = _option(0.2, "Clip range of the probability ratio.")
    vf_coef: float = _option(0.1, "Weight of the value loss.")
    cliprange_value: float = _option(0.2, "Clip range around the rollout's value.")
    gamma: float = _option(1.0, "Discount.")
    lam: float = _option(0.95, "GAE's lambda.")
    model_adapter_name: str | None = _option(None, "Name of the trained adapter.")
    ref_adapter_name: str | None = _option(None, "Name of the reference's adapter.")
    exp_name: str = _option("ppo_config", "For scripts; not read here.")
    sft_model_path: str = _option("EleutherAI/pythia-160m", "For scripts; not read here.")
    reward_model_path: str = _option("EleutherAI/pythia-160m", "For scripts; not read here.")
    dataset_num_proc: int | None = _option(None, "For scripts; not read here.")
    ds3_gather_for_generation: bool = _option(True, "For old scripts; has no effect.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_token not in (None, "eos"):
            raise ValueError(f"stop_token: expected 'eos' or None, got {self.stop_token!r}")
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id: give one of them")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {self.kl_estimator!r}")
        for name in ("total_episodes", "local_rollout_forward_batch_size", "response_length", "temperature"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        algorithm_options(self)  # checks the others


def one_rollout_per_step(args: PPOConfig, train_dataset: Any) -> PPOConfig:
    """A copy for Trainer's loop, whose batch is a whole rollout."""
    rollout = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rollout < args.num_mini_batches:
        raise ValueError(f"num_mini_batches: {args.num_mini_batches}, but a rollout has {rollout} completions")
    needed = rollout * args.world_size
    if len(train_dataset) < needed:
        raise ValueError(f"train_dataset: {len(train_dataset)} prompts, fewer than the {needed} of a rollout")
    args = copy.copy(args)
    if args.max_steps <= 0:
        episodes = args.total_episodes or int(args.num_train_epochs * len(train_dataset))
        args.max_steps = math.ceil(episodes / needed)
    args.per_device_train_batch_size = rollout
    args.gradient_accumulation_steps = 1
    args.remove_unused_columns = False
    return args


def algorithm_options(args: PPOConfig) -> algorithms.PPOConfig:
    same_name = ("num_ppo_epochs", "num_mini_batches", "vf_coef", "cliprange_value", "gamma", "lam")
    same_name += ("whiten_rewards", "kl_coef", "kl_estimator")
    options = {name: getattr(args, name) for name in same_name}
    return algorithms.PPOConfig(clip_low=args.cliprange, clip_high=args.cliprange, **options)
