"""Evaluation of a trained policy."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from fastppo.models import ModelError, backbone_and_head, load_causal_lm
from fastppo.models.adapters import load_adapters
from fastppo.models.policy_models import PolicyModels
from fastppo.models.source import ADAPTERS
from fastppo.models.value import HEAD_FILE
from fastppo.training.config import Config, build_config, to_dict
from fastppo.training.data import DataError
from fastppo.training.device import choose_device
from fastppo.training.distributed import open_replicas, rank_device
from fastppo.training.inputs import Inputs
from fastppo.training.scoring import Scorer


def evaluate_policy(config: Config, model: str | None = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample a configuration's held-out prompts from a policy, score them, and measure its KL to the reference.

    Of several processes each does its share with models of its own, and all return the whole.

    Args:
        config: configuration of the prompts, the rewards, the sampling and the reference.
        model: policy to evaluate, named like `model.name_or_path`, or a folder of adapters for the configuration's
            model. Default: the configuration's model.

    Returns:
        Metrics named `eval/...`, and one row a sample: prompt, completion, reward, rewards.

    Raises:
        ConfigError, ModelError, DataError, RewardError: something cannot be loaded, or there are no held-out prompts.
    """
    tree = to_dict(config)
    if model is not None:
        tree["model"] |= {"name_or_path": model, "quantization": None}  # trained weights are taken as they are
    policy_config = build_config(tree).model
    device = rank_device(choose_device(config.device, config.backend_name))
    ranks = open_replicas(device)
    inputs = Inputs(config, device=device)
    ranks.check_equal(inputs.facts(), "all ranks must read the same")
    if not inputs.data.eval:
        raise DataError("there are no held-out prompts; give data.eval or data.eval_size")
    folder = Path(model or "").expanduser()
    adapters = model is not None and os.path.exists(folder / ADAPTERS)
    if adapters and (folder / HEAD_FILE).exists():
        raise ModelError(f"{model}: holds a critic of adapters ({HEAD_FILE}); name the folder of the policy, final/")
    base_config = dataclasses.replace(config.model, lora=None)
    if adapters:  # the reference is the model without them, not a copy
        base_config.reference = "none"
    models = PolicyModels(base_config, device=device, num_values=0)
    if adapters:
        models.policy = load_adapters(models.policy, folder)
        models.has_reference = config.model.reference == "frozen"
    elif model is not None:
        policy = load_causal_lm(policy_config, device=device)
        size, expected = (backbone_and_head(m)[1].weight.shape[0] for m in (policy, models.policy))
        if size != expected:
            raise ModelError(f"{model}: has a vocabulary of {size}, {config.model.name_or_path} one of {expected}")
        models.policy = policy
    options = {"ranks": ranks, "held_out": inputs.held_out, "texts": inputs.texts}
    scorer = Scorer(config, inputs.tokenizer, models, inputs.rewards, **options)
    return scorer.evaluate(inputs.data.eval[: config.eval.num_prompts])
