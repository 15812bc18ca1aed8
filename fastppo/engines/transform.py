"""The elementwise map from raw logits to the logits that are sampled from, and its derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """z = softcap * tanh(logit_scale * x / softcap) / temperature, with x = hidden @ weight.T + bias.

    Granite and Cohere scale their logits, Gemma caps them; the temperature is the sampler's.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def apply_(self, x: Tensor) -> Tensor:
        """x [..., V] becomes z, in place."""
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            return x if scale == 1.0 else x.mul_(scale)
        return x.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def apply(self, x: Tensor) -> Tensor:
        """The same out of place, for autograd."""
        if self.softcap is None:
            return x * (self.logit_scale / self.temperature)
        return self.softcap / self.temperature * torch.tanh(x * (self.logit_scale / self.softcap))

    def backward_(self, dz: Tensor, z: Tensor) -> Tensor:
        """∂/∂z [..., V] becomes ∂/∂x, in place: dz · (1 − (z·temperature/softcap)²) · logit_scale / temperature."""
        scale = self.logit_scale / self.temperature
        if self.softcap is not None:
            dz.sub_(dz * (z * (self.temperature / self.softcap)).square_())
        return dz if scale == 1.0 else dz.mul_(scale)
