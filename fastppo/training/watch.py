"""Watching a run for trouble: rules over its metrics, and the alarms they raise.

    metrics of a step or an evaluation ──> what follows from them ──> every rule ──> alarms

A rule names a metric, bounds it, waits for `patience` observations in a row outside the bounds, and says what is then
done. Nothing here acts: the trainer does. What is remembered is JSON and part of a checkpoint, so that a resumed run
raises the alarms of one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.training.config import WatchConfig, WatchRule

# What begins so is measured in evaluations, of which the first is that of the policy before any step.
_EVAL = "eval/"
# Below this KL (nats a completion) the reward's gain over its square root is noise over noise.
_LEAST_KL = 0.1

DEFAULT_RULES = (
    WatchRule("kl/reference_per_token", above=1.0, patience=3),
    WatchRule("reward/gain_per_sqrt_kl", below=0.0, patience=10),
    WatchRule("completion/length", above=1.0, below=-0.6, relative=True, patience=5),
    WatchRule("text/distinct_2", below=-0.5, relative=True, patience=3),
    WatchRule("text/repetition", above=0.5, patience=3),
    WatchRule("policy/entropy", below=-0.8, relative=True, patience=3),
    WatchRule("policy/ratio_max", above=20.0, patience=3),
    WatchRule("advantage/extreme", above=20.0, patience=3),
    WatchRule("grad_norm", above=9.0, relative=True, patience=3),
    WatchRule("value/explained_variance", below=-1.0, patience=20),
    WatchRule("eval/perplexity", above=0.5, relative=True),
)
"""What is watched unless `watch.defaults` is false. All of it only warns: what is trouble depends on the task."""


@dataclass
class Alarm:
    """A rule that was broken for long enough."""

    step: int
    metric: str
    value: float
    reason: str
    """In words: the metric, its value and the bound."""
    action: str
    """What the rule asks for: warn, lower_lr, rollback or stop."""
    good_step: int
    """The last step whose policy the rule had nothing to say against; a rollback goes no later than there."""
    outcome: str = ""
    """What was done about it, in words; the trainer fills it in."""


@dataclass
class _RuleState:
    broken: int = 0
    """Observations in a row outside the bounds."""
    good_step: int = 0
    warned: bool = False
    """A warning is given once, until the metric has been inside the bounds again."""


@dataclass
class _Baseline:
    """The mean of a metric's first observations."""

    wanted: int
    count: int = 0
    mean: float = 0.0

    @property
    def complete(self) -> bool:
        return self.count >= self.wanted

    def update(self, value: float) -> None:
        self.count += 1
        self.mean += (value - self.mean) / self.count


class Watch:
    """The rules of a run and what they remember.

    Args:
        config: the `watch` section of the configuration.
        held_out: names of rewards that are evaluated and not trained on; each is watched for a fall.
    """

    alarms: list[Alarm]
    """Every alarm of the run, also of steps that were rolled back."""
    rollbacks: int
    """How many there were."""
    lr_scale: float
    """The product of all factors by which the learning rate was lowered."""

    def __init__(self, config: WatchConfig, *, held_out: Sequence[str] = ()) -> None:
        self.config, self.held_out = config, list(held_out)
        self.alarms, self.rollbacks, self.lr_scale = [], 0, 1.0
        self.rules = [*config.rules]
        if config.defaults:
            given = {rule.metric for rule in config.rules}
            fall = [WatchRule(f"{_EVAL}{name}_effect", below=-0.5) for name in self.held_out]
            # A rule of the user's own on a metric takes the place of the default one.
            self.rules += [rule for rule in (*DEFAULT_RULES, *fall) if rule.metric not in given]
        self._states = {_key(rule): _RuleState() for rule in self.rules}
        compared = {rule.metric for rule in self.rules if rule.relative} | {"reward/mean"}
        compared |= {f"{_EVAL}{name}{part}" for name in self.held_out for part in ("", "_std")}
        self._baselines = {
            name: _Baseline(1 if name.startswith(_EVAL) else config.baseline_steps) for name in sorted(compared)
        }
        self._seen: set[str] = {"reward/gain_per_sqrt_kl"}

    def observe(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """Take in the metrics of a step, or of the evaluation after it.

        Args:
            step: steps that are done. At 0, before the first, nothing is judged: what comes is there to compare with.
            metrics: name to value. A rule whose metric is not among them, or is NaN, is left as it was.

        Returns:
            Metrics that follow from these and the first ones (see `_derive`), and the alarms raised; `alarms` keeps
            them too.
        """
        self._compare_with(metrics)
        derived = self._derive(metrics)
        self._compare_with(derived)
        self._seen.update(metrics, derived)
        raised = []
        for rule in self.rules:
            value = metrics.get(rule.metric, derived.get(rule.metric, math.nan))
            if step > 0 and not math.isnan(value):
                raised += self._judge(rule, step, value)
        self.alarms += raised
        return derived, raised

    def _compare_with(self, metrics: Mapping[str, float]) -> None:
        for name, baseline in self._baselines.items():
            if not baseline.complete and math.isfinite(metrics.get(name, math.nan)):
                baseline.update(metrics[name])

    def _derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What needs the run's beginning to be computed.

        reward/gain_per_sqrt_kl: the reward gained since the first steps, by the square root of the KL to the reference
        in nats a completion. Gains are near proportional to that root at first, and bend down as the reward is
        overoptimized (Gao et al., 2022, arXiv:2210.10760).

        eval/<name>_effect: how far a held-out reward has moved since the first evaluation, in standard deviations of
        its values there.
        """
        derived = {}
        reward, kl, start = metrics.get("reward/mean"), metrics.get("kl/reference"), self._baselines["reward/mean"]
        if reward is not None and kl is not None and kl > _LEAST_KL and start.complete:
            derived["reward/gain_per_sqrt_kl"] = (reward - start.mean) / math.sqrt(kl)
        for name in self.held_out:
            mean, deviation = (self._baselines[f"{_EVAL}{name}{part}"] for part in ("", "_std"))
            if f"{_EVAL}{name}" in metrics and mean.complete and deviation.complete:
                # Where all values were the same at first, a change is measured as it is.
                derived[f"{_EVAL}{name}_effect"] = (metrics[f"{_EVAL}{name}"] - mean.mean) / (deviation.mean or 1.0)
        return derived

    def _judge(self, rule: WatchRule, step: int, value: float) -> list[Alarm]:
        state, compared, against = self._states[_key(rule)], value, ""
        if rule.relative:
            baseline = self._baselines[rule.metric]
            if not baseline.complete or baseline.mean == 0.0:
                return []
            compared = (value - baseline.mean) / abs(baseline.mean)
            against = f", {compared:+.0%} from {baseline.mean:.4g} at the start"
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
        # What was done gets as long to show as the trouble had.
        state.broken, state.warned = 0, True
        bound = rule.above if too_high else rule.below
        reason = (
            f"{rule.metric} {value:.4g}{against} is {'above' if too_high else 'below'} "
            f"{f'{bound:+.0%}' if rule.relative else f'{bound:g}'}"
        )
        if rule.patience > 1:
            reason += f", {rule.patience} times in a row"
        return [Alarm(step, rule.metric, value, reason, rule.action, state.good_step)]

    @property
    def good_steps(self) -> set[int]:
        """Of each of these a rollback may need the newest checkpoint that is no later; none without such rules."""
        return {self._states[_key(rule)].good_step for rule in self.rules if rule.action == "rollback"}

    def unseen(self) -> list[str]:
        """Metrics that the configuration's own rules name and that have not come yet."""
        return sorted({rule.metric for rule in self.config.rules} - self._seen)

    def rolled_back(self, before: dict[str, Any], factor: float) -> float:
        """After an earlier state was loaded: take back what a rollback does not undo, and count it.

        Args:
            before: the state before the rollback; its alarms, rollbacks and learning rate's history stay.
            factor: what this rollback multiplies the learning rate by.

        Returns:
            What the learning rate of the earlier state is to be multiplied by for that.
        """
        earlier = self.lr_scale
        self.alarms = [Alarm(**alarm) for alarm in before["alarms"]]
        self.rollbacks, self.lr_scale = before["rollbacks"] + 1, before["lr_scale"] * factor
        return self.lr_scale / earlier

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "rules": {key: dataclasses.asdict(state) for key, state in self._states.items()},
            "baselines": {
                name: {"count": baseline.count, "mean": baseline.mean} for name, baseline in self._baselines.items()
            },
            "alarms": [dataclasses.asdict(alarm) for alarm in self.alarms],
            "rollbacks": self.rollbacks,
            "lr_scale": self.lr_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Rules may have changed since: one that is new begins anew."""
        for key in self._states:
            self._states[key] = _RuleState(**state["rules"].get(key, {}))
        for name, baseline in self._baselines.items():
            saved = state["baselines"].get(name, {"count": 0, "mean": 0.0})
            baseline.count, baseline.mean = saved["count"], saved["mean"]
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.rollbacks, self.lr_scale = state["rollbacks"], state["lr_scale"]


def _key(rule: WatchRule) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(rule).items())


def gravest(alarms: Sequence[Alarm]) -> str:
    """The action that outweighs the others': warn < lower_lr < rollback < stop."""
    return max((alarm.action for alarm in alarms), key=("warn", "lower_lr", "rollback", "stop").index)
