"""Field types of the configuration's dataclasses, which stand beside what they configure."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

# The strings below the fields are their help texts: `fastppo keys` prints them.
STRICT = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""
