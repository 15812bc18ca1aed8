"""The algorithms by the names that a configuration gives them."""

from fastppo.algorithms.actor_critic import ActorCritic
from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.cpi import ConservativePolicyIteration
from fastppo.algorithms.npg import NaturalPolicyGradient
from fastppo.algorithms.ppo import PPO
from fastppo.algorithms.reinforce import Reinforce
from fastppo.algorithms.trpo import TRPO

ALGORITHMS: dict[str, type[Algorithm]] = {
    "reinforce": Reinforce,
    "actor_critic": ActorCritic,
    "ppo": PPO,
    "trpo": TRPO,
    "npg": NaturalPolicyGradient,
    "cpi": ConservativePolicyIteration,
}
