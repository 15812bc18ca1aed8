"""The watch: every rule fires on a history that breaks it, and is silent on one that does not."""

from __future__ import annotations

import json
import math
import random

import pytest

from fastppo.training.config import WatchConfig, WatchRule
from fastppo.training.watch import DEFAULT_RULES, Watch

HEALTHY = {
    "reward/mean": lambda t: 0.2 + 0.02 * t,
    "reward/std": lambda t: 0.4,
    "kl/reference": lambda t: 0.2 * t,
    "kl/reference_per_token": lambda t: 0.01 * t,
    "completion/length": lambda t: 20.0,
    "text/distinct_2": lambda t: 0.8 - 0.002 * t,
    "text/repetition": lambda t: 0.05,
    "policy/entropy": lambda t: 3.0 - 0.02 * t,
    "policy/ratio_max": lambda t: 1.5,
    "rollout/logprob_gap_mean": lambda t: -0.01,
    "advantage/extreme": lambda t: 4.0,
    "grad_norm": lambda t: 1.0,
    "value/explained_variance": lambda t: -5.0 + 2.0 * t if t < 3 else 0.4,
    "eval/perplexity": lambda t: 20.0 + 0.02 * t,
    "eval/quality": lambda t: 0.5,
    "eval/quality_std": lambda t: 0.3,
}
# From step 20 on, or for an evaluation the first after it.
TROUBLE = {
    "kl/reference_per_token": lambda t: 1.5,
    "reward/gain_per_sqrt_kl": ("reward/mean", lambda t: -0.1),
    "completion/length": lambda t: 45.0,
    "text/distinct_2": lambda t: 0.2,
    "text/repetition": lambda t: 0.7,
    "policy/entropy": lambda t: 0.2,
    "policy/ratio_max": lambda t: 90.0,
    "rollout/logprob_gap_mean": lambda t: -0.08,
    "advantage/extreme": lambda t: 30.0,
    "grad_norm": lambda t: 50.0,
    "value/explained_variance": lambda t: -3.0,
    "eval/perplexity": lambda t: 40.0,
    "eval/quality_effect": ("eval/quality", lambda t: 0.2),
}


def run(watch: Watch, steps: int, *, trouble: dict | None = None, begins: int = 20, noise: float = 0.0) -> list:
    """Observe `steps` steps, with an evaluation before the first and after every fifth."""
    alarms = []

    def values(step: int, evaluation: bool) -> dict[str, float]:
        made = {}
        for name, healthy in HEALTHY.items():
            if name.startswith("eval/") == evaluation:
                f = trouble[name] if trouble and step >= begins and name in trouble else healthy
                made[name] = f(step) * (1 + noise * random.uniform(-1, 1))
        return made

    alarms += watch.observe(0, values(0, True))[1]
    for step in range(1, steps + 1):
        alarms += watch.observe(step, values(step, False))[1]
        if step % 5 == 0:
            alarms += watch.observe(step, values(step, True))[1]
    return alarms


def test_a_healthy_run_raises_nothing():
    assert run(Watch(WatchConfig(), held_out=["quality"]), 60, noise=0.05) == []


@pytest.mark.parametrize("metric", TROUBLE)
def test_each_default_rule_warns_once_of_its_trouble(metric):
    made = TROUBLE[metric]
    broken = {made[0]: made[1]} if isinstance(made, tuple) else {metric: made}
    watch = Watch(WatchConfig(), held_out=["quality"])
    alarms = run(watch, 60, trouble=broken)
    assert [(alarm.metric, alarm.action) for alarm in alarms] == [(metric, "warn")]
    patience = next((rule.patience for rule in DEFAULT_RULES if rule.metric == metric), 1)
    expected = 20 if metric.startswith("eval/") else 20 + patience - 1
    assert alarms[0].step == expected
    assert alarms[0].good_step == (15 if metric.startswith("eval/") else 18)
    assert watch.alarms == alarms


def test_every_default_rule_is_tried_here():
    rules = Watch(WatchConfig(), held_out=["quality"]).rules
    assert {rule.metric for rule in rules} == set(TROUBLE)
    assert all(rule.action == "warn" for rule in rules)


def only(**rule) -> Watch:
    return Watch(WatchConfig(defaults=False, baseline_steps=2, rules=[WatchRule(**rule)]))


def steps_of(watch: Watch, metric: str, values: list[float], start: int = 1) -> list[int]:
    return [a.step for step, v in enumerate(values, start) for a in watch.observe(step, {metric: v})[1]]


def test_patience_counts_values_in_a_row():
    assert steps_of(only(metric="x", above=1.0, patience=3), "x", [2, 2, 0, 2, 2, 2, 2]) == [6]
    assert steps_of(only(metric="x", above=1.0), "x", [1.0, 1.0 + 1e-9]) == [2]
    assert steps_of(only(metric="x", below=-1.0, above=1.0, patience=2), "x", [-2, 2]) == [2]


def test_a_missing_value_or_nan_neither_counts_nor_clears():
    watch = only(metric="x", above=1.0, patience=2)
    assert steps_of(watch, "x", [2.0, math.nan]) == []
    assert watch.observe(3, {"y": 0.0})[1] == []
    assert len(watch.observe(4, {"x": math.inf})[1]) == 1


def test_a_warning_comes_again_only_after_recovery_and_an_action_after_its_patience():
    values = [2, 2, 2, 2, 0, 2, 2]
    assert steps_of(only(metric="x", above=1.0, patience=2), "x", values) == [2, 7]
    assert steps_of(only(metric="x", above=1.0, patience=2, action="lower_lr"), "x", values) == [2, 4, 7]


def test_relative_bounds_are_of_the_first_steps_and_work_for_negative_values():
    watch = only(metric="x", above=1.0, below=-0.5, relative=True)
    assert steps_of(watch, "x", [-1.0, -3.0, -2.0, 0.1, -3.0, -3.1]) == [4, 6]  # the start is -2: allowed is -3 to 0
    assert "+105% from -2 at the start is above +100%" in watch.alarms[0].reason
    zero = only(metric="x", above=1.0, relative=True)
    assert steps_of(zero, "x", [0.0, 0.0, 5.0]) == []  # there is no share of zero


def test_own_rules_replace_the_default_ones_on_their_metric():
    rules = Watch(WatchConfig(rules=[WatchRule("grad_norm", above=5.0)])).rules
    assert [(r.above, r.relative) for r in rules if r.metric == "grad_norm"] == [(5.0, False)]
    assert len(rules) == len(DEFAULT_RULES)


def test_names_that_never_come_are_known():
    watch = Watch(WatchConfig(rules=[WatchRule("grad_nrom", above=5.0), WatchRule("grad_norm", above=5.0)]))
    watch.observe(1, {"grad_norm": 1.0})
    assert watch.unseen() == ["grad_nrom"]


def test_reward_is_held_against_kl():
    watch = Watch(WatchConfig(baseline_steps=2))
    watch.observe(1, {"reward/mean": 0.0, "kl/reference": 0.0})
    assert "reward/gain_per_sqrt_kl" not in watch.observe(2, {"reward/mean": 1.0, "kl/reference": 0.01})[0]
    derived, _ = watch.observe(3, {"reward/mean": 2.0, "kl/reference": 4.0})
    assert derived["reward/gain_per_sqrt_kl"] == pytest.approx((2.0 - 0.5) / 2.0)


def test_what_follows_from_the_metrics_has_a_start_to_compare_with_too():
    rule = WatchRule("reward/gain_per_sqrt_kl", below=-0.5, relative=True)
    watch = Watch(WatchConfig(defaults=False, baseline_steps=2, rules=[rule]))
    rewards = [0.0, 0.0, 1.0, 1.0, 0.6, 0.2]
    alarms = [
        a.step for t, r in enumerate(rewards, 1) for a in watch.observe(t, {"reward/mean": r, "kl/reference": 1.0})[1]
    ]
    assert alarms == [6]


def test_the_state_is_json_and_goes_on_to_the_same_alarms():
    rules = [
        WatchRule("completion/length", above=0.5, relative=True, patience=4, action="rollback"),
        WatchRule("text/repetition", above=0.06, patience=2, action="lower_lr"),
    ]
    config = WatchConfig(rules=rules)
    seed, trouble = random.random(), {"completion/length": lambda t: 40.0}

    def history(cut: int | None) -> tuple[list, dict]:
        random.seed(seed)
        watch = Watch(config)
        for step in range(1, 41):
            values = {n: f(step) * random.uniform(0.5, 1.5) for n, f in (HEALTHY | trouble).items() if "eval" not in n}
            watch.observe(step, values)
            if step == cut:
                state = json.loads(json.dumps(watch.state_dict()))
                watch = Watch(config)
                watch.load_state_dict(state)
        return watch.alarms, watch.state_dict()

    assert history(None) == history(random.randrange(1, 40))


def test_rules_may_change_when_a_run_goes_on():
    saved = only(metric="x", above=1.0, patience=2)
    steps_of(saved, "x", [2.0])
    other = only(metric="x", above=1.0, patience=2, action="stop")
    other.load_state_dict(saved.state_dict())
    assert steps_of(other, "x", [2.0, 2.0], start=2) == [3]


def test_a_rollback_keeps_what_happened_and_lowers_what_it_goes_back_to():
    watch = Watch(WatchConfig(defaults=False, rules=[WatchRule("x", above=1.0, patience=2, action="rollback")]))
    steps_of(watch, "x", [0.0] * 4)
    early = watch.state_dict()
    watch.lr_scale = 0.5  # lowered once since
    [alarm] = [a for step in (5, 6) for a in watch.observe(step, {"x": 3.0})[1]]
    assert (alarm.step, alarm.good_step, alarm.action) == (6, 3, "rollback")
    assert watch.good_steps == {3}
    before = watch.state_dict()
    watch.load_state_dict(early)
    assert watch.rolled_back(before, 0.5) == 0.25
    assert (watch.rollbacks, watch.lr_scale, watch.alarms) == (1, 0.25, [alarm])
    # To where the first rollback has left its mark, only the second's factor is missing.
    assert watch.rolled_back(watch.state_dict(), 0.5) == 0.5
    assert (watch.rollbacks, watch.lr_scale) == (2, 0.125)


def test_no_rollback_rule_wants_no_old_checkpoint():
    assert Watch(WatchConfig()).good_steps == set()
