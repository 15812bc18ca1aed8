"""What the configuration's sections share. A string below a field is its help text, printed by `fastppo keys`."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from fastppo.errors import ConfigError as ConfigError
from fastppo.errors import did_you_mean as did_you_mean
from fastppo.errors import one_line as one_line
from fastppo.errors import quote as quote

STRICT = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
