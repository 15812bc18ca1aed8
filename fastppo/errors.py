"""The errors that a user can mend, and how messages quote what was given. Needs only the standard library."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class FastPPOError(Exception):
    """Base of the errors that a user can mend; the message is one line, which the command line prints."""


class ConfigError(FastPPOError, ValueError):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""


def quote(value: object, limit: int = 80) -> str:
    """``repr(value)`` on one line of at most about `limit` characters; ``...`` stands where it was cut."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        text = short.repr(value)
    except Exception:  # a __repr__ that fails, or an int of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return _bounded(text, limit)


def one_line(error: object, limit: int = 400) -> str:
    """The text of an exception on one line of at most about `limit` characters; its type if it has no text."""
    try:
        text = str(error)
    except Exception:  # a __str__ that fails
        text = ""
    return _bounded(text, limit) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], prefix: str = "", *, otherwise: str = "") -> str:
    """End of a message about a misspelt word: `; did you mean ...?` with the nearest known word.

    If none is near: nothing, or `otherwise`, such as "it has", and the first of the known words.
    """
    known = list(known)
    if near := difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5):
        return f"; did you mean {quote(prefix + near[0])}?"
    return f"; {otherwise} {one_line(', '.join(known) or 'none', 160)}" if otherwise else ""


def _bounded(text: str, limit: int) -> str:
    """Text on one line, without control characters and lone surrogates; a longer one loses its middle."""
    if len(text) > 4 * limit:  # bounds the work below
        text = f"{text[: 2 * limit]} ... {text[-2 * limit :]}"
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: 2 * limit // 3]}...{text[-(limit // 3) :]}"
