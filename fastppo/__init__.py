"""fastppo: what PPO and TRPO need from a language model, straight from hidden states and the lm_head weight.

The operators here need only torch. `fastppo.training` is the trainer behind the `fastppo` command.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastppo.engines.budget import scratch_budget
    from fastppo.engines.dispatch import FastPPOWarning
    from fastppo.integrations.transformers import patch_model, unpatch_model
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

# Where the names above come from. They are loaded on first use: `fastppo --help` needs no torch, and a name that
# belongs to another library needs it only when it is used.
_MODULES = {
    "engines.budget": ["scratch_budget"],
    "engines.dispatch": ["FastPPOWarning"],
    "integrations.transformers": ["patch_model", "unpatch_model"],
    "ops.fisher_vector_product": ["fisher_vector_product"],
    "ops.gae": ["GAEOutput", "gae"],
    "ops.kl_control": ["AdaptiveKLController", "FixedKLController", "LinearKLController"],
    "ops.linear_kl": ["linear_kl"],
    "ops.linear_logprob": ["linear_logprob"],
    "ops.linear_ppo_loss": ["linear_ppo_loss"],
    "ops.outputs": ["FisherOutput", "LogprobOutput", "PPOLossOutput"],
    "ops.ppo_loss": ["ppo_loss"],
    "ops.selective_logprob": ["selective_logprob"],
    "ops.value_loss": ["ValueLossOutput", "value_loss"],
    "ops.whiten": ["whiten"],
}
_SUBMODULES = {"engines": "fastppo.engines", "ops": "fastppo.ops", "reference": "fastppo.ops.reference"}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        for module in (module for module in _MODULES if module.startswith(f"{name}.")):
            importlib.import_module(f"fastppo.{module}")  # so that `fastppo.ops.gae` can be had
        return importlib.import_module(_SUBMODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"fastppo.{_HOME[name]}")
    value = globals()[name] = getattr(module, name)  # the next use finds it without a call
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, *(name for name in globals() if name.startswith("__"))})
