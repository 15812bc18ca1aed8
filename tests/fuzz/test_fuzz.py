"""The fuzzer for a few seconds, with cases that FASTPPO_SEED decides; `python -m tests.fuzz --help` for more."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.runner import fuzz


# Ten seconds have room for about so many cases; a faster machine does not see others.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cases", "processes"), [("operators", 150, 1), ("commands", 30, 1), ("kills", 2, 1), ("kills", 1, 2)]
)
def test_a_few_random_cases(target, cases, processes):
    seed = int(os.environ["FASTPPO_SEED"])
    findings = fuzz([target], seconds=10, seed=seed, max_cases=cases, processes=processes)
    assert not findings, "\n".join(findings)
