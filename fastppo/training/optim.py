"""Optimizers by name, and their learning-rate schedule."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from fastppo.config_fields import ConfigError
from fastppo.training.config import OptimConfig


def build_optimizer(
    config: OptimConfig, policy_parameters: Iterable[nn.Parameter], value_parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW over two groups of parameters, the critic's with a learning rate of its own.

    `adamw_8bit` keeps its moments in 8 bits (bitsandbytes; Dettmers et al., 2022, arXiv:2110.02861).

    Raises:
        ConfigError: bitsandbytes is asked for and not installed.
    """
    groups = [
        {"params": list(policy_parameters), "lr": config.learning_rate},
        {"params": list(value_parameters), "lr": config.value_learning_rate or config.learning_rate},
    ]
    arguments = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise ConfigError("optim.name: adamw_8bit needs bitsandbytes (pip install bitsandbytes)") from None
        return bitsandbytes.optim.AdamW8bit(groups, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)


def scale_learning_rate(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, factor: float
) -> None:
    """Multiply every group's learning rate by `factor`, now and for the rest of its schedule.

    A checkpoint of both holds the change.
    """
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    # What the schedule's own multiplier of each step is applied to.
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def build_scheduler(
    config: OptimConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """One of transformers' schedules, stepped once a training step.

    Their rates begin (with a warm-up) and end (with a decay) at 0. A training step at a rate of 0 would be wasted, so
    the first one here is the schedule's second.
    """
    from transformers import get_scheduler

    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps + 1
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()
    return scheduler
