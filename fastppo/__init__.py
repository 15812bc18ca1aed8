"""fastppo: what PPO and TRPO need from a language model, straight from hidden states and the lm_head weight.

The operators here need only torch. `fastppo.training` is the trainer behind the `fastppo` command.
"""

from fastppo.ops.budget import scratch_budget
from fastppo.ops.dispatch import FastPPOWarning
from fastppo.ops.gae import GAEOutput, gae
from fastppo.ops.kl_control import AdaptiveKLController, FixedKLController, LinearKLController
from fastppo.ops.linear_kl import linear_kl
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.ops.linear_ppo_loss import linear_ppo_loss
from fastppo.ops.outputs import LogprobOutput, PPOLossOutput
from fastppo.ops.ppo_loss import ppo_loss
from fastppo.ops.selective_logprob import selective_logprob
from fastppo.ops.value_loss import ValueLossOutput, value_loss
from fastppo.ops.whiten import whiten

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "FastPPOWarning",
    "FixedKLController",
    "GAEOutput",
    "LinearKLController",
    "LogprobOutput",
    "PPOLossOutput",
    "ValueLossOutput",
    "gae",
    "linear_kl",
    "linear_logprob",
    "linear_ppo_loss",
    "ppo_loss",
    "scratch_budget",
    "selective_logprob",
    "value_loss",
    "whiten",
]
