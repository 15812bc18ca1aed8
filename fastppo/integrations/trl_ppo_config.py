"""TRL's PPOConfig: transformers' TrainingArguments and PPO's options, with TRL's names and defaults."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastppo.algorithms import config as algorithms
from fastppo.integrations.patching import require
from fastppo.integrations.transformers import SUPPORTED

require("transformers", SUPPORTED)

from transformers import TrainingArguments  # noqa: E402


@dataclass
class PPOConfig(TrainingArguments):
    """transformers' TrainingArguments and PPO's options, with TRL's names and defaults.

    A step (`logging_steps`, `save_steps`, `eval_steps`, `max_steps`) is a rollout of ``per_device_train_batch_size ·
    gradient_accumulation_steps`` prompts in each process.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of both models."})
    logging_steps: float = field(default=10, metadata={"help": "Rollouts between two logs."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Number of completions; by default num_train_epochs of the dataset."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in a pass."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Sequences generated, or scored without gradients, at a time."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "How often in a run completions of eval_dataset are printed; 0: never."}
    )
    response_length: int = field(default=53, metadata={"help": "Maximum number of tokens of a completion."})
    stop_token: Literal["eos"] | None = field(
        default=None, metadata={"help": "`eos`: the tokenizer's EOS ends a completion; None: only its length does."}
    )
    stop_token_id: int | None = field(default=None, metadata={"help": "Id of the token that ends a completion."})
    temperature: float = field(default=0.7, metadata={"help": "Divides the logits, in sampling and in scoring."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion without an EOS."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Divide rewards by their standard deviation."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in the rewards."})
    kl_estimator: Literal["k1", "k2", "k3"] = field(default="k1", metadata={"help": "Estimator of a token's KL."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range around the rollout's value."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "Name of the trained adapter."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "Name of the reference's adapter."})
    sft_model_path: str = field(default="EleutherAI/pythia-160m", metadata={"help": "For scripts; not read here."})
    reward_model_path: str = field(default="EleutherAI/pythia-160m", metadata={"help": "For scripts; not read here."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "For scripts; not read here."})
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "For old scripts; has no effect."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_token not in (None, "eos"):
            raise ValueError(f"stop_token: expected 'eos' or None, got {self.stop_token!r}")
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id: give one of them")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {self.kl_estimator!r}")
        positive = ("num_ppo_epochs", "num_mini_batches", "local_rollout_forward_batch_size", "response_length")
        for name in (*positive, "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")


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
    args.gradient_checkpointing = False  # it is on already, in both models
    return args


def algorithm_options(args: PPOConfig) -> algorithms.PPOConfig:
    same_name = ("num_ppo_epochs", "num_mini_batches", "vf_coef", "cliprange_value", "gamma", "lam")
    same_name += ("whiten_rewards", "kl_coef", "kl_estimator")
    options = {name: getattr(args, name) for name in same_name}
    return algorithms.PPOConfig(clip_low=args.cliprange, clip_high=args.cliprange, **options)
