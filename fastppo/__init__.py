"""fastppo: what PPO and TRPO need from a language model, straight from hidden states and the lm_head weight.

The operators here need only torch. `fastppo.training` is the trainer behind the `fastppo` command.
"""

import importlib
from typing import Any

from fastppo.engines.budget import scratch_budget
from fastppo.engines.dispatch import FastPPOWarning
from fastppo.ops import reference
from fastppo.ops.fisher_vector_product import fisher_vector_product
from fastppo.ops.gae import GAEOutput, gae
from fastppo.ops.kl_control import AdaptiveKLController, FixedKLController, LinearKLController
from fastppo.ops.linear_kl import linear_kl
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.ops.linear_ppo_loss import linear_ppo_loss
from fastppo.ops.outputs import FisherOutput, LogprobOutput, PPOLossOutput
from fastppo.ops.ppo_loss import ppo_loss
from fastppo.ops.selective_logprob import selective_logprob
from fastppo.ops.value_loss import ValueLossOutput, value_loss
from fastppo.ops.whiten import whiten

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "FastPPOWarning",
    "FisherOutput",
    "FixedKLController",
    "GAEOutput",
    "LinearKLController",
    "LogprobOutput",
    "PPOLossOutput",
    "ValueLossOutput",
    "fisher_vector_product",
    "gae",
    "linear_kl",
    "linear_logprob",
    "linear_ppo_loss",
    "patch_model",
    "ppo_loss",
    "reference",
    "scratch_budget",
    "selective_logprob",
    "unpatch_model",
    "value_loss",
    "whiten",
]

# What belongs to other libraries is loaded on first use, so that `import fastppo` needs only torch.
_LAZY = {
    "patch_model": "fastppo.integrations.transformers",
    "unpatch_model": "fastppo.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
