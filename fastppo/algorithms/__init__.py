"""The algorithms by the names that a configuration gives them."""

from fastppo.algorithms.actor_critic import ActorCritic
from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.ppo import PPO
from fastppo.algorithms.reinforce import Reinforce

ALGORITHMS: dict[str, type[Algorithm]] = {"reinforce": Reinforce, "actor_critic": ActorCritic, "ppo": PPO}
