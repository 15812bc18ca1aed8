"""Every message is one bounded line, whatever was given."""

from __future__ import annotations

import pytest
import torch

from fastppo.errors import did_you_mean, one_line, quote


class Failing:
    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


class FailingError(Exception):
    def __str__(self):
        raise RuntimeError("no str")


nested: list = []
for _ in range(5_000):
    nested = [nested]

VALUES = [
    "a" * 10**6,
    "\ud800\x00\x1b[31m\r\n\u2028",
    b"\xff" * 1000,
    10**10_000,
    nested,
    [[["x" * 200] * 200] * 200] * 200,
    {f"key {i}": list(range(100)) for i in range(1000)},
    torch.zeros(100, 100),
    Failing(),
    [Failing()],
    type("T" * 500, (), {}),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_quote_is_one_short_printable_line(value):
    text = quote(value)
    assert 0 < len(text) <= 90
    assert text.isprintable()
    text.encode()


def test_a_short_value_is_quoted_as_it_is():
    for value in ("it's", 0.1, None, True, ["a", {"b": 2}], "é€😀"):
        assert quote(value) == repr(value)


def test_a_cut_is_shown_and_both_ends_stay():
    assert quote("a" * 500 + "z").endswith("az'")
    assert "..." in quote("a" * 500)


def test_the_text_of_an_error_is_one_line():
    assert one_line(ValueError("two\n  lines\x00")) == "two lines\\x00"
    assert one_line(FailingError()) == "FailingError"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line(ValueError("x" * 10**6))) <= 410


def test_a_suggestion_for_a_very_long_word_takes_no_time():
    assert did_you_mean("x" * 10**7, ["learning_rate"]) == ""
