"""The C++ extension `fastppo._C` (csrc/), if this installation has one.

Imported here and now, not on first use: torch.compile cannot trace an import.
"""

from __future__ import annotations

from types import ModuleType

_module: ModuleType | None = None
_why_missing: str | None = None

try:
    import fastppo._C as _module
except ImportError as error:
    if error.name == "fastppo._C":  # there is no such submodule
        _why_missing = "fastppo._C is not built; `pip install .` in the source tree builds it with a C++17 compiler"
    else:  # built for another Python or another C library
        _why_missing = f"fastppo._C does not load: {str(error).splitlines()[0]}"


def load() -> ModuleType | None:
    """The extension; None where there is none."""
    return _module


def why_missing() -> str | None:
    """In one line, why `load` gives None; None if it gives the extension."""
    return _why_missing
