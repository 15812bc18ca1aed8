"""Rewards of the examples: plain functions of lists, called by name."""


def brevity(completions):
    """1 for no words, 0 for twenty or more."""
    return [max(0.0, 1 - len(text.split()) / 20) for text in completions]


def variety(completions):
    """Different words as a share of all; 0 for no words."""
    return [len(set(text.lower().split())) / max(len(text.split()), 1) for text in completions]
