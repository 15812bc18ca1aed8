"""The algorithms by the names that a configuration gives them."""

from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.ppo import PPO

ALGORITHMS: dict[str, type[Algorithm]] = {"ppo": PPO}
