"""Rewards: named, weighted, checked. Python functions called as TRL calls them, and sequence-classification models.

    prompts, completions, columns ── each reward ──> raw [B] ── optional normalizer ──> · weight ── sum ──> total [B]

A function may give one number a completion, or one a token. The weight of a constraint is its Lagrange multiplier.

A reward is the one place where a user's own code runs inside a training step, so whatever it does wrong is reported
with its name, its line and the completion it happened on.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastppo.algorithms.lagrangian import LagrangeMultiplier
from fastppo.models.config import ModelConfig
from fastppo.models.load import ModelError, context_length, load_pretrained, resolve

if TYPE_CHECKING:
    from fastppo.training.config import RewardConfig

RewardFunction = Callable[..., "Sequence[float] | Sequence[Sequence[float]]"]
"""Called as f(prompts=[...], completions=[...], completion_ids=[...], **columns), lists of one length B, of which it
gets those that it names; returns B numbers, or B lists with a number for every token of completion_ids."""


class RewardError(ValueError):
    """A reward that cannot be used or gave something that is not one; the message begins with its name."""


class RewardOutput(NamedTuple):
    """Rewards of a batch, float32."""

    total: Tensor
    """[B], the weighted sum of `objectives`: what whole completions got."""
    objectives: Tensor
    """[B, K], one column a reward, normalized where that is asked for; 0 for one that is given by token."""
    weights: dict[str, float]
    """K names and the weights of this batch."""
    by_name: dict[str, Tensor]
    """[B] each, as the function gave them: neither normalized nor weighted, so that curves stay comparable. Of rewards
    by token, their sum."""
    token_objectives: Tensor | None = None
    """[B, T, K], rewards that are given by token, 0 elsewhere; None where no function does so."""


@dataclass
class Reward:
    """One reward of `RewardFunctions`."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    normalize: bool = False
    multiplier: LagrangeMultiplier | None = None
    """Of a constraint; its value stands for the weight."""


class RunningNormalizer:
    """Running mean and standard deviation of all values seen (Welford, 1962; merged by batch, Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Take in values [B], float64."""
        count = values.numel()
        if count == 0:
            return
        mean = values.mean().item()
        delta, total = mean - self.mean, self.count + count
        self.m2 += (values - mean).square().sum().item() + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def __call__(self, values: Tensor) -> Tensor:
        """(values − mean) / standard deviation [B]; where everything seen is the same, zero."""
        if self.count == 0:
            return values
        deviation = math.sqrt(self.m2 / self.count)
        # Below this a deviation is rounding, and dividing by it would turn rounding into reward.
        if deviation <= 1e-8 * max(1.0, abs(self.mean)):
            deviation = 1.0
        return (values - self.mean) / deviation

    def state_dict(self) -> dict[str, float]:
        """As JSON can hold it, without loss."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])


class RewardFunctions:
    """Several rewards as one.

    Args:
        rewards: at least one, with different names.
        device: where the results go.
    """

    def __init__(self, rewards: Sequence[Reward], *, device: torch.device | str = "cpu") -> None:
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise RewardError(f"rewards need at least one, each with a name of its own, got {names}")
        for reward in rewards:
            if not callable(reward.function):
                raise RewardError(f"reward {reward.name!r}: {reward.function!r} cannot be called")
            if not math.isfinite(reward.weight):
                raise RewardError(f"reward {reward.name!r}: its weight must be finite, got {reward.weight}")
        self.rewards = list(rewards)
        self.device = device
        self.multipliers = {reward.name: reward.multiplier for reward in rewards if reward.multiplier}
        self._normalizers = {reward.name: RunningNormalizer() for reward in rewards if reward.normalize}

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list],
        *,
        completion_ids: list[list[int]] | None = None,
        update: bool = True,
    ) -> RewardOutput:
        """Score a batch.

        Args:
            prompts: B texts.
            completions: B texts.
            columns: the prompts' other columns, B values each; a function gets those its signature names, or all if
                it takes ``**kwargs``.
            completion_ids: B lists of the completions' tokens, EOS included; needed for rewards by token.
            update: take the batch into the running normalizers, before it is normalized, and into the multipliers,
                after it is weighted. False for evaluation.

        Raises:
            RewardError: a function raised, or returned something other than B finite numbers.
        """
        given = {"completions": completions, **columns}
        if completion_ids is not None:
            given = {"completion_ids": completion_ids} | given
        for name, values in given.items():
            if len(values) != len(prompts):
                raise ValueError(f"{name} has {len(values)} values, but there are {len(prompts)} prompts")
        # Score everything before any normalizer learns of it: a step that fails leaves no trace.
        raw = {reward.name: _score(reward, {"prompts": prompts, **given}) for reward in self.rewards}
        by_token = {name: values for name, values in raw.items() if values.dim() == 2}
        raw |= {name: values.sum(1) for name, values in by_token.items()}
        weights = {
            reward.name: reward.multiplier.value if reward.multiplier else reward.weight for reward in self.rewards
        }
        whole = []
        for reward in self.rewards:
            values = raw[reward.name]
            if reward.name in by_token:
                if reward.normalize:
                    raise RewardError(f"reward {reward.name!r}: normalize is for rewards of whole completions")
                values = torch.zeros_like(values)
            elif reward.normalize:
                normalizer = self._normalizers[reward.name]
                if update:
                    normalizer.update(values)
                values = normalizer(values)
            whole.append(values)
        total = sum(weight * values for weight, values in zip(weights.values(), whole, strict=True))
        token_objectives = None
        if by_token:
            shape = next(iter(by_token.values())).shape
            parts = [by_token.get(reward.name, torch.zeros(shape)) for reward in self.rewards]
            token_objectives = torch.stack(parts, dim=2).to(self.device, torch.float32)
        if not total.abs().le(torch.finfo(torch.float32).max).all():
            raise RewardError("the weighted sum of the rewards is too large for float32; lower their weights")
        by_name = {name: values.to(self.device, torch.float32) for name, values in raw.items()}
        if update:
            for name, multiplier in self.multipliers.items():
                multiplier.update(raw[name].mean().item())
        objectives = torch.stack(whole, dim=1).to(self.device, torch.float32)
        return RewardOutput(total.to(self.device, torch.float32), objectives, weights, by_name, token_objectives)

    def check_columns(self, names: Iterable[str]) -> None:
        """Find out before the first step, rather than after its rollout, that a function wants a column there is not.

        Raises:
            RewardError: it names the column and the nearest there is.
        """
        names = list(names)
        for reward in self.rewards:
            _accepted(reward, ["prompts", "completions", "completion_ids", *names])

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """The normalizers and multipliers by reward name, as JSON can hold them."""
        return {
            "normalizers": {name: normalizer.state_dict() for name, normalizer in self._normalizers.items()},
            "multipliers": {name: multiplier.state_dict() for name, multiplier in self.multipliers.items()},
        }

    def load_state_dict(self, state: dict[str, dict[str, dict[str, float]]]) -> None:
        """Go on from `state` (RewardError if it is of other rewards)."""
        for kind, own in (("normalizers", self._normalizers), ("multipliers", self.multipliers)):
            if set(state[kind]) != set(own):
                raise RewardError(
                    f"the saved run has {kind} of the rewards {sorted(state[kind])}, this one {sorted(own)}"
                )
            for name, values in state[kind].items():
                own[name].load_state_dict(values)


def build_rewards(
    configs: Sequence[RewardConfig | RewardFunction],
    *,
    device: torch.device | str = "cpu",
    model_defaults: ModelConfig | None = None,
) -> RewardFunctions:
    """Make the rewards of a configuration.

    Args:
        configs: entries of config.rewards, or functions from code (weight 1, named as they are).
        device: where reward models run and results go.
        model_defaults: its dtype and permissions hold for reward models; float32 and none without it.

    Raises:
        RewardError: a function or model cannot be found or loaded.
    """
    rewards = []
    for config in configs:
        if callable(config):
            rewards.append(Reward(getattr(config, "__name__", type(config).__name__), config))
            continue
        if config.function is not None:
            function = find_function(config.name, config.function)
        else:
            function = ModelReward(config, device=device, defaults=model_defaults or ModelConfig())
        multiplier = None
        if config.threshold is not None:
            multiplier = LagrangeMultiplier(config.weight, config.threshold, config.multiplier_learning_rate)
        rewards.append(Reward(config.name, function, config.weight, config.normalize, multiplier))
    return RewardFunctions(rewards, device=device)


def find_function(name: str, spec: str) -> RewardFunction:
    """Find the function of reward `name`.

    Args:
        name: for messages.
        spec: ``vader_sentiment``, ``reasoning_gym``, ``module:function`` or ``path/file.py:function``; importing runs
            that code.

    Raises:
        RewardError: there is none.
    """
    if spec in _BUILT_IN:
        return _BUILT_IN[spec](name)
    where, separator, attribute = spec.rpartition(":")
    if not separator or not where or not attribute:
        raise RewardError(
            f"reward {name!r}: {spec!r} is not {', '.join(_BUILT_IN)}, module:function or path/file.py:function"
        )
    module = _from_file(name, Path(where).expanduser()) if where.endswith(".py") else _from_module(name, where)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, functions, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(functions) or 'none'}"
        raise RewardError(f"reward {name!r}: no function {attribute!r} in {where}; {hint}")
    return function


class VaderSentiment:
    """VADER's compound score of the completion, in [-1, 1] (Hutto & Gilbert, 2014): a lexicon, not a model."""

    def __init__(self, name: str) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise RewardError(f"reward {name!r}: needs vaderSentiment (pip install vaderSentiment)") from None
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, completions: list[str]) -> list[float]:
        return [self._analyzer.polarity_scores(completion)["compound"] for completion in completions]


class ReasoningGym:
    """A reasoning-gym task's own score of the completion as an answer, in [0, 1] (Stojanovski et al., 2025,
    arXiv:2505.24760): 1 for the right answer, and for many tasks a part of that for a text which contains it.

    Every prompt has two columns more: `task`, the task's name, and `entry`, the generated entry with its question,
    answer and metadata. examples/reasoning_prompts.py writes such prompts.
    """

    def __init__(self, name: str) -> None:
        try:
            from reasoning_gym import get_score_answer_fn
        except ImportError:
            raise RewardError(
                f"reward {name!r}: needs reasoning-gym (pip install 'fastppo[reasoning]', or reasoning-gym)"
            ) from None
        # A task is set up once, not for every completion.
        self._scorer = functools.lru_cache(maxsize=None)(get_score_answer_fn)

    def __call__(self, completions: list[str], task: list[str], entry: list[dict]) -> list[float]:
        return [
            float(self._scorer(name)(completion.strip(), asked))
            for completion, name, asked in zip(completions, task, entry, strict=True)
        ]


class ModelReward:
    """The logit of a sequence-classification model that reads prompt and completion as one text.

    Args:
        config: with `model`; `label` where the model has several.
        device: where it runs.
        defaults: its dtype and permissions.

    Raises:
        RewardError: it cannot be loaded, or `label` does not fit it.
    """

    def __init__(self, config: RewardConfig, *, device: torch.device | str, defaults: ModelConfig) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            source = resolve(config.model, allow_download=defaults.allow_download)
            if source.gguf_file:
                raise ModelError(f"{config.model}: a reward model cannot be a GGUF file")
            self.tokenizer = load_pretrained(AutoTokenizer, source, defaults)
            self.model = load_pretrained(
                AutoModelForSequenceClassification, source, defaults, dtype=getattr(torch, defaults.dtype)
            )
        except ModelError as error:
            raise RewardError(f"reward {config.name!r}: {error}") from error
        labels = self.model.config.num_labels
        if config.label is None and labels > 1:
            names = [f"{index} ({self.model.config.id2label.get(index)})" for index in range(labels)]
            raise RewardError(f"reward {config.name!r}: give the label of {config.model}: one of {', '.join(names)}")
        self.label = config.label or 0
        if self.label >= labels:
            raise RewardError(f"reward {config.name!r}: label {self.label}, but {config.model} has {labels}")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # A decoder finds its last token by looking for padding, so both must mean the same by it.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        # Of a text that is too long, the end is what the policy wrote.
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        self.max_length = min(self.tokenizer.model_max_length, context_length(self.model) or sys.maxsize)
        self.batch_size = config.batch_size
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            logits = self.model(**batch).logits  # [b, labels]
            scores += logits[:, self.label].float().tolist()
        return scores


_BUILT_IN = {"vader_sentiment": VaderSentiment, "reasoning_gym": ReasoningGym}


def _score(reward: Reward, arguments: dict[str, list]) -> Tensor:
    """Raw rewards [B], or by token [B, T], float64 on the CPU."""
    accepted = _accepted(reward, list(arguments))
    try:
        result = reward.function(**{name: arguments[name] for name in accepted})
    except Exception as error:
        raise RewardError(
            f"reward {reward.name!r} raised {type(error).__name__}: {error}{_line_of(reward.function, error)}"
        ) from error
    return _checked(reward.name, result, arguments["completions"], arguments.get("completion_ids"))


def _checked(name: str, result: Any, completions: list[str], completion_ids: list[list[int]] | None) -> Tensor:
    if result is None:
        raise RewardError(f"reward {name!r} returned None, expected {len(completions)} numbers")
    if hasattr(result, "tolist"):  # a tensor or array
        result = result.tolist()
    if isinstance(result, str | bytes | dict) or not isinstance(result, Iterable):
        raise RewardError(f"reward {name!r} returned {type(result).__name__}, expected a list of numbers")
    given = list(result)
    if len(given) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(given)} numbers for {len(completions)} completions")
    if completion_ids is not None and any(_is_list(item) for item in given):
        return _checked_by_token(name, given, completions, completion_ids)
    values = [_number(item) for item in given]
    for index, (item, value) in enumerate(zip(given, values, strict=True)):
        if value is None:
            raise RewardError(f"reward {name!r} gave {item!r:.60} {_at(index, completions)}, expected a number")
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise RewardError(f"reward {name!r} gave {value} {_at(index, completions)}, expected a finite number")
    return torch.tensor(values, dtype=torch.float64)


def _checked_by_token(name: str, given: list[Any], completions: list[str], completion_ids: list[list[int]]) -> Tensor:
    """[B, T] from B lists, of which each must be as long as its completion."""
    values = torch.zeros(len(given), max(map(len, completion_ids)), dtype=torch.float64)
    for index, (row, ids) in enumerate(zip(given, completion_ids, strict=True)):
        numbers_of_row = [_number(item) for item in row] if _is_list(row) else []
        if len(numbers_of_row) != len(ids):
            raise RewardError(
                f"reward {name!r} gave {row!r:.60} {_at(index, completions)}, expected {len(ids)} numbers, one for "
                "every token of completion_ids"
            )
        for item, value in zip(row, numbers_of_row, strict=True):
            if value is None or not abs(value) <= torch.finfo(torch.float32).max:
                raise RewardError(
                    f"reward {name!r} gave {item!r:.60} to a token {_at(index, completions)}, expected a finite number"
                )
        values[index, : len(ids)] = torch.tensor(numbers_of_row, dtype=torch.float64)
    return values


def _is_list(item: Any) -> bool:
    return isinstance(item, list | tuple) or getattr(item, "ndim", 0) == 1


def _number(item: Any) -> float | None:
    try:
        if hasattr(item, "item"):  # a scalar of an array library
            item = item.item()
        return float(item) if isinstance(item, numbers.Real) else None
    except (ValueError, RuntimeError, OverflowError):  # several elements, or an integer beyond all floats
        return None


def _at(index: int, completions: list[str]) -> str:
    text = completions[index]
    return f"for completion {index}, {text if len(text) <= 60 else text[:57] + '...'!r}"


def _accepted(reward: Reward, offered: list[str]) -> list[str]:
    """Which of the offered arguments the function takes (RewardError if it needs others)."""
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return [name for name in offered if name in ("prompts", "completions")]
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if required and (parameter not in by_name or parameter.name not in offered):
            near = difflib.get_close_matches(parameter.name, offered, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it can have {', '.join(offered)}, by name"
            raise RewardError(f"reward {reward.name!r}: its function needs {parameter.name!r}; {hint}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    names = {parameter.name for parameter in by_name}
    return [name for name in offered if name in names]


def _line_of(function: Any, error: BaseException) -> str:
    """Where in the function's own file the error passed through last, as ` (file.py, line 3: code)`."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    own = code and code.co_filename
    frame, found = error.__traceback__, None
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == own:
            found = frame
        frame = frame.tb_next
    if found is None:
        return ""
    line = linecache.getline(own, found.tb_lineno).strip()
    return f" ({Path(own).name}, line {found.tb_lineno}{': ' + line if line else ''})"


def _from_module(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise RewardError(
                f"reward {name!r}: no module {module!r} is installed; for a file, write its path: {module}.py:..."
            ) from None
        raise RewardError(f"reward {name!r}: importing {module} failed ({error})") from error
    except Exception as error:
        raise RewardError(f"reward {name!r}: importing {module} raised {type(error).__name__}: {error}") from error


def _from_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"reward {name!r}: {path}: no such file")
    # Two files of one name must not be taken for each other, nor for an installed module.
    key = f"_fastppo_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses and typing look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise RewardError(f"reward {name!r}: running {path} raised {type(error).__name__}: {error}") from error
    return module
