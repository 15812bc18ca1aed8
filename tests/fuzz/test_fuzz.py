"""The fuzzer for a few seconds, with cases that FASTPPO_SEED decides; `python -m tests.fuzz --help` for more."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.runner import fuzz


# As many cases as ten seconds have room for on a slow machine, so that all machines see the same.
@pytest.mark.slow
@pytest.mark.parametrize(("target", "cases"), [("operators", 100), ("commands", 30), ("kills", 2)])
def test_a_few_random_cases(target, cases):
    findings = fuzz([target], seconds=60, seed=int(os.environ["FASTPPO_SEED"]), max_cases=cases)
    assert not findings, "\n".join(findings)
