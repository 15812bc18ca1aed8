"""Watch a run for trouble: rules over its metrics, and the alarms that they raise.

    metrics of a step or an evaluation ──> derived metrics ──> every rule ──> alarms

A rule names a metric and its bounds, waits for `patience` observations in a row outside of them, and names an action,
which the trainer carries out. The state is part of a checkpoint: a resumed run raises the same alarms as one that was
never stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from fastppo.config_fields import NonNegativeInt, PositiveFloat
from fastppo.training.config import WatchConfig, WatchRule

_EVAL = "eval/"  # metrics of evaluations, the first of which is before any step
_LEAST_KL = 0.1  # nats per completion; below it, the reward's gain over the KL's square root is noise over noise

DEFAULT_RULES = (
    WatchRule("kl/reference_per_token", above=1.0, patience=3),
    WatchRule("reward/gain_per_sqrt_kl", below=0.0, patience=10),
    WatchRule("completion/length", above=1.0, below=-0.6, relative=True, patience=5),
    WatchRule("text/distinct_2", below=-0.5, relative=True, patience=3),
    WatchRule("text/repetition", above=0.5, patience=3),
    WatchRule("policy/entropy", below=-0.8, relative=True, patience=3),
    WatchRule("policy/ratio_max", above=20.0, patience=3),
    WatchRule("rollout/logprob_gap_mean", above=0.05, below=-0.05, patience=3),
    WatchRule("advantage/extreme", above=20.0, patience=3),
    WatchRule("grad_norm", above=9.0, relative=True, patience=3),
    WatchRule("value/explained_variance", below=-1.0, patience=20),
    WatchRule("eval/perplexity", above=0.5, relative=True),
)
"""The rules of every run unless `watch.defaults` is false. They only warn: what is trouble depends on the task."""


@dataclass
class Alarm:
    """A rule was broken `patience` times in a row."""

    step: int
    metric: str
    value: float
    reason: str
    """In words: the metric, its value and the bound."""
    action: str
    """The rule's action: warn, lower_lr, rollback or stop."""
    good_step: int
    """The last step at which the metric was within its bounds; a rollback goes there or further back."""
    outcome: str = ""
    """What was done about it, in words; the trainer fills it in."""


@dataclass
class _RuleState:
    broken: int = 0
    """Observations in a row outside the bounds."""
    good_step: int = 0
    warned: bool = False
    """Whether a warning was given since the metric was last within the bounds."""


@dataclass
class _Baseline:
    count: int
    mean: float


@dataclass
class _State:
    """What `Watch.state_dict` returns."""

    rules: dict[str, _RuleState]
    baselines: dict[str, _Baseline]
    alarms: list[Alarm]
    rollbacks: NonNegativeInt
    lr_scale: PositiveFloat


class Watch:
    """The rules of a run and their state.

    Args:
        config: the `watch` section of the configuration.
        held_out: names of the rewards that are logged but not optimized; each is watched for a fall.
    """

    alarms: list[Alarm]
    """Every alarm of the run, also of steps that were rolled back."""
    rollbacks: int
    """Number of rollbacks."""
    lr_scale: float
    """Product of all factors that the learning rate was lowered by."""

    def __init__(self, config: WatchConfig, *, held_out: Sequence[str] = ()) -> None:
        self.config, self.held_out = config, list(held_out)
        self.alarms, self.rollbacks, self.lr_scale = [], 0, 1.0
        self.rules = [*config.rules]
        if config.defaults:
            given = {rule.metric for rule in config.rules}
            fall = [WatchRule(f"{_EVAL}{name}_effect", below=-0.5) for name in self.held_out]
            # A rule of the configuration replaces the default one on the same metric.
            self.rules += [rule for rule in (*DEFAULT_RULES, *fall) if rule.metric not in given]
        self._states = {_key(rule): _RuleState() for rule in self.rules}
        compared = {rule.metric for rule in self.rules if rule.relative} | {"reward/mean"}
        compared |= {f"{_EVAL}{name}{part}" for name in self.held_out for part in ("", "_std")}
        self._baselines = {name: {"count": 0, "mean": 0.0} for name in sorted(compared)}
        """The mean of each metric's first observations."""
        self._seen: set[str] = {"reward/gain_per_sqrt_kl"}

    def observe(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """Judge the metrics of a step, or of the evaluation after it.

        Args:
            step: steps that are done. At 0, before the first, values only enter the baselines.
            metrics: name to value. A rule whose metric is missing or NaN keeps its state.

        Returns:
            Metrics derived from these and the first ones (see `_derive`), and the alarms raised, which `alarms` keeps.
        """
        self._update_baselines(metrics)
        derived = self._derive(metrics)
        self._update_baselines(derived)
        self._seen.update(metrics, derived)
        raised = []
        for rule in self.rules:
            value = metrics.get(rule.metric, derived.get(rule.metric, math.nan))
            if step > 0 and not math.isnan(value):
                raised += self._judge(rule, step, value)
        self.alarms += raised
        return derived, raised

    def _update_baselines(self, metrics: Mapping[str, float]) -> None:
        for name, baseline in self._baselines.items():
            if self._baseline(name) is None and math.isfinite(metrics.get(name, math.nan)):
                baseline["count"] += 1
                baseline["mean"] += (metrics[name] - baseline["mean"]) / baseline["count"]

    def _baseline(self, name: str) -> float | None:
        """The mean of a metric's first observations, once there are enough of them."""
        wanted = 1 if name.startswith(_EVAL) else self.config.baseline_steps
        return self._baselines[name]["mean"] if self._baselines[name]["count"] >= wanted else None

    def _derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that compare with the start of the run.

        reward/gain_per_sqrt_kl: the reward gained since the first steps, divided by the square root of the KL to the
        reference in nats per completion. The gain is nearly proportional to that root at first, and less once the
        reward is overoptimized (Gao et al., 2022, arXiv:2210.10760).

        eval/<name>_effect: the change of a held-out reward since the first evaluation, in standard deviations of its
        values there.
        """
        derived = {}
        kl, start = metrics.get("kl/reference", 0.0), self._baseline("reward/mean")
        if "reward/mean" in metrics and kl > _LEAST_KL and start is not None:
            derived["reward/gain_per_sqrt_kl"] = (metrics["reward/mean"] - start) / math.sqrt(kl)
        for name in (f"{_EVAL}{reward}" for reward in self.held_out):
            mean, deviation = self._baseline(name), self._baseline(f"{name}_std")
            if name in metrics and mean is not None and deviation is not None:
                # Where all values were equal at first, the change itself.
                derived[f"{name}_effect"] = (metrics[name] - mean) / (deviation or 1.0)
        return derived

    def _judge(self, rule: WatchRule, step: int, value: float) -> list[Alarm]:
        state, compared, against = self._states[_key(rule)], value, ""
        if rule.relative:
            start = self._baseline(rule.metric)
            if not start:  # not known yet, or zero
                return []
            compared = (value - start) / abs(start)
            against = f", {compared:+.0%} from {start:.4g} at the start"
        too_high = rule.above is not None and compared > rule.above
        too_low = rule.below is not None and compared < rule.below
        if not (too_high or too_low):
            state.broken, state.warned = 0, False
            # A step's metrics are of the policy before its update, an evaluation's of the one after.
            state.good_step = step if rule.metric.startswith(_EVAL) else step - 1
            return []
        state.broken += 1
        if state.broken < rule.patience or (rule.action == "warn" and state.warned):
            return []
        # The action gets as many observations to show effect as the trouble had.
        state.broken, state.warned = 0, True
        side, bound = ("above", rule.above) if too_high else ("below", rule.below)
        reason = f"{rule.metric} {value:.4g}{against} is {side} {bound:{'+.0%' if rule.relative else 'g'}}"
        if rule.patience > 1:
            reason += f", {rule.patience} times in a row"
        return [Alarm(step, rule.metric, value, reason, rule.action, state.good_step)]

    @property
    def good_steps(self) -> set[int]:
        """Steps of which a rollback may need the newest checkpoint that is no later; none without such rules."""
        return {self._states[_key(rule)].good_step for rule in self.rules if rule.action == "rollback"}

    def unseen(self) -> list[str]:
        """Metrics that rules of the configuration name and that no step or evaluation has had yet."""
        return sorted({rule.metric for rule in self.config.rules} - self._seen)

    def rolled_back(self, before: dict[str, Any], factor: float) -> float:
        """Count a rollback, after the earlier state was loaded, and restore what a rollback does not undo.

        Args:
            before: the state before the rollback; its alarms, rollbacks and lowered learning rate are kept.
            factor: factor by which this rollback lowers the learning rate.

        Returns:
            Factor to multiply the earlier state's learning rate by.
        """
        earlier = self.lr_scale
        self.alarms = [Alarm(**alarm) for alarm in before["alarms"]]
        self.rollbacks, self.lr_scale = before["rollbacks"] + 1, before["lr_scale"] * factor
        return self.lr_scale / earlier

    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON can hold it."""
        return {
            "rules": {key: dataclasses.asdict(state) for key, state in self._states.items()},
            "baselines": copy.deepcopy(self._baselines),
            "alarms": [dataclasses.asdict(alarm) for alarm in self.alarms],
            "rollbacks": self.rollbacks,
            "lr_scale": self.lr_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`. Rules may have changed since: a new one starts anew.

        Raises:
            pydantic.ValidationError: it is no such state.
        """
        saved = TypeAdapter(_State).validate_python(state)
        self._states = {key: saved.rules.get(key, _RuleState()) for key in self._states}
        for name, baseline in self._baselines.items():
            baseline.update(dataclasses.asdict(saved.baselines.get(name, _Baseline(0, 0.0))))
        self.alarms, self.rollbacks, self.lr_scale = saved.alarms, saved.rollbacks, saved.lr_scale


def _key(rule: WatchRule) -> str:
    """A rule's name in the state."""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(rule).items())


def most_severe(alarms: Sequence[Alarm]) -> str:
    """The most severe action of the alarms: warn < lower_lr < rollback < stop."""
    return max((alarm.action for alarm in alarms), key=("warn", "lower_lr", "rollback", "stop").index, default="warn")
