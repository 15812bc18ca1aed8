"""Which versions of a library an integration was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(name: str, supported: str) -> None:
    """Raise ImportError unless the installed distribution `name` is in the range `supported`, such as ">=0.8,<0.10"."""
    from packaging.specifiers import SpecifierSet

    mend = f'pip install "{name}{supported}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        raise ImportError(f"{name} is not installed; fastppo supports {name}{supported}: {mend}") from None
    if not SpecifierSet(supported).contains(found, prereleases=True):
        raise ImportError(f"{name} {found} is installed, but fastppo supports {name}{supported}: {mend}")
