"""TRL's PPOConfig: transformers' TrainingArguments and PPO's options, with TRL's names and defaults."""

# ruff: noqa: RUF009  (`_option` is dataclasses.field)
from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from fastppo.algorithms import config as algorithms
from fastppo.config_fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat
from fastppo.errors import quote


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
    total_episodes: PositiveInt | None = _option(
        None, "Number of completions; by default num_train_epochs of the dataset."
    )
    num_ppo_epochs: PositiveInt = _option(4, "Passes over a rollout.")
    num_mini_batches: PositiveInt = _option(1, "Optimizer steps in a pass.")
    local_rollout_forward_batch_size: PositiveInt = _option(
        64, "Sequences generated, or scored without gradients, at a time."
    )
    num_sample_generations: NonNegativeInt = _option(
        10, "How often in a run completions of eval_dataset are printed; 0: never."
    )
    response_length: PositiveInt = _option(53, "Maximum number of tokens of a completion.")
    stop_token: Literal["eos"] | None = _option(None, "`eos`: the tokenizer's ends completions; by default none does.")
    stop_token_id: NonNegativeInt | None = _option(None, "Id of the token that ends a completion.")
    temperature: PositiveFloat = _option(0.7, "Divides the logits, in sampling and in scoring.")
    missing_eos_penalty: NonNegativeFloat | None = _option(
        None, "Subtracted from the score of a completion without an EOS."
    )
    whiten_rewards: bool = _option(False, "Divide rewards by their standard deviation.")
    kl_coef: NonNegativeFloat = _option(0.05, "Weight of the KL to the reference in the rewards.")
    kl_estimator: Literal["k1", "k2", "k3"] = _option("k1", "Estimator of a token's KL.")
    cliprange: NonNegativeFloat = _option(0.2, "Clip range of the probability ratio.")
    vf_coef: NonNegativeFloat = _option(0.1, "Weight of the value loss.")
    cliprange_value: PositiveFloat = _option(0.2, "Clip range around the rollout's value.")
    gamma: UnitFloat = _option(1.0, "Discount.")
    lam: UnitFloat = _option(0.95, "GAE's lambda.")
    model_adapter_name: str | None = _option(None, "Name of the trained adapter.")
    ref_adapter_name: str | None = _option(None, "Name of the reference's adapter.")
    exp_name: str = _option("ppo_config", "First part of run_name where that is not given.")
    sft_model_path: str = _option("EleutherAI/pythia-160m", "For scripts; not read here.")
    reward_model_path: str = _option("EleutherAI/pythia-160m", "For scripts; not read here.")
    dataset_num_proc: PositiveInt | None = _option(None, "For scripts; not read here.")
    ds3_gather_for_generation: bool = _option(True, "For DeepSpeed ZeRO-3, under which this trainer does not run.")

    # PPOTrainer sets these, for scripts that read them.
    world_size: int | None = _option(None, "Computed: the number of processes.")
    local_batch_size: int | None = _option(None, "Computed: completions of a rollout in one process.")
    micro_batch_size: int | None = _option(
        None, "Computed: completions of a forward and backward pass, of all processes."
    )
    batch_size: int | None = _option(None, "Computed: completions of a rollout.")
    local_mini_batch_size: int | None = _option(None, "Computed: completions of an optimizer step in one process.")
    mini_batch_size: int | None = _option(None, "Computed: completions of an optimizer step.")
    num_total_batches: int | None = _option(None, "Computed: number of rollouts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, adapter in _CHECKS.items():
            try:
                setattr(self, name, adapter.validate_python(getattr(self, name)))
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise ValueError(
                    f"{name}: {problem[0].lower()}{problem[1:]}, got {quote(getattr(self, name))}"
                ) from None
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id: give one of them")
        for name, right in computed(self).items():
            if getattr(self, name) not in (None, right):
                raise ValueError(
                    f"{name}: computed from the other options and the number of processes ({right} here), so leave it "
                    f"out; got {getattr(self, name)!r}"
                )
        self.world_size = computed(self)["world_size"]  # a property of TrainingArguments, always there

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"stop_token": self.stop_token}  # hidden there as if it were a password


# TrainingArguments' own options (float) are checked there, and what scripts alone read (str) may be anything.
_CHECKS = {
    name: TypeAdapter(hint)
    for name, hint in get_type_hints(PPOConfig, include_extras=True).items()
    if name in PPOConfig.__annotations__ and hint not in (float, str)
} | dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), TypeAdapter(PositiveInt))


def computed(args: PPOConfig) -> dict[str, int | None]:
    """The sizes that follow from the others, by TRL's names."""
    world_size = TrainingArguments.world_size.fget(args)
    local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    local_mini_batch_size = math.ceil(local_batch_size / args.num_mini_batches)
    num_total_batches = args.max_steps
    if args.max_steps <= 0:
        episodes = args.total_episodes
        num_total_batches = None if episodes is None else math.ceil(episodes / (local_batch_size * world_size))
    return {
        "world_size": world_size,
        "local_batch_size": local_batch_size,
        "micro_batch_size": args.per_device_train_batch_size * world_size,
        "batch_size": local_batch_size * world_size,
        "local_mini_batch_size": local_mini_batch_size,
        "mini_batch_size": local_mini_batch_size * world_size,
        "num_total_batches": num_total_batches,
    }


def one_rollout_per_step(args: PPOConfig, train_dataset: Any) -> PPOConfig:
    """A copy for Trainer's loop, whose batch is a whole rollout; `args` gets what TRL computes for scripts to read."""
    rollout = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rollout < args.num_mini_batches:
        raise ValueError(f"num_mini_batches: {args.num_mini_batches}, but a rollout has {rollout} completions")
    needed = rollout * args.world_size
    if not hasattr(train_dataset, "__len__"):
        raise TypeError(f"train_dataset: expected one with a length, got {type(train_dataset).__name__}")
    if len(train_dataset) < needed:
        raise ValueError(f"train_dataset: {len(train_dataset)} prompts, fewer than the {needed} of a rollout")
    if args.total_episodes is None:
        episodes = int(args.num_train_epochs * len(train_dataset))
        if args.max_steps <= 0 and episodes <= 0:
            raise ValueError(f"num_train_epochs: {args.num_train_epochs} of {len(train_dataset)} prompts is not one")
        args.total_episodes = args.max_steps * needed if args.max_steps > 0 else episodes
    for name, value in computed(args).items():
        setattr(args, name, value)
    args.run_name = args.run_name or f"{args.exp_name}__{args.seed}__{int(time.time())}"
    args = copy.copy(args)
    args.max_steps = args.num_total_batches
    args.per_device_train_batch_size = rollout
    args.gradient_accumulation_steps = 1
    args.remove_unused_columns = False
    return args


def algorithm_options(args: PPOConfig) -> algorithms.PPOConfig:
    same_name = ("num_ppo_epochs", "num_mini_batches", "vf_coef", "cliprange_value", "gamma", "lam")
    same_name += ("whiten_rewards", "kl_coef", "kl_estimator")
    options = {name: getattr(args, name) for name in same_name}
    return algorithms.PPOConfig(clip_low=args.cliprange, clip_high=args.cliprange, **options)
