"""The configuration of a run: one typed tree, the only source of options.

A YAML file fills it and ``--section.key value`` overrides it. pydantic checks every value; whatever is wrong comes back
as one line that names the key and, for a misspelt key or choice, the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fastppo.algorithms.config import (
    ActorCriticConfig,
    AlgorithmConfig,
    CPIConfig,
    NPGConfig,
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
)
from fastppo.config_fields import (
    STRICT,
    ConfigError,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.rollout.config import RolloutConfig

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]


@dataclass(config=STRICT)
class DataConfig:
    """Where prompts come from."""

    train: str = ""
    """A .jsonl, .csv or .txt file, a folder saved by `datasets`, or a Hub dataset id."""
    eval: str | None = None
    """Held-out prompts, the same choices. Without it the last `eval_size` training prompts are held out."""
    train_split: str = "train"
    eval_split: str = "test"
    eval_size: NonNegativeInt = 32
    prompt_column: str = "prompt"
    """Column with a string, or with a list of chat messages (then a chat template is applied)."""
    apply_chat_template: bool = False
    system_prompt: str | None = None
    max_prompt_length: PositiveInt = 512
    """In tokens, after the chat template."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What happens to a longer prompt. `truncate` keeps its end."""


@dataclass(config=STRICT)
class RewardConfig:
    """One named, weighted reward: a Python function or a sequence-classification model."""

    name: str
    function: str | None = None
    """`vader_sentiment`, `reasoning_gym`, `module:function` or `file.py:function`, called as f(prompts, completions,
    **columns)."""
    model: str | None = None
    """A sequence-classification model; its one logit, or that of class `label`, is the reward."""
    label: NonNegativeInt | None = None
    weight: FiniteFloat = 1.0
    """Of a constraint: where its multiplier starts."""
    threshold: FiniteFloat | None = None
    """Makes it a constraint: its mean shall not be below this, and its weight is a Lagrange multiplier."""
    multiplier_learning_rate: PositiveFloat = 0.1
    """How much a constraint's multiplier moves in a step, for each unit that its mean is from the threshold."""
    normalize: bool = False
    """Divide by a running standard deviation and subtract a running mean."""
    batch_size: PositiveInt = 32
    """Of a reward model; functions get all completions of a step at once."""


@dataclass(config=STRICT)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat = 1e-5
    value_learning_rate: PositiveFloat | None = None
    """For the value head or value model; `learning_rate` if not given."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    lr_scheduler_type: Schedule = "constant"
    """One of transformers' schedules, over the training steps."""
    warmup_steps: NonNegativeInt = 0
    """Training steps over which the rate rises to `learning_rate`."""


@dataclass(config=STRICT)
class EvalConfig:
    """Held-out prompts, sampled with a generator of their own so that evaluation never changes a run."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    num_prompts: PositiveInt = 32
    num_samples: PositiveInt = 8
    """Completions shown before and after."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """Shown as eval/<name> and never trained on: where they fall while the trained rewards rise, those are gamed."""
    perplexity: str | None = None
    """A .txt file of ordinary text, one text a line. The policy's perplexity on it shows what it forgets."""


@dataclass(config=STRICT)
class WatchRule:
    """One metric, what is wrong with it, and what is then done."""

    metric: str
    """As metrics.jsonl names it, such as policy/entropy or eval/reward."""
    above: FiniteFloat | None = None
    """Values above this are wrong."""
    below: FiniteFloat | None = None
    """Values below this are wrong."""
    relative: bool = False
    """Bound the change since the start as a share of it: 1.0 is twice what it was, -0.5 half of it. The start is the
    mean of the first `watch.baseline_steps` steps; for eval/... it is the evaluation before the first step."""
    patience: PositiveInt = 1
    """Wrong values in a row before anything is done: steps, or evaluations for eval/..."""
    action: Literal["warn", "lower_lr", "rollback", "stop"] = "warn"
    """`rollback` goes back to the newest checkpoint from before the trouble, with another random stream and a lower
    learning rate. `stop` writes a checkpoint and ends the run."""


@dataclass(config=STRICT)
class WatchConfig:
    """Rules over the metrics of a run, and what is done when one is broken."""

    defaults: bool = True
    """Watch KL, length, repetition, entropy, ratios, advantages, gradient norm, explained variance, perplexity and
    held-out rewards with bounds that only warn. A rule of yours on the same metric replaces the default one."""
    baseline_steps: PositiveInt = 5
    """First steps that relative rules compare with."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What `lower_lr` and `rollback` multiply the learning rate by."""
    max_rollbacks: NonNegativeInt = 3
    """The run stops in place of another rollback."""
    rules: list[WatchRule] = field(default_factory=list)


@dataclass(config=STRICT)
class CheckpointConfig:
    """Atomic, checksummed checkpoints (safetensors and JSON; no pickle)."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0 writes none."""
    keep_last: PositiveInt = 2


@dataclass(config=STRICT)
class Config:
    """A whole run."""

    output_dir: str = "runs/default"
    total_steps: PositiveInt = 100
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    backend: Literal["auto", "reference", "chunked", "cpu", "triton"] = "auto"
    """Who computes log-probabilities and the loss; `fastppo doctor` lists what is usable."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or Inf in a loss or gradient does: stop the run, or skip that optimizer step."""
    tensorboard: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: Literal["reinforce", "actor_critic", "ppo", "trpo", "npg", "cpi"] = "ppo"
    """How the policy learns; its options are in the section of this name."""
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    actor_critic: ActorCriticConfig = field(default_factory=ActorCriticConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    npg: NPGConfig = field(default_factory=NPGConfig)
    cpi: CPIConfig = field(default_factory=CPIConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def backend_name(self) -> str | None:
        """`backend` as the operators take it."""
        return None if self.backend == "auto" else self.backend

    @property
    def algorithm_config(self) -> AlgorithmConfig:
        """The section of the chosen algorithm."""
        return getattr(self, self.algorithm)


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file and apply ``--section.key value`` overrides.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: command-line words, ``["--ppo.kl_coef", "0.1"]`` or ``["--ppo.kl_coef=0.1"]``. Values are YAML;
            items of a list are named by their index (``--rewards.0.weight 2``).

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is not valid.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); the configuration file comes first"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    for key, text in _parse_overrides(list(overrides)):
        _set(tree, key, _override_value(key, text))
    return build_config(tree)


def build_config(tree: dict[str, Any]) -> Config:
    """Check a plain tree of dicts and lists and build the Config from it (ConfigError if anything is wrong)."""
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    check_consistency(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The tree that `build_config` makes the same Config from."""
    return dataclasses.asdict(config)


class Key(typing.NamedTuple):
    """One key of the configuration, for the help page."""

    name: str
    type: str
    default: Any
    help: str


def documented_keys() -> list[Key]:
    """Every key, dotted, in the order of the file."""
    return list(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> typing.Iterator[Key]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, hint = f"{prefix}{item.name}", hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, f"{name}.")
        elif typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            yield from _walk(typing.get_args(hint)[0], f"{name}.N.")
        elif hint == (LoraConfig | None):
            yield from _walk(LoraConfig, f"{name}.")
        else:
            default = item.default if item.default is not dataclasses.MISSING else "required"
            described = next(d for base in cls.__mro__ if (d := _description(base, item.name)) is not None)
            yield Key(name, _type_name(hint), default, " ".join(described.split()))


def _description(cls: type, name: str) -> str | None:
    """The help text of a key where `cls` itself defines it; pydantic does not hand it down to subclasses."""
    return cls.__pydantic_fields__[name].description or "" if name in vars(cls).get("__annotations__", ()) else None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    optional = "|null" if type(None) in typing.get_args(hint) else ""
    if args and typing.get_origin(hint) is not list:
        return "|".join(_type_name(arg) for arg in args) + optional
    return getattr(hint, "__name__", str(hint))


def _parse_overrides(words: list[str]) -> list[tuple[str, str]]:
    pairs = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{word!r}: expected --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key}: needs a value")
            text = words.pop(0)
        pairs.append((key.replace("-", "_"), text))
    return pairs


def _override_value(dotted: str, text: str) -> Any:
    """A value from the command line: text for a key that holds text, as it stands; YAML for any other."""
    hint: Any = Config
    for part in dotted.split("."):
        if part.isdigit():
            hint = typing.get_args(hint)[0] if typing.get_args(hint) else None
        else:
            section = next((c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)), None)
            hint = typing.get_type_hints(section).get(part) if section else None
    if hint is str or (hint == (str | None) and text != "null"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(tree: Any, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, name in enumerate(parents):
        if isinstance(tree, list):
            index = _index(tree, name, dotted)
            tree = tree[index]
        else:
            if tree.get(name) is None:
                tree[name] = {}
            tree = tree[name]
        if not isinstance(tree, dict | list):
            raise ConfigError(
                f"--{dotted}: {'.'.join(parents[: depth + 1])} is a single value and has no keys below it"
            )
    if isinstance(tree, list):
        tree[_index(tree, last, dotted)] = value
    else:
        tree[last] = value


def _index(items: list, name: str, dotted: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(f"--{dotted}: {name!r} is not an index of a list of {len(items)}")
    return int(name)


def _one_line(error: ValidationError) -> str:
    """The first thing wrong, as `key: problem`; a misspelt key or choice comes with its nearest neighbour."""
    first = error.errors()[0]
    # pydantic puts the member of a union that it tried into the path; a person knows only the keys.
    path = [str(part) for part in first["loc"] if not _is_union_member(part)]
    key = ".".join(path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_beside(path)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    given = first.get("input")
    if first["type"] == "literal_error":
        choices = [word.strip(" '\"") for word in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: {given!r} is not one of its values; {hint}(one of: {', '.join(choices)})"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key}: required, but not given"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message}, got {given!r}"


def _is_union_member(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "LoraConfig"))


def _keys_beside(path: list[str]) -> list[str]:
    """The valid keys at the level of the last part of `path`."""
    cls: Any = Config
    for part in path[:-1]:
        if part.isdigit():
            continue
        hint = typing.get_type_hints(cls)[part]
        candidates = [hint, *typing.get_args(hint)]
        cls = next(candidate for candidate in candidates if dataclasses.is_dataclass(candidate))
    return [item.name for item in dataclasses.fields(cls)]


def check_consistency(config: Config) -> None:
    """What no single field can know.

    Raises:
        ConfigError: fields that are missing or don't go together.
    """
    if not config.model.name_or_path:
        raise ConfigError("model.name_or_path: required, but not given")
    if not config.data.train:
        raise ConfigError("data.train: required, but not given")
    _check_rewards(config)
    _check_watch(config)
    if config.optim.lr_scheduler_type == "constant" and config.optim.warmup_steps:
        raise ConfigError("optim.warmup_steps: the constant schedule has no warm-up; take constant_with_warmup")
    _check_other_sections(config)
    _check_algorithm(config, config.algorithm, config.algorithm_config)


def _check_other_sections(config: Config) -> None:
    """A key of an algorithm that is not chosen would do nothing, without a sign."""
    for name in typing.get_args(typing.get_type_hints(Config)["algorithm"]):
        section = getattr(config, name)
        default = type(section)()
        for item in dataclasses.fields(section):
            if name != config.algorithm and getattr(section, item.name) != getattr(default, item.name):
                raise ConfigError(
                    f"{name}.{item.name}: has no effect, since algorithm is {config.algorithm!r}; set it in the "
                    f"section {config.algorithm!r} if it is there too, or drop the whole section with --{name} {{}}"
                )


def _has_critic(section: AlgorithmConfig) -> bool:
    return getattr(section, "adv_estimator", "gae") == "gae" and getattr(section, "baseline", "learned") == "learned"


def _is_grpo(section: AlgorithmConfig) -> bool:
    return "grpo" in (getattr(section, "adv_estimator", None), getattr(section, "baseline", None))


# What has an effect only beside something else: the key, beside what, and whether that is there.
_CONDITIONAL_KEYS = (
    ("vf_coef", "a value function", _has_critic),
    ("cliprange_value", "a value function", _has_critic),
    ("lam", "GAE", lambda section: _has_critic(section) and getattr(section, "n_steps", None) is None),
    ("scale_rewards", "grpo", _is_grpo),
    ("held_out_fraction", "step_size: held_out", lambda section: section.step_size == "held_out"),
    ("kl_target", "kl_controller: adaptive", lambda section: section.kl_controller == "adaptive"),
    ("kl_horizon", "kl_controller: adaptive or linear", lambda section: section.kl_controller != "fixed"),
    ("kl_coef_final", "kl_controller: linear", lambda section: section.kl_controller == "linear"),
)


def _check_algorithm(config: Config, name: str, section: AlgorithmConfig) -> None:
    sequences = config.rollout.num_prompts * config.rollout.num_generations
    parts = section.num_mini_batches * section.gradient_accumulation_steps
    if sequences < parts:
        raise ConfigError(
            f"{name}.num_mini_batches: {parts} parts (num_mini_batches x gradient_accumulation_steps) cannot be made "
            f"of {sequences} sequences (rollout.num_prompts x rollout.num_generations)"
        )
    if config.model.reference == "none" and section.kl_coef > 0:
        raise ConfigError(f"{name}.kl_coef: must be 0 when model.reference is none (there is nothing to compare with)")
    penalized = section.kl_coef > 0 or section.kl_controller == "linear"  # which may rise from 0
    if section.kl_estimator == "exact" and section.kl_in == "loss" and not penalized:
        raise ConfigError(f"{name}.kl_estimator: exact in the loss needs {name}.kl_coef above 0")
    if section.kl_controller == "adaptive" and section.kl_coef == 0:
        raise ConfigError(f"{name}.kl_coef: must be above 0 for the adaptive controller, which multiplies it")
    if section.kl_controller == "linear" and config.model.reference == "none":
        raise ConfigError(f"{name}.kl_controller: there is no KL to weigh when model.reference is none")
    if section.multi_objective_aggregation == "normalize_then_sum":
        shaped = ["missing_eos_penalty"] if section.missing_eos_penalty else []
        if section.kl_coef and section.kl_in == "reward":
            shaped.append("kl_in: reward")
        if shaped:
            raise ConfigError(
                f"{name}.multi_objective_aggregation: normalize_then_sum leaves no place for {name}.{shaped[0]}, which "
                "belongs to no objective"
                + (f"; put it in the loss ({name}.kl_in: loss)" if "kl" in shaped[0] else "; write it as a reward")
            )
    for key, used_by, is_used in _CONDITIONAL_KEYS:
        default = getattr(type(section)(), key, None)
        if getattr(section, key, None) != default and not is_used(section):
            raise ConfigError(f"{name}.{key}: has no effect without {used_by}")
    estimator = getattr(section, "adv_estimator", getattr(section, "baseline", None))
    if estimator in ("rloo", "grpo") and config.rollout.num_generations < 2:
        raise ConfigError(
            f"rollout.num_generations: {estimator} compares the completions of a prompt, of which it needs at least 2"
        )
    if getattr(section, "fisher_method", None) == "finite_difference" and (
        config.model.autocast is not None or config.model.dtype != "float32"
    ):
        raise ConfigError(
            f"{name}.fisher_method: finite_difference needs float32 throughout (model.dtype, and no model.autocast); "
            "differences of half-precision gradients are noise"
        )
    if getattr(section, "step_size", None) == "held_out" and sequences < 2:
        raise ConfigError(f"{name}.step_size: held_out needs at least 2 sequences a step, to set some aside")
    if section.reference_refresh_steps:
        if config.model.reference == "none":
            raise ConfigError(f"{name}.reference_refresh_steps: there is no reference when model.reference is none")
        if config.model.lora is not None:
            raise ConfigError(
                f"{name}.reference_refresh_steps: not possible with model.lora, where the reference is the policy with "
                "its adapter off"
            )


# Under eval/, where trained and held-out rewards are shown by name.
_TAKEN = {"mean", "std", "reward", "reward_std", "length", "kl", "perplexity", "perplexity_reference"}


def _check_rewards(config: Config) -> None:
    keyed = [(f"rewards.{index}", reward) for index, reward in enumerate(config.rewards)]
    keyed += [(f"eval.rewards.{index}", reward) for index, reward in enumerate(config.eval.rewards)]
    names = [reward.name for _, reward in keyed]
    for key, reward in keyed:
        if reward.name in _TAKEN:
            raise ConfigError(
                f"{key}.name: {reward.name!r} is the name of a metric already; call the reward something else"
            )
        if (reward.function is None) == (reward.model is None):
            raise ConfigError(f"{key}: give exactly one of `function` and `model`")
        if names.count(reward.name) > 1:
            raise ConfigError(f"{key}.name: {reward.name!r} is used twice; metrics are kept by name")
        if reward.threshold is None and reward.multiplier_learning_rate != RewardConfig("").multiplier_learning_rate:
            raise ConfigError(f"{key}.multiplier_learning_rate: only a constraint (`threshold`) has one")
        if reward.threshold is not None and reward.weight < 0:
            raise ConfigError(f"{key}.weight: where a multiplier starts cannot be below 0")
        trained_only = (reward.weight != 1.0, reward.normalize, reward.threshold is not None)
        if key.startswith("eval.") and not {f"{reward.name}_std", f"{reward.name}_effect"}.isdisjoint(names):
            raise ConfigError(f"{key}.name: a reward named {reward.name}_std or {reward.name}_effect hides its metrics")
        if key.startswith("eval.") and any(trained_only):
            raise ConfigError(f"{key}: a reward that is not trained on has no weight, normalization or threshold")
    if config.rewards and all(reward.threshold is not None for reward in config.rewards):
        raise ConfigError("rewards: at least one must be an objective, without a threshold")


def _check_watch(config: Config) -> None:
    for index, rule in enumerate(config.watch.rules):
        key = f"watch.rules.{index}"
        if rule.above is None and rule.below is None:
            raise ConfigError(f"{key}: give `above`, `below` or both; {rule.metric} is not bounded")
        if rule.above is not None and rule.below is not None and rule.below >= rule.above:
            raise ConfigError(f"{key}: every value is below {rule.below:g} or above {rule.above:g}")
        if rule in config.watch.rules[:index]:
            raise ConfigError(f"{key}: the same rule stands there twice")
        if rule.action == "rollback" and not config.checkpoint.every:
            raise ConfigError(f"{key}.action: rollback needs checkpoints; set checkpoint.every")
        if rule.metric.startswith("eval/") and rule.action != "warn" and not config.eval.every:
            raise ConfigError(f"{key}: {rule.metric} is known only after the last step; set eval.every")
