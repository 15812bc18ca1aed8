"""The sections of the configuration; the algorithms', models' and rollouts' stand beside what they configure."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastppo.algorithms import config as algorithms
from fastppo.config_fields import STRICT, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from fastppo.models.config import ModelConfig
from fastppo.rollout.config import RolloutConfig

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
Algorithm = Literal["reinforce", "actor_critic", "ppo", "trpo", "npg", "cpi"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)


@dataclass(config=STRICT)
class DataConfig:
    """Where prompts come from."""

    train: str = ""
    """Training prompts: a .jsonl, .csv or .txt file, a folder saved by `datasets`, or a Hub dataset id."""
    eval: str | None = None
    """Held-out prompts, from the same kinds of source. Default: the last `eval_size` training prompts."""
    train_split: str = "train"
    """Split of a `datasets` folder or Hub dataset; for held-out prompts, `eval_split`."""
    eval_split: str = "test"
    eval_size: NonNegativeInt = 32
    prompt_column: str = "prompt"
    """Column with a string, or with a list of chat messages, to which the chat template is always applied."""
    apply_chat_template: bool = False
    """Treat a string as the message of a user and apply the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message for chats that do not begin with one."""
    max_prompt_length: PositiveInt = 512
    """Maximum length in tokens, chat template included."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What to do with longer prompts: raise an error, keep their last tokens, or leave them out."""


@dataclass(config=STRICT)
class RewardConfig:
    """A named, weighted reward: a Python function or a sequence-classification model."""

    name: str
    function: str | None = None
    """`vader_sentiment`, `reasoning_gym`, `module:f` or `file.py:f`, called as f(prompts, completions, **columns)."""
    model: str | None = None
    """Sequence-classification model. The reward is its only logit, or the logit of class `label`."""
    label: NonNegativeInt | None = None
    weight: FiniteFloat = 1.0
    """Weight in the sum of rewards. For a constraint, the initial value of its multiplier."""
    threshold: FiniteFloat | None = None
    """Lower bound for the reward's mean. Turns the reward into a constraint, weighted by a Lagrange multiplier."""
    multiplier_learning_rate: PositiveFloat = 0.1
    """Step size of a constraint's multiplier, per unit of distance between mean and threshold."""
    normalize: bool = False
    """Subtract the running mean and divide by the running standard deviation."""
    batch_size: PositiveInt = 32
    """Batch size of a reward model. Functions are called once with all completions of a step."""


@dataclass(config=STRICT)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat = 1e-5
    value_learning_rate: PositiveFloat | None = None
    """Learning rate of the value head or value model. Default: `learning_rate`."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient's norm to this; null does not clip."""
    lr_scheduler_type: Schedule = "constant"
    """Learning-rate schedule of transformers, over the training steps."""
    warmup_steps: NonNegativeInt = 0


@dataclass(config=STRICT)
class EvalConfig:
    """Evaluation on held-out prompts. It samples from its own random stream and so never changes training."""

    every: NonNegativeInt = 0
    """Evaluate every so many steps, besides before the first and after the last. 0: only these two."""
    num_prompts: PositiveInt = 32
    num_samples: PositiveInt = 8
    """Completions saved by each evaluation, for the report."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """Rewards that are logged as eval/<name> but not optimized. If they fall while the others rise, those are gamed."""
    perplexity: str | None = None
    """A .txt file with one text a line. A rising perplexity of the policy on ordinary text shows forgetting."""


@dataclass(config=STRICT)
class WatchRule:
    """Bounds for one metric, exclusive, and the action on values `above` or `below` them."""

    metric: str
    """Name in metrics.jsonl, such as policy/entropy or eval/reward."""
    above: FiniteFloat | None = None
    below: FiniteFloat | None = None
    relative: bool = False
    """Bound the relative change since the start: 1.0 is twice the start, -0.5 half of it. The start is the mean of the
    first `watch.baseline_steps` steps; for eval/... it is the evaluation before the first step."""
    patience: PositiveInt = 1
    """Number of values in a row outside the bounds before the action: steps, or evaluations for eval/..."""
    action: Literal["warn", "lower_lr", "rollback", "stop"] = "warn"
    """`lower_lr` lowers the learning rate. `rollback` also restores the newest checkpoint from before the first such
    value and changes the random stream. `stop` writes a checkpoint and ends the run."""


@dataclass(config=STRICT)
class WatchConfig:
    """Rules for the metrics of a run."""

    defaults: bool = True
    """Warn about unusual KL, length, repetition, entropy, ratios, advantages, gradient norm, explained variance,
    perplexity and held-out rewards. A rule of yours on the same metric replaces the default one."""
    baseline_steps: PositiveInt = 5
    """Number of first steps that relative rules compare with."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor by which `lower_lr` and `rollback` multiply the learning rate."""
    max_rollbacks: NonNegativeInt = 3
    """After this many rollbacks, the next one stops the run instead."""
    rules: list[WatchRule] = field(default_factory=list)


@dataclass(config=STRICT)
class CheckpointConfig:
    """Atomic, checksummed checkpoints in safetensors and JSON, without pickle."""

    every: NonNegativeInt = 10
    """Save a checkpoint every so many steps; 0 saves none."""
    keep_last: PositiveInt = 2


@dataclass(config=STRICT)
class Config:
    """A whole run."""

    output_dir: str = "runs/default"
    """Folder for checkpoints, metrics, the final policy and the report."""
    total_steps: PositiveInt = 100
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    backend: Literal["auto", "reference", "chunked", "cpu", "triton"] = "auto"
    """Implementation of log-probabilities and losses. `fastppo doctor` lists the usable ones."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On NaN or Inf in a loss or gradient: stop the run, or skip the optimizer step."""
    tensorboard: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: Algorithm = "ppo"
    """The learning algorithm. The section of the same name holds its options."""
    reinforce: algorithms.ReinforceConfig = field(default_factory=algorithms.ReinforceConfig)
    actor_critic: algorithms.ActorCriticConfig = field(default_factory=algorithms.ActorCriticConfig)
    ppo: algorithms.PPOConfig = field(default_factory=algorithms.PPOConfig)
    trpo: algorithms.TRPOConfig = field(default_factory=algorithms.TRPOConfig)
    npg: algorithms.NPGConfig = field(default_factory=algorithms.NPGConfig)
    cpi: algorithms.CPIConfig = field(default_factory=algorithms.CPIConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def backend_name(self) -> str | None:
        """`backend` as the operators take it."""
        return None if self.backend == "auto" else self.backend

    @property
    def algorithm_config(self) -> algorithms.AlgorithmConfig:
        """The section of the chosen algorithm."""
        return getattr(self, self.algorithm)
