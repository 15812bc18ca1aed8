"""A run's configuration: its sections, and `load_config`, which reads them from a YAML file and the command line.

The sections of the algorithms, models and rollouts stand beside what they configure. Rules between keys are in
`config_rules`, the pages of `fastppo keys` in `config_keys`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
import typing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fastppo.algorithms import config as algorithms
from fastppo.config_fields import (
    STRICT,
    AnyPath,
    AnyText,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Text,
)
from fastppo.errors import ConfigError, did_you_mean, one_line, quote
from fastppo.models.config import ModelConfig
from fastppo.rollout.config import RolloutConfig
from fastppo.training.config_rules import check_consistency
from fastppo.training.files import read_text, why_unreadable

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
Algorithm = Literal["reinforce", "actor_critic", "ppo", "trpo", "npg", "cpi"]
ALGORITHMS: tuple[str, ...] = typing.get_args(Algorithm)
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
_MAX_BYTES = 2**18  # far beyond any configuration; PyYAML takes minutes for more
# Keys of earlier versions, and what to write instead.
_REPLACED = {
    "tensorboard": "replaced by report_to; write `report_to: tensorboard` for true, `report_to: none` for false",
    "ppo.importance_sampling_cap": "replaced by rollout.correction; write `correction: truncate` and `correction_max:` "
    "with this number in the rollout section, or leave it out for null",
}

_TRUNCATED = (
    "would leave tokens out of the distribution that completions are sampled from, while the losses normalize over the "
    "whole vocabulary and never hold its logits; leave it out, or lower rollout.temperature"
)
# Keys of `rollout` that other libraries have, and why there are none here.
_REFUSED = {
    "rollout.top_p": _TRUNCATED,
    "rollout.top_k": _TRUNCATED,
    "rollout.min_p": _TRUNCATED,
    "rollout.repetition_penalty": (
        "would sample from another distribution than the one that is trained; leave it out, and lower the reward of "
        "completions that repeat themselves"
    ),
    "rollout.min_new_tokens": (
        "would ban EOS at first, so sample from another distribution than the one that is trained; leave it out, and "
        "lower the reward of short completions, whose tokens a reward function receives as completion_ids"
    ),
}


def _tracker_list(given: Any) -> Any:
    return [] if given in ("none", ["none"], None) else given if isinstance(given, list | tuple) else [given]


@dataclass(config=STRICT)
class DataConfig:
    """Where prompts come from."""

    train: AnyPath = ""
    """Training prompts: a .jsonl, .csv or .txt file, a folder saved by `datasets`, or a Hub dataset id."""
    eval: PathText | None = None
    """Held-out prompts, from the same kinds of source. Default: the last `eval_size` training prompts."""
    train_split: AnyText = "train"
    """Split of a `datasets` folder or Hub dataset; for held-out prompts, `eval_split`."""
    eval_split: AnyText = "test"
    eval_size: NonNegativeInt = 32
    prompt_column: AnyText = "prompt"
    """Column with a string, or with a list of chat messages, to which the chat template is always applied."""
    apply_chat_template: bool = False
    """Treat a string as the message of a user and apply the tokenizer's chat template."""
    system_prompt: AnyText | None = None
    """System message for chats that do not begin with one."""
    max_prompt_length: PositiveInt = 512
    """Maximum length in tokens, chat template included."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What to do with longer prompts: raise an error, keep their last tokens, or leave them out."""


@dataclass(config=STRICT)
class BatchConfig:
    """How many tokens a forward or backward pass of a model takes. It changes memory and speed, not the result."""

    max_tokens: PositiveInt | None = None
    """Most tokens, prompts included, of the sequences in one pass of one process. Sequences are sorted by length and
    packed without padding where the model allows it; elsewhere padding counts. null counts sequences:
    `gradient_accumulation_steps` passes."""


@dataclass(config=STRICT)
class RewardConfig:
    """A named, weighted reward: a Python function or a sequence-classification model."""

    name: Text
    function: PathText | None = None
    """`vader_sentiment`, `reasoning_gym`, `module:f` or `file.py:f`, called as f(prompts, completions, **columns)."""
    model: PathText | None = None
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

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`paged_...` lets the states move to the host's memory when the GPU's is full."""
    learning_rate: PositiveFloat = 1e-5
    value_learning_rate: PositiveFloat | None = None
    """Learning rate of the value head or value model. Default: `learning_rate`."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.999
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
    perplexity: PathText | None = None
    """A .txt file with one text a line. A rising perplexity of the policy on ordinary text shows forgetting."""


@dataclass(config=STRICT)
class WatchRule:
    """Bounds for one metric, exclusive, and the action on values `above` or `below` them."""

    metric: Text
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
    """Warn about unusual KL, length, repetition, entropy, ratios, sampler, advantages, gradient norm, explained
    variance, perplexity and held-out rewards. A rule of yours on the same metric replaces the default one."""
    baseline_steps: PositiveInt = 5
    """Number of first steps that relative rules compare with."""
    lr_factor: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.5
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
class DistributedConfig:
    """How several processes, started by torchrun, share the models. One process heeds none of it."""

    strategy: Literal["auto", "fsdp2", "replicate"] = "auto"
    """`fsdp2` shards parameters, gradients and optimizer states; `replicate` keeps copies on every rank. `auto`
    replicates with model.lora, and shards otherwise."""
    cpu_offload: bool = False
    """With fsdp2: keep the shards and the optimizer's states in the host's memory."""


@dataclass(config=STRICT)
class Config:
    """A whole run."""

    output_dir: PathText = "runs/default"
    """Folder for checkpoints, metrics, the final policy and the report."""
    total_steps: PositiveInt = 100
    seed: NonNegativeInt = 0
    device: AnyText = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    backend: Literal["auto", "reference", "chunked", "cpu", "triton"] = "auto"
    """Implementation of log-probabilities and losses. `fastppo doctor` lists the usable ones."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a NaN or Inf: stop the run, or skip the optimizer step, training step or evaluation that it is in."""
    report_to: Annotated[list[Tracker], BeforeValidator(_tracker_list)] = field(default_factory=lambda: ["tensorboard"])
    """`tensorboard`, `trackio`, `wandb`, `mlflow`: one, a list, or `none`. They use the network only if the environment
    asks for it: WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID."""
    project: Text = "fastppo"
    """Project of trackio and wandb; experiment of mlflow."""
    run_name: Text | None = None
    """Name of the run in the trackers. Default: the last part of `output_dir`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
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
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def backend_name(self) -> str | None:
        """`backend` as the operators take it."""
        return None if self.backend == "auto" else self.backend

    @property
    def algorithm_config(self) -> algorithms.AlgorithmConfig:
        """The section of the chosen algorithm."""
        return getattr(self, self.algorithm)


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error; PyYAML would use the last one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Mark] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in first:
                problem = f"{quote(name)} is given twice, first in line {first[name].line + 1}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[name] = key.start_mark
        return node


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark and error.problem:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {one_line(error.problem)}"
    return one_line(error)


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file and apply ``--section.key value`` overrides.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: command-line words, ``["--ppo.kl_coef", "0.1"]`` or ``["--ppo.kl_coef=0.1"]``. Values are YAML, but
            for keys that hold text, which is taken as it is. Items of a list are named by their index
            (``--rewards.0.weight 2``).

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is not valid.
    """
    tree: Any = {}
    if path is not None:
        try:
            text = read_text(path, _MAX_BYTES)
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({why_unreadable(error)}); the configuration file comes first"
            raise ConfigError(f"{path or quote(path)}: {problem}") from None
        try:
            tree = yaml.load(text, _Loader) or {}
        except Exception as error:  # PyYAML lets through what int() and datetime raise, and a RecursionError
            raise ConfigError(f"{path}: not valid YAML ({_yaml_problem(error)})") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    words = iter(overrides)
    for word in words:
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{quote(word)}: expected --section.key value")
        if not equals and ((text := next(words, None)) is None or text.startswith("--")):
            raise ConfigError(
                f"--{key}: needs a value, as every key of `fastppo keys` does; one that begins with -- follows a ="
            )
        _override(tree, key.replace("-", "_"), text)
    return build_config(tree)


to_dict = dataclasses.asdict  # the tree that `build_config` builds the same Config from


def build_config(tree: dict[str, Any]) -> Config:
    """Check a plain tree of dicts and lists and build the Config from it.

    Raises:
        ConfigError: a key is unknown or a value is not valid.
    """
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None
    check_consistency(config)
    return config


def _override(tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set one key of a tree that is not checked yet."""
    node, hint, parts = tree, Config, dotted.split(".")
    for depth, part in enumerate(parts, 1):
        if isinstance(node, list):
            if part not in map(str, range(len(node))):
                raise ConfigError(f"--{dotted}: {quote(part)} is not an index of a list of {len(node)}")
            part = int(part)
        elif not isinstance(node, dict) or not (hint is None or section_of(hint)):
            above = ".".join(parts[: depth - 1])
            raise ConfigError(f"--{dotted}: {above} is a single value and has no keys below it")
        hint = type_below(hint, part)
        if depth < len(parts):
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = [] if typing.get_origin(hint) is list else {}
            node[part] = copy.copy(node[part])  # an alias in the YAML file may put the same object elsewhere too
            node = node[part]
    if hint is not str and (hint != (str | None) or text == "null"):
        with contextlib.suppress(Exception):  # text that is not YAML stays text; see load_config
            text = yaml.load(text, _Loader)
    node[part] = text


def _first_problem(error: ValidationError) -> str:
    """The first problem as `key: problem`; a misspelt key or choice comes with its nearest neighbour."""
    first = error.errors()[0]
    path, hint, known = [], Config, []
    for part in first["loc"]:
        if section := section_of(hint):
            known = [item.name for item in dataclasses.fields(section)]
        if section or isinstance(part, int):  # else the member of a union that pydantic tried, which is no key
            path, hint = [*path, str(part)], type_below(hint, part)
    key, given, problem = ".".join(path), first.get("input"), first["type"]
    if problem == "unexpected_keyword_argument":
        if known_elsewhere := (_REPLACED | _REFUSED).get(key):
            return f"{key}: {known_elsewhere}"
        hint = did_you_mean(path[-1], known, ".".join([*path[:-1], ""]), otherwise="known here:")
        return f"{key}: unknown key{hint}"
    if problem == "literal_error":
        choices = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        hint = did_you_mean(given, choices) if isinstance(given, str) else ""
        return f"{key}: {quote(given)} is not one of {', '.join(choices)}{hint}"
    if problem == "missing":
        return f"{key}: required, but not given"
    if problem == "dataclass_type":
        return f"{key}: expected keys and their values, got {quote(given)}"
    text = re.sub(r"[\d.]{9,}$", lambda bound: f"{float(bound[0]):g}", first["msg"])
    return f"{key and f'{key}: '}{text[0].lower()}{text[1:]}, got {quote(given)}"


def section_of(hint: Any) -> type | None:
    """The section's class in the type `Section`, `Section | None` or `list[Section]`; None for a plain value."""
    return next((member for member in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(member)), None)


def type_below(hint: Any, part: str | int) -> Any:
    """The type of the item or key `part` in a value of type `hint`; None if it has none."""
    if isinstance(part, int):
        return next(iter(typing.get_args(hint)), None)
    section = section_of(hint)
    return _type_hints(section).get(part) if section else None


_type_hints = functools.cache(typing.get_type_hints)
