"""How the coefficient of the KL penalty moves during a run."""

from __future__ import annotations

import math

from fastppo.ops.checks import NonFiniteValue, checked


class FixedKLController:
    """A coefficient that stays what it is."""

    @checked
    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    @checked
    def update(self, current_kl: float, num_sequences: int) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class AdaptiveKLController(FixedKLController):
    """Proportional control towards a target KL (Ziegler et al., 2019, arXiv:1909.08593, §2.2).

    After a batch of n sequences with mean KL k: coef ← coef · (1 + clip(k / target − 1, −0.2, 0.2) · n / horizon).

    Args:
        kl_coef: where the coefficient starts.
        target: KL to the reference, in the unit of what `update` is given (nats a sequence).
        horizon: time constant, in sequences.
    """

    @checked
    def __init__(self, kl_coef: float, target: float, horizon: int) -> None:
        super().__init__(kl_coef)
        self.target, self.horizon = target, horizon

    @checked
    def update(self, current_kl: float, num_sequences: int) -> None:
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        value = self.value * (1 + error * num_sequences / self.horizon)
        if not math.isfinite(value):
            raise NonFiniteValue(f"kl_coef: {value} after {self.value:.4g}, at a KL of {current_kl:.4g}")
        self.value = value


class LinearKLController(FixedKLController):
    """A straight line from one coefficient to another, over the sequences that `update` is told of.

    Args:
        kl_coef: where the coefficient starts.
        final: where it ends, and stays.
        horizon: the line's length, in sequences.
    """

    @checked
    def __init__(self, kl_coef: float, final: float, horizon: int) -> None:
        super().__init__(kl_coef)
        self.start, self.final, self.horizon, self.seen = kl_coef, final, horizon, 0

    @checked
    def update(self, current_kl: float, num_sequences: int) -> None:
        """Move on by `num_sequences`, whatever the KL is."""
        self.seen += num_sequences
        done = min(self.seen / self.horizon, 1.0)
        self.value = (1 - done) * self.start + done * self.final

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.seen = state["value"], state["seen"]
