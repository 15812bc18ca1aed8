"""Rewards of the examples: plain functions of lists, called by name."""

import re


def brevity(completions):
    """1 for no words, 0 for twenty or more."""
    return [max(0.0, 1 - len(text.split()) / 20) for text in completions]


def variety(completions):
    """Different words as a share of all; 0 for no words."""
    return [len(set(text.lower().split())) / max(len(text.split()), 1) for text in completions]


def last_number(completions, answer):
    """1 if the last number of the completion is the last one of the answer, as GSM8K writes them; else 0."""
    pairs = zip(map(_last, completions), map(_last, answer), strict=True)
    return [float(given is not None and given == right) for given, right in pairs]


def _last(text):
    numbers = re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None
