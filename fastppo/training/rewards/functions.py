"""Call named, weighted reward functions as TRL does, check what they return, and sum it.

    prompts, completions, columns ── each function ──> raw [B] ── optional normalizer ──> · weight ── sum ──> total [B]

A function returns one number per completion or one per token. The weight of a constraint is its Lagrange multiplier.
Rewards are user code that runs inside a training step, so an error names the reward, its line and the completion.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastppo.algorithms.lagrangian import LagrangeMultiplier
from fastppo.errors import FastPPOError, did_you_mean, one_line, quote
from fastppo.ops.checks import NonFiniteValue

RewardFunction = Callable[..., "Sequence[float] | Sequence[Sequence[float]]"]
"""f(prompts=[...], completions=[...], completion_ids=[...], **columns): B values each. A function is passed those
arguments that its signature names, or all of them if it takes ``**kwargs``. It returns B numbers, or B lists with one
number for every token of completion_ids."""


class RewardError(FastPPOError, ValueError):
    """A reward cannot be loaded, or raised an exception, or returned something invalid; the message names it."""


class NonFiniteReward(RewardError, NonFiniteValue):
    """A reward is NaN or infinite, or too large for float32."""


class RewardOutput(NamedTuple):
    """Rewards of a batch, float32."""

    total: Tensor
    """[B], the weighted sum of `objectives`. Per-token rewards are not in it."""
    objectives: Tensor
    """[B, K], one column per reward, normalized where the configuration asks for it; 0 for a per-token reward."""
    weights: dict[str, float]
    """The K rewards' names and their weights in this batch."""
    by_name: dict[str, Tensor]
    """[B] each, as the function returned them: neither normalized nor weighted, so that curves stay comparable. The
    sum over tokens for a per-token reward."""
    token_objectives: Tensor | None = None
    """[B, T, K], per-token rewards, 0 elsewhere; None if no function returned any."""


@dataclass
class Reward:
    """One reward of `RewardFunctions`."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    normalize: bool = False
    multiplier: LagrangeMultiplier | None = None
    """For a constraint; its value replaces `weight`."""


class RunningNormalizer:
    """Running mean and standard deviation of all values seen (Welford, 1962; merged by batch, Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Add values [B], float64."""
        count = values.numel()
        if count == 0:
            return
        mean = values.mean().item()
        delta, total = mean - self.mean, self.count + count
        self.m2 += (values - mean).square().sum().item() + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def __call__(self, values: Tensor) -> Tensor:
        """(values − mean) / standard deviation [B]; values − mean while all values seen are equal."""
        if self.count == 0:
            return values
        deviation = math.sqrt(self.m2 / self.count)
        # A smaller deviation is rounding error, and dividing by it would amplify that to rewards of size one.
        if deviation <= 1e-8 * max(1.0, abs(self.mean)):
            deviation = 1.0
        return (values - self.mean) / deviation

    def state_dict(self) -> dict[str, float]:
        """The statistics, as JSON can hold them without loss."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state`; raises ValueError if no values have such statistics."""
        if not (state["count"] >= 0 and state["m2"] >= 0):
            raise ValueError(f"count and m2 are at least 0, got {state['count']} and {state['m2']}")
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


class RewardFunctions:
    """Several rewards as one.

    Args:
        rewards: at least one, with different names.
        device: device that results are moved to.
    """

    def __init__(self, rewards: Sequence[Reward], *, device: torch.device | str = "cpu") -> None:
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise RewardError(f"rewards: expected at least one, each with a name of its own, got {names}")
        self.rewards, self.device = list(rewards), device
        self.multipliers = {reward.name: reward.multiplier for reward in rewards if reward.multiplier}
        self._normalizers = {reward.name: RunningNormalizer() for reward in rewards if reward.normalize}
        self._parts = {"normalizers": self._normalizers, "multipliers": self.multipliers}

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list],
        *,
        completion_ids: list[list[int]] | None = None,
        update: bool = True,
        gather: Callable[[Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = lambda call: call(),
    ) -> RewardOutput:
        """Score a batch.

        Args:
            prompts: B texts.
            completions: B texts.
            columns: the prompts' other columns, B values each.
            completion_ids: B lists of the completions' tokens, EOS included; per-token rewards need them.
            update: update the running normalizers before they are applied, and the multipliers after. False for
                evaluation.
            gather: calls what calls the functions, each named, and returns their values of the whole batch, of which
                this one may be a rank's share; so is the result.

        Raises:
            RewardError: a function raised, or returned something other than B finite numbers.
            NonFiniteValue: a number, a sum or a multiplier is not finite; normalizers may have changed.
        """
        arguments = {"prompts": prompts, "completions": completions, **columns}
        if completion_ids is not None:
            arguments["completion_ids"] = completion_ids
        for name, values in arguments.items():
            if len(values) != len(prompts):
                raise ValueError(f"{name} has {len(values)} values, but there are {len(prompts)} prompts")
        # Call every function before any normalizer is updated: a failing step changes no state.
        raw = gather(lambda: {reward.name: _call(reward, arguments) for reward in self.rewards})
        by_token = {name: values for name, values in raw.items() if values.dim() == 2}
        for name in by_token.keys() & self._normalizers.keys():
            raise RewardError(f"reward {name!r}: normalize is for rewards of whole completions")
        raw |= {name: values.sum(1) for name, values in by_token.items()}
        whole = raw | {name: torch.zeros_like(raw[name]) for name in by_token}
        for name, normalizer in self._normalizers.items():
            if update:
                normalizer.update(whole[name])
            whole[name] = normalizer(whole[name])
        weights = {r.name: r.multiplier.value if r.multiplier else r.weight for r in self.rewards}
        total = sum(weight * whole[name] for name, weight in weights.items())
        if update:
            for name, multiplier in self.multipliers.items():
                try:
                    multiplier.update(raw[name].mean().item())
                except FloatingPointError as error:
                    raise NonFiniteReward(f"reward {name!r}: {error}") from None

        def result(values: Tensor) -> Tensor:
            if not values.abs().le(torch.finfo(torch.float32).max).all():
                raise NonFiniteReward("the weighted sum of the rewards, or one over tokens, is too large for float32")
            return values.to(self.device, torch.float32)

        token_objectives = None
        if by_token:
            zeros = torch.zeros_like(next(iter(by_token.values())))
            token_objectives = result(torch.stack([by_token.get(name, zeros) for name in raw], dim=2))
        by_name = {name: result(values) for name, values in raw.items()}
        objectives = result(torch.stack(list(whole.values()), dim=1))
        return RewardOutput(result(total), objectives, weights, by_name, token_objectives)

    def check_columns(self, names: Iterable[str]) -> None:
        """Check that the prompts have every column that a function requires, before the first rollout.

        Raises:
            RewardError: a column is missing; the message names it and the nearest name there is.
        """
        offered = ["prompts", "completions", "completion_ids", *names]
        for reward in self.rewards:
            _accepted(reward, offered)

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """The states of normalizers and multipliers by reward name, as JSON can hold them."""
        return {kind: {name: part.state_dict() for name, part in own.items()} for kind, own in self._parts.items()}

    def load_state_dict(self, state: dict[str, dict[str, dict[str, float]]]) -> None:
        """Restore `state`; raises RewardError if it belongs to other rewards."""
        for kind, own in self._parts.items():
            saved = state[kind]
            if saved.keys() != own.keys():
                raise RewardError(f"the saved run has {kind} of the rewards {sorted(saved)}, this one {sorted(own)}")
            for name, values in saved.items():
                own[name].load_state_dict(values)


def _call(reward: Reward, arguments: dict[str, list]) -> Tensor:
    """Raw rewards [B], or per token [B, T], float64 on the CPU."""
    # A function that changes its arguments must not change those of the next one, or the samples.
    given = {name: [copy.copy(value) for value in arguments[name]] for name in _accepted(reward, list(arguments))}
    completions = arguments["completions"]
    try:
        result = reward.function(**given)
        if hasattr(result, "tolist"):  # a tensor or array
            result = result.tolist()
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that nobody awaited it
        elif isinstance(result, Iterable) and not isinstance(result, str | bytes | Mapping | Set):
            # Runs the rest of a generator, which may be endless.
            result = list(itertools.islice(result, len(completions) + 1))
        return _checked(result, completions, arguments.get("completion_ids"))
    except _BadResult as error:
        bad = error.kind(f"reward {quote(reward.name)} {error}{_place(reward.function)}")
        bad.row = error.row
        raise bad from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() and asyncio's CancelledError are no Exception
        raise RewardError(
            f"reward {quote(reward.name)} raised {describe(error)}{_place(reward.function, error)}"
        ) from error


def _accepted(reward: Reward, offered: list[str]) -> list[str]:
    """The offered arguments that the function takes; raises RewardError if it requires another."""
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except Exception:  # some built-in callables have no signature, and that of others is code of their own
        return [name for name in offered if name in ("prompts", "completions")]
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in parameters:
        required = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if required and p.name not in by_name.intersection(offered):
            hint = did_you_mean(p.name, offered, otherwise="it can have, by name:")
            raise RewardError(f"reward {quote(reward.name)}: its function needs {p.name!r}{hint}")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [name for name in offered if takes_all or name in by_name]


class _BadResult(Exception):
    """What a reward function returned is no reward: for which completion, and the RewardError to raise."""

    def __init__(self, text: str, kind: type[RewardError] = RewardError, row: int | None = None) -> None:
        super().__init__(text)
        self.kind, self.row = kind, row


def _checked(result: Any, completions: list[str], completion_ids: list[list[int]] | None) -> Tensor:
    """The returned numbers as [B], or as [B, T] where each is a list as long as its completion."""
    count = len(completions)
    if not isinstance(result, list):
        hint = "; write it without async" if inspect.iscoroutine(result) or inspect.isasyncgen(result) else ""
        raise _BadResult(f"returned {type(result).__name__}, expected a list of {count} numbers{hint}")
    if len(result) != count:
        many = len(result) if len(result) < count else f"more than {count}"
        raise _BadResult(f"returned {many} numbers for {count} completions")

    def check(good: bool, item: Any, index: int, expected: str, kind: type[RewardError] = RewardError) -> None:
        if not good:
            text = quote(completions[index], 60)
            raise _BadResult(f"gave {quote(item)} for completion {index}, {text}, expected {expected}", kind, index)

    by_token = completion_ids is not None and any(map(_is_list, result))
    rows = []
    for index, item in enumerate(result):
        if by_token:
            size = len(completion_ids[index])
            check(_is_list(item) and len(item) == size, item, index, f"{size} numbers, one for every token")
        row = [_number(value) for value in (item if by_token else [item])]
        expected, largest = "finite numbers" if by_token else "a finite number", torch.finfo(torch.float32).max
        check(None not in row, item, index, expected)
        check(all(abs(value) <= largest for value in row), item, index, expected, NonFiniteReward)
        rows.append(torch.tensor(row, dtype=torch.float64))
    padded = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.float64)
    return padded if by_token else padded[:, 0]


def _is_list(item: Any) -> bool:
    return isinstance(item, list | tuple) or getattr(item, "ndim", 0) == 1


def _number(item: Any) -> float | None:
    """The item as a float; None if it is no number."""
    try:
        if hasattr(item, "item"):  # a scalar of an array library
            item = item.item()
        return float(item) if isinstance(item, numbers.Real) else None
    except OverflowError:  # an integer too large for a float
        return math.inf
    except Exception:  # several elements, no data, or whatever a class of its own raises
        return None


def describe(error: BaseException) -> str:
    """`TypeName: text`, in one line."""
    name, text = type(error).__name__, one_line(error, 200)
    return name if text == name else f"{name}: {text}"


def _place(function: Any, error: BaseException | None = None) -> str:
    """Where the function is, as ` (file.py, line 3)`; after an error, the last line of its file that this passed."""
    try:
        code = inspect.unwrap(function if hasattr(function, "__code__") else type(function).__call__).__code__
    except Exception:  # a builtin has none, and the attributes of others raise what they like
        return ""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [frame for frame in frames if frame.filename == code.co_filename]
    line, text = (own[-1].lineno, own[-1].line) if own else (code.co_firstlineno, "")
    return f" ({Path(code.co_filename).name}, line {line}{text and ': ' + one_line(text, 80)})"
