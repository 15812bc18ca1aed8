"""Imports point one way: no module imports from a layer above its own.

The sources are parsed, not run, so imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. Rooms of one layer do not import each other.
LAYERS = [
    {"errors"},
    {"extras", "config_fields", "fastppo_kernels", "_C"},
    {"engines"},
    {"ops"},
    {"models"},
    {"rollout", "algorithms"},
    {"training"},
    {"integrations"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
COMMAND = {"cli", "doctor", "__main__"}  # one room, "cli"

# fastppo/__init__.py, the public names, stands beside the layers and loads a name on its first use.
PACKAGE = "fastppo"
PACKAGE_IMPORTS = {"engines", "ops", "integrations"}
IMPORTS_PACKAGE = {"training", "integrations", "cli"}

# Libraries outside of Python's own that a room may import; rooms not listed here may import any.
LIBRARIES = {
    "fastppo_kernels": {"torch", "triton", "numpy"},
    "engines": {"torch", "triton"},
    "ops": {"torch"},
    PACKAGE: set(),
    "extras": set(),
    "config_fields": {"pydantic", "pydantic_core"},
    "errors": set(),
}


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if "fastppo_kernels" in path.parts else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = sorted([*(ROOT / "fastppo").rglob("*.py"), *(ROOT / "kernels" / "fastppo_kernels").rglob("*.py")])
MODULES = {module_name(path): path for path in PATHS}


def room(module: str) -> str:
    """`fastppo.ops.gae` -> `ops`; a library -> its name."""
    first, _, rest = module.partition(".")
    if first != "fastppo" or not rest:
        return first
    name = rest.partition(".")[0]
    return "cli" if name in COMMAND else name


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name) of every module that `module` imports, by a statement or by import_module("a constant")."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield node.lineno, name if name in MODULES or name == "fastppo._C" else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def allowed(importer: str, target: str) -> bool:
    """Whether a module in the room `importer` may import one in `target`, or the library `target`."""
    if importer == target or target in sys.stdlib_module_names:
        return True
    if target != PACKAGE and target not in HEIGHT:
        return target in LIBRARIES.get(importer, {target})
    if importer == PACKAGE:
        return target in PACKAGE_IMPORTS
    if target == PACKAGE:
        return importer in IMPORTS_PACKAGE
    return HEIGHT[target] < HEIGHT[importer]


def back_arrows(module: str, source: str) -> list[str]:
    return [
        f"{module}, line {line}, imports {name}: {room(module)} may not import {room(name)}"
        for line, name in imported(module, ast.parse(source))
        if not allowed(room(module), room(name))
    ]


def test_every_module_has_a_layer():
    assert {room(module) for module in MODULES} - {PACKAGE} <= set(HEIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_from_above_its_layer(module):
    found = back_arrows(module, MODULES[module].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastppo.ops.gae", "from fastppo.models import head"),
        ("fastppo.ops.gae", "if TYPE_CHECKING:\n    from fastppo.training.config import Config"),
        ("fastppo.ops.gae", "def f():\n    import fastppo.algorithms.ppo"),
        ("fastppo.ops.gae", "def f():\n    importlib.import_module('fastppo.models.load')"),
        ("fastppo.ops.gae", "from ..models import load"),
        ("fastppo.ops.gae", "import transformers"),
        ("fastppo.ops.gae", "import fastppo"),
        ("fastppo.engines.cpu", "from fastppo import scratch_budget"),
        ("fastppo.engines.cpu", "from fastppo.ops import checks"),
        ("fastppo.algorithms.ppo", "import fastppo.rollout.sample"),
        ("fastppo.training.trainer", "from fastppo import doctor"),
        ("fastppo.training.trainer", "from fastppo.integrations import trl"),
        ("fastppo", "from fastppo.models import load"),
        ("fastppo_kernels.gae", "from fastppo.engines import budget"),
        ("fastppo_kernels.gae", "import transformers"),
    ],
)
def test_a_back_arrow_is_found(module, source):
    assert len(back_arrows(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastppo.ops.gae", "import math\nimport torch\nfrom fastppo.engines import dispatch\nfrom . import checks"),
        ("fastppo.engines.cpu", "from fastppo import _C\nimport fastppo_kernels.gae"),
        ("fastppo.algorithms.ppo", "import transformers\nfrom fastppo.models.head import LMHead"),
        ("fastppo.training.trainer", "import fastppo\nfrom fastppo import __version__\nimport fastppo.rollout.sample"),
        ("fastppo.cli", "from fastppo import doctor\nfrom fastppo.integrations import trl"),
    ],
)
def test_an_arrow_that_points_down_is_allowed(module, source):
    assert back_arrows(module, source) == []
