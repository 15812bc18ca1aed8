"""What the configuration's sections share. A string below a field is its help text, printed by `fastppo keys`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """End of a message about a misspelt word: `; did you mean ...?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""
