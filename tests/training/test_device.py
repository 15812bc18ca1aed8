"""The device that a configuration names."""

from __future__ import annotations

import os

import pytest
import torch

from fastppo.errors import ConfigError
from fastppo.training.device import busy_machine, choose_device


def test_device(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for available, expected in ((True, "cuda"), (False, "cpu")):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda available=available: available)
            zeros = torch.zeros(1)
            patched.setattr(torch, "zeros", lambda size, device, zeros=zeros: zeros)  # without CUDA, none is on a GPU
            assert choose_device("auto") == torch.device(expected)
    for name in ("no-such-device", "cuda:77", "meta", "privateuseone", "xla", 100 * "x"):
        with pytest.raises(ConfigError, match=r"^device: '.*' cannot be used \(.*\); expected auto, cpu") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_a_backend_that_cannot_serve_the_device(monkeypatch):
    with pytest.raises(ConfigError, match=r"^backend: expected one of"):
        choose_device("cpu", "none")
    monkeypatch.setenv("FASTPPO_BACKEND", "none")
    with pytest.raises(ConfigError, match=r"^FASTPPO_BACKEND: expected one of"):
        choose_device("cpu")


@pytest.mark.parametrize(
    ("cores", "threads", "load", "policy", "busy"),
    [
        (2, 2, 4.5, None, True),  # others have both cores
        (2, 2, 1.2, None, True),
        (2, 2, 0.9, None, False),
        (2, 1, 4.5, None, False),  # one thread waits for no other
        (2, 2, 4.5, "PASSIVE", False),
        (2, 2, 4.5, "active", True),
        (64, 8, 50.0, None, False),  # room for eight more
        (64, 8, 60.0, None, True),
    ],
)
def test_a_busy_machine_is_told_with_its_remedy(monkeypatch, cores, threads, load, policy, busy):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    warning = busy_machine()
    assert (warning is not None) == busy
    if busy:
        assert f"load {load}, {cores} cores" in warning
        assert "set OMP_WAIT_POLICY=passive" in warning
        assert "\n" not in warning
