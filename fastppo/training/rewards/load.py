"""From the configuration's `rewards` to functions and models."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from fastppo.algorithms.lagrangian import LagrangeMultiplier
from fastppo.errors import did_you_mean, quote
from fastppo.models.config import ModelConfig
from fastppo.training.config import RewardConfig
from fastppo.training.rewards.builtin import BUILT_IN
from fastppo.training.rewards.functions import Reward, RewardError, RewardFunction, RewardFunctions, describe
from fastppo.training.rewards.model import ModelReward


def build_rewards(
    configs: Sequence[RewardConfig | RewardFunction],
    *,
    device: torch.device | str = "cpu",
    model_defaults: ModelConfig | None = None,
) -> RewardFunctions:
    """Build the rewards of a configuration.

    Args:
        configs: entries of `config.rewards`, or Python functions (weight 1, named by their ``__name__``).
        device: device that reward models run on and results are moved to.
        model_defaults: dtype and permissions of reward models. Default: float32, and no permissions.

    Raises:
        RewardError: a function or model cannot be found or loaded.
    """
    functions = [  # all of them before a model is read: they cost nothing
        config if callable(config) else config.function and find_function(config.name, config.function)
        for config in configs
    ]
    rewards = []
    for config, function in zip(configs, functions, strict=True):
        if callable(config):
            rewards.append(Reward(getattr(config, "__name__", type(config).__name__), function))
            continue
        multiplier = None
        if function is None:
            function = ModelReward(config, device=device, defaults=model_defaults or ModelConfig())
        if config.threshold is not None:
            multiplier = LagrangeMultiplier(config.weight, config.threshold, config.multiplier_learning_rate)
        rewards.append(Reward(config.name, function, config.weight, config.normalize, multiplier))
    return RewardFunctions(rewards, device=device)


def find_function(name: str, spec: str) -> RewardFunction:
    """Find the function of reward `name`.

    Args:
        name: the reward's name, for error messages.
        spec: a key of `BUILT_IN`, ``module:function`` or ``path/file.py:function``. The module or file is executed.

    Raises:
        RewardError: there is no such function.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec](name)
    where, _, attribute = spec.rpartition(":")
    is_file = where.endswith(".py")
    if not attribute or not (is_file or all(part.isidentifier() for part in where.split("."))):
        kinds = f"{', '.join(BUILT_IN)}, module:function or path/file.py:function"
        raise RewardError(f"reward {quote(name)}: {quote(spec)} is not {kinds}")
    if is_file and not os.path.isfile(os.path.expanduser(where)):
        raise RewardError(f"reward {quote(name)}: {where}: no such file")
    try:
        module = _load_file(where) if is_file else importlib.import_module(where)
        function = getattr(module, attribute, None)
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() at the end of a script is no Exception
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            raise RewardError(
                f"reward {quote(name)}: no module {where!r} is installed; for a file, write its path: {where}.py:..."
            ) from None
        raise RewardError(f"reward {quote(name)}: loading {where} raised {describe(error)}") from error
    if not callable(function):
        hint = did_you_mean(attribute, functions, otherwise="it has")
        raise RewardError(f"reward {quote(name)}: no function {quote(attribute)} in {where}{hint}")
    return function


def _load_file(where: str) -> ModuleType:
    """Execute a .py file as a module."""
    path = Path(os.path.expanduser(where)).resolve()
    # Named by its path: two files of one name differ, and neither hides an installed module.
    spec = importlib.util.spec_from_file_location(f"_fastppo_reward_{os.fsencode(path).hex()}", path)
    # dataclasses and typing look the module up there.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
