"""A prompt to sample completions of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    text: str  # with the chat template applied
    input_ids: list[int]
    columns: dict[str, Any]  # the row's other columns, for reward functions
