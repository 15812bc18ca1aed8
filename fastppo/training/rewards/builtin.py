"""Rewards that a configuration names by one word.

Each is a class that is made with the reward's name, for its error messages, and called as any reward function is; see
`RewardFunction`. List a new one in `BUILT_IN`.
"""

from __future__ import annotations

import functools

from fastppo.extras import install_command
from fastppo.training.rewards.functions import RewardError


class VaderSentiment:
    """VADER's compound sentiment score of the completion, in [-1, 1] (Hutto & Gilbert, 2014). Needs no model."""

    def __init__(self, name: str) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise RewardError(f"reward {name!r}: needs vaderSentiment; {install_command('demo')}") from None
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, completions: list[str]) -> list[float]:
        return [self._analyzer.polarity_scores(completion)["compound"] for completion in completions]


class ReasoningGym:
    """A reasoning-gym task's score of the completion as an answer, in [0, 1] (Stojanovski et al., 2025,
    arXiv:2505.24760): 1 for the correct answer, and for many tasks partial credit for a text that contains it.

    Every prompt needs two columns: `task`, the task's name, and `entry`, the generated entry with its question, answer
    and metadata. examples/reasoning_prompts.py writes such prompts.
    """

    def __init__(self, name: str) -> None:
        try:
            from reasoning_gym import get_score_answer_fn
        except ImportError:
            raise RewardError(f"reward {name!r}: needs reasoning-gym; {install_command('reasoning')}") from None
        # Set a task up once, not for every completion.
        self._scorer = functools.lru_cache(maxsize=None)(get_score_answer_fn)

    def __call__(self, completions: list[str], task: list[str], entry: list[dict]) -> list[float]:
        rows = zip(completions, task, entry, strict=True)
        return [float(self._scorer(name)(completion.strip(), asked)) for completion, name, asked in rows]


BUILT_IN = {"vader_sentiment": VaderSentiment, "reasoning_gym": ReasoningGym}
