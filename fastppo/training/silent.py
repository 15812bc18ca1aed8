"""What ranks other than the first have in place of a display, a log or a lock."""

from __future__ import annotations

from typing import Any


class Silent:
    """Has every method, and none does anything."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass
