"""Rewards: Python functions and sequence-classification models, as one weighted sum.

To add a reward, write a function and name it in the configuration; nothing in this package changes::

    # my_rewards.py
    def brevity(completions):  # or (prompts, completions, completion_ids, <column of the prompts>, ...), in any order
        return [-len(text) for text in completions]  # one number per completion, or a list with one per token

    # config.yaml
    rewards:
      - {name: brevity, function: "my_rewards.py:brevity", weight: 0.5}

To add a built-in reward that a configuration names by one word, add a class to builtin.py and to `BUILT_IN` there.

    functions.py   RewardFunctions: calls the rewards, checks what they return, normalizes, weights and sums
    builtin.py     vader_sentiment, reasoning_gym
    model.py       ModelReward: the logit of a sequence-classification model
    load.py        build_rewards: from the configuration; find_function: from `file.py:function` or `module:function`
"""

from fastppo.training.rewards.functions import Reward, RewardError, RewardFunctions, RewardOutput
from fastppo.training.rewards.load import build_rewards

__all__ = ["Reward", "RewardError", "RewardFunctions", "RewardOutput", "build_rewards"]
