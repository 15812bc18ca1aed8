"""What is sampled from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: str
    """What the model reads, the chat template applied."""
    input_ids: list[int]
    columns: dict[str, Any]
    """The row's other columns, for reward functions."""
