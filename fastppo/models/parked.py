"""Keep a model that is used now and then in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Parked:
    """A model whose parameters are in the host's memory, but for the time from `fetch` to `park`.

    They stay the same objects, so an optimizer keeps their states. Gradients are not moved: there must be none left at
    `park`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._parameters, self._device = list(model.parameters()), device
        self._hosts = [_copy(parameter.data, torch.device("cpu")) for parameter in self._parameters]
        self._fetched = False
        for parameter, host in zip(self._parameters, self._hosts, strict=True):
            parameter.data = host

    def fetch(self) -> None:
        """Move the parameters to the device, unless they are there."""
        for parameter in () if self._fetched else self._parameters:
            parameter.data = _copy(parameter.data, self._device)
        self._fetched = True

    def park(self) -> None:
        """Move the parameters back, or where they are frozen, let go of those on the device."""
        for parameter, host in zip(self._parameters, self._hosts, strict=True) if self._fetched else ():
            parameter.data = host.copy_(parameter.data) if parameter.requires_grad else host
        self._fetched = False


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device: itself if it is there, and page-locked in the host's memory, whence copies are fast."""
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)
