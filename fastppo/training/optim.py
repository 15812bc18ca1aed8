"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from fastppo.config_fields import ConfigError
from fastppo.training.config import OptimConfig


def build_optimizer(
    config: OptimConfig, policy_parameters: Iterable[nn.Parameter], value_parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW with two parameter groups, policy and critic, each with its own learning rate.

    `adamw_8bit` keeps its moments in 8 bits (bitsandbytes; Dettmers et al., 2022, arXiv:2110.02861).

    Raises:
        ConfigError: bitsandbytes is needed and not installed.
    """
    groups = [
        {"params": list(policy_parameters), "lr": config.learning_rate},
        {"params": list(value_parameters), "lr": config.value_learning_rate or config.learning_rate},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    arguments = {"betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}
    if config.name != "adamw_8bit":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError("optim.name: adamw_8bit needs bitsandbytes (pip install bitsandbytes)") from None
    return bitsandbytes.optim.AdamW8bit(groups, **arguments)


def build_scheduler(config: OptimConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """One of transformers' schedules, stepped once per training step.

    A warm-up starts at rate 0 and a decay ends there. To waste no training step, step 1 uses the schedule's second
    rate, and the schedule is one step longer than the run.
    """
    from transformers import get_scheduler

    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps + 1
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()
    return scheduler


def scale_learning_rate(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, factor: float) -> None:
    """Multiply every group's learning rate by `factor`, now and for the rest of its schedule; kept in checkpoints."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
