"""`Patch` on a small library made for the test: what it replaces, what it refuses, what it restores."""

from __future__ import annotations

import importlib
import sys

import pytest

from fastppo.integrations import patching
from fastppo.integrations.patching import Patch


def replacement():
    return "replacement"


def other_replacement():
    return "other replacement"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """toylib.home defines two functions; toylib.user imports one by name and toylib.registry holds one in a dict."""
    folder = tmp_path / "toylib"
    folder.mkdir()
    files = {
        "__init__": "",
        "home": "def function():\n    return 'own'\n\n\ndef other():\n    return 'other'\n",
        "user": "from toylib.home import function\n",
        "registry": "from toylib import home\n\nTABLE = {'name': home.function, 'other': home.other}\n",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(patching, "version", lambda name: "1.5")
    yield {name: importlib.import_module(f"toylib.{name}") for name in ("home", "user", "registry")}
    for name in [name for name in sys.modules if name.partition(".")[0] == "toylib"]:
        del sys.modules[name]


def results(library) -> list[str]:
    """What each reference to the function gives, and the function that is not replaced."""
    table = library["registry"].TABLE
    return [library["home"].function(), library["user"].function(), table["name"](), table["other"]()]


def test_every_reference_is_replaced_and_restored(library):
    patch = Patch("toylib", ">=1,<2", {"toylib.home.function": replacement})
    with patch.applied():
        assert results(library) == ["replacement", "replacement", "replacement", "other"]
        with pytest.raises(RuntimeError, match="toylib is already patched by fastppo"):
            patch.apply()
    assert results(library) == ["own", "own", "own", "other"]
    with pytest.raises(RuntimeError, match="toylib is not patched by fastppo"):
        patch.undo()


def test_only_the_named_modules_are_changed(library):
    with Patch("toylib", ">=1,<2", {"toylib.home.function": replacement}, only_in=("toylib.user",)).applied():
        assert results(library) == ["own", "replacement", "own", "other"]
    assert results(library) == ["own", "own", "own", "other"]


@pytest.mark.parametrize("only_in", [(), ("toylib.user",)])
def test_another_patch_is_refused_before_and_after(library, monkeypatch, only_in):
    replacements = {} if only_in else {"toylib.home.other": other_replacement}
    patch = Patch("toylib", ">=1,<2", replacements | {"toylib.home.function": replacement}, only_in=only_in)
    place = library["user" if only_in else "home"]
    with monkeypatch.context() as context:
        context.setattr(place, "function", lambda: "foreign")
        with pytest.raises(RuntimeError, match=rf"{place.__name__}.function is .* from {__name__}, not toylib's own"):
            patch.apply()
        assert library["home"].other() == "other"  # all or nothing
    patch.apply()
    with monkeypatch.context() as context:
        context.setattr(place, "function", lambda: "foreign")
        with pytest.raises(RuntimeError, match="another patch was put over it"):
            patch.undo()
    patch.undo()
    assert results(library) == ["own", "own", "own", "other"]


def test_a_version_outside_the_range_is_refused(library):
    patch = Patch("toylib", ">=2", {"toylib.home.function": replacement})
    with pytest.raises(ImportError, match=r"toylib 1.5 is installed, but fastppo supports toylib>=2"):
        patch.apply()
    assert results(library) == ["own", "own", "own", "other"]
