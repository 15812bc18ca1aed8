"""What the configuration's sections share. A string below a field is its help text, printed by `fastppo keys`."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic, like Python, takes true for 1
        raise PydanticCustomError("number", "Expected a number")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise PydanticCustomError("text", "Expected text without NUL characters and halves of surrogate pairs")
    return value


def _known_home(path: str) -> str:
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise PydanticCustomError("home", "There is no such user")
    return path


_FLOAT32_MAX = 3.4028234663852886e38  # most numbers end up in a float32 tensor

_Int = Annotated[int, BeforeValidator(_no_bool), Field(lt=2**63)]
PositiveInt = Annotated[_Int, Field(gt=0)]
NonNegativeInt = Annotated[_Int, Field(ge=0)]
FiniteFloat = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False, ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
NonNegativeFloat = Annotated[FiniteFloat, Field(ge=0)]
UnitFloat = Annotated[FiniteFloat, Field(ge=0, le=1)]
AnyText = Annotated[str, BeforeValidator(_plain)]
AnyPath = Annotated[AnyText, AfterValidator(_known_home)]
Text = Annotated[str, Field(min_length=1), BeforeValidator(_plain)]
PathText = Annotated[Text, AfterValidator(_known_home)]
