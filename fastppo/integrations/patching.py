"""Putting functions in the place of a library's own, everywhere the library refers to them, and taking them out again.

`from library.utils import function` leaves a reference in every module that does it, and a registry holds one more.
So a replacement goes through all modules of the library that are loaded; those loaded later import what they find.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

from fastppo.integrations.versions import require


class Patch:
    """Replacements for functions of one library.

    Args:
        library: importable name, which is also the name of the distribution.
        supported: version range, such as ">=0.8,<0.10".
        replacements: "library.module.function" -> what takes its place.
    """

    def __init__(self, library: str, supported: str, replacements: dict[str, Callable]):
        self.library, self.supported, self.replacements = library, supported, replacements
        self._originals: dict[str, Callable] = {}

    def apply(self) -> None:
        """Put every replacement in place, or none.

        Raises:
            ImportError: the library is missing, or its version is outside the supported range.
            RuntimeError: already applied, or somebody else has replaced one of the functions.
        """
        if self._originals:
            raise RuntimeError(f"{self.library} is already patched by fastppo; call unpatch() first")
        require(self.library, self.supported)
        originals = {name: getattr(*_locate(name)) for name in self.replacements}
        for name, original in originals.items():
            if (home := _home(original)) != name.rpartition(".")[0]:
                raise RuntimeError(
                    f"{name} is {_describe(original)} from {home}, not {self.library}'s own: another patch is in "
                    "place; remove it before fastppo's"
                )
        for name, original in originals.items():
            self._replace(original, self.replacements[name])
        self._originals = originals

    def undo(self) -> None:
        """Put the library's own functions back, also where a module picked up a replacement after `apply`.

        Raises:
            RuntimeError: not applied, or somebody else has patched over it since; nothing is changed then.
        """
        if not self._originals:
            raise RuntimeError(f"{self.library} is not patched by fastppo")
        for name, replacement in self.replacements.items():
            if (current := getattr(*_locate(name))) is not replacement:
                raise RuntimeError(
                    f"{name} is {_describe(current)} from {_home(current)}, not fastppo's: another patch was put over "
                    "it; remove that first"
                )
        for name, original in self._originals.items():
            self._replace(self.replacements[name], original)
        self._originals = {}

    def applied(self) -> AbstractContextManager[None]:
        """`apply` for the length of a with-block."""
        return between(self.apply, self.undo)

    def _replace(self, old: Callable, new: Callable) -> None:
        for module in self._loaded_modules():
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
                elif type(value) is dict:  # a registry
                    value.update({key: new for key, entry in value.items() if entry is old})

    def _loaded_modules(self) -> list[ModuleType]:
        prefix = self.library + "."
        return [m for name, m in list(sys.modules.items()) if m and (name == self.library or name.startswith(prefix))]


@contextmanager
def between(apply: Callable[[], None], undo: Callable[[], None]) -> Iterator[None]:
    """One call before a with-block and the other after it, however it ends."""
    apply()
    try:
        yield
    finally:
        undo()


def _locate(name: str) -> tuple[ModuleType, str]:
    module, _, attribute = name.rpartition(".")
    return importlib.import_module(module), attribute


def _home(function: Callable) -> str:
    """The module it was defined in; for `SomeFunction.apply`, that of SomeFunction."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type):
        function = owner
    claimed = getattr(function, "__module__", "?")
    if isinstance(function, type):  # methods put into the class by somebody else count as a patch of it
        methods = [_home(member) for member in vars(function).values() if hasattr(member, "__globals__")]
        return next((home for home in methods if home != claimed), claimed)
    # functools.wraps copies __module__, so a wrapper is found by its globals. torch.compile's is no patch.
    actual = getattr(function, "__globals__", {}).get("__name__", claimed)
    return claimed if actual.partition(".")[0] == "torch" else actual


def _describe(function: Callable) -> str:
    return getattr(function, "__qualname__", repr(function))
