"""Replace functions of a library of a known version wherever the library refers to them, and restore them.

``from library.utils import function`` binds the function in every module that does it, and a registry binds it once
more. `Patch` therefore searches all loaded modules of the library; modules loaded later import the replacement.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Patch:
    """Replacements for functions of one library.

    Args:
        library: importable name, which is also the name of the distribution.
        supported: version range, such as ">=0.8,<0.10".
        replacements: "library.module.function" -> its replacement, a different one for each.
        only_in: names of modules; the replacements go into these alone instead of everywhere.
    """

    def __init__(
        self, library: str, supported: str, replacements: dict[str, Callable], *, only_in: tuple[str, ...] = ()
    ) -> None:
        self.library, self.supported, self.replacements, self._only_in = library, supported, replacements, only_in
        self._originals: dict[str, Callable] = {}

    def apply(self) -> None:
        """Put every replacement in place in this process, or none.

        Raises:
            ImportError: the library is missing, or its version is outside the supported range.
            RuntimeError: already applied, or another patch has replaced one of the functions.
        """
        if self._originals:
            raise RuntimeError(f"{self.library} is already patched by fastppo; call unpatch() first")
        require(self.library, self.supported)
        originals = {}
        for name in self.replacements:
            home, _, attribute = name.rpartition(".")
            function = getattr(importlib.import_module(home), attribute)
            originals[name] = function if _home(function) == home else None
        self._check(originals, f"{self.library}'s own", "another patch is in place; remove it before fastppo's")
        self._originals = originals
        self._replace(originals, self.replacements)

    def undo(self) -> None:
        """Restore the library's own functions, also in modules that imported a replacement after `apply`.

        Raises:
            RuntimeError: not applied, or patched over by another library since; nothing is changed then.
        """
        if not self._originals:
            raise RuntimeError(f"{self.library} is not patched by fastppo")
        self._check(self.replacements, "fastppo's", "another patch was put over it; remove that first")
        self._replace(self.replacements, self._originals)
        self._originals = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """`apply` for the length of a with-block."""
        self.apply()
        try:
            yield
        finally:
            self.undo()

    def _check(self, expected: dict[str, Callable | None], whose: str, remedy: str) -> None:
        """Raise RuntimeError unless each function is the expected one where it is defined, or in `only_in`."""
        for name, function in expected.items():
            home, _, attribute = name.rpartition(".")
            for module in self._only_in or (home,):
                if (current := getattr(importlib.import_module(module), attribute)) is not function:
                    described = f"{getattr(current, '__qualname__', repr(current))} from {_home(current)}"
                    raise RuntimeError(f"{module}.{attribute} is {described}, not {whose}: {remedy}")

    def _replace(self, old: dict[str, Callable], new: dict[str, Callable]) -> None:
        replacement = {id(old[name]): new[name] for name in old}
        for name, module in list(sys.modules.items()):
            wanted = name in self._only_in if self._only_in else f"{name}.".startswith(f"{self.library}.")
            if module is None or not wanted:
                continue
            for attribute, value in list(vars(module).items()):
                if id(value) in replacement:
                    setattr(module, attribute, replacement[id(value)])
                elif type(value) is dict:  # a registry
                    value |= {key: replacement[id(entry)] for key, entry in value.items() if id(entry) in replacement}


def require(name: str, supported: str) -> None:
    """Raise ImportError unless the installed distribution `name` is in the range `supported`, such as ">=0.8,<0.10"."""
    from packaging.specifiers import SpecifierSet

    remedy = f'pip install "{name}{supported}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        raise ImportError(f"{name} is not installed; fastppo supports {name}{supported}: {remedy}") from None
    if not SpecifierSet(supported).contains(found, prereleases=True):
        raise ImportError(f"{name} {found} is installed, but fastppo supports {name}{supported}: {remedy}")


def origin(function: Any) -> str:
    """The module whose code a function runs; `functools.wraps` copies `__module__`, so that may name another."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None) or "something"


def _home(function: Callable) -> str:
    """The module that defines a function or class; for `SomeFunction.apply`, that of SomeFunction."""
    owner = getattr(function, "__self__", None)
    function = owner if isinstance(owner, type) else function
    claimed = getattr(function, "__module__", "?")
    if isinstance(function, type):  # a method replaced by another library counts as a patch of the class
        methods = [_home(member) for member in vars(function).values() if hasattr(member, "__globals__")]
        return next((home for home in methods if home != claimed), claimed)
    actual = origin(function)
    return claimed if actual.partition(".")[0] == "torch" else actual  # torch.compile's wrapper is no patch
