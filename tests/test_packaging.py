"""What an installation holds, and that the folder `kernels/` never stands in the way of Hugging Face's package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An editable installation puts a finder of its own before sys.path; here only sys.path shall count.
PLAIN_IMPORTS = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"


def python(code, *path, cwd=ROOT, env=()):
    """What `code` prints in a fresh interpreter with `path` first on sys.path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **dict(env)}
    command = [sys.executable, "-c", PLAIN_IMPORTS + code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_kernels_folder_is_no_package():
    assert not list((ROOT / "kernels").glob("*.py"))


def test_a_package_named_kernels_wins_over_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    # The root comes twice before it: as the current directory and on the path.
    assert python("import kernels; print(kernels.__file__)", ROOT, tmp_path) == str(tmp_path / "kernels/__init__.py")


def test_hugging_face_kernels_wins_over_the_folder():
    try:
        installed = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    assert python("import kernels; print(kernels.__file__)", ROOT) == str(installed)
    assert python("import kernels, fastppo_kernels; print(kernels.__file__)", ROOT, ROOT / "kernels") == str(installed)


def test_transformers_does_not_take_the_folder_for_the_package():
    pytest.importorskip("transformers")
    try:
        expected = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        expected = "none"
    code = (
        "from transformers.utils.import_utils import _is_package_available as available\n"
        "is_there, version = available('kernels', return_version=True)\n"
        "print(version if is_there else 'none')"
    )
    assert python(code, ROOT) == expected


@pytest.fixture
def pure_tree(tmp_path):
    """A copy of the source tree without anything compiled."""
    source_only = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    for package in ("fastppo", "kernels/fastppo_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=source_only)
    return tmp_path


def test_pure_tree_works_and_says_once_that_it_is_slower(pure_tree):
    code = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastppo
    from fastppo.engines import extension
    r = torch.ones(2, 3)
    results = [fastppo.gae(r, r, gamma=1.0, lam=0.5).returns for _ in range(3)]
assert extension.load() is None and "not built" in extension.why_missing()
assert torch.equal(results[0], torch.tensor([[2.5, 2.0, 1.0]] * 2))
assert len([w for w in caught if issubclass(w.category, fastppo.FastPPOWarning)]) == 1
assert not [name for name in ("transformers", "pydantic", "fastppo.training") if name in sys.modules]
print(fastppo.__file__)
"""
    assert python(code, pure_tree, pure_tree / "kernels", cwd=pure_tree) == str(pure_tree / "fastppo/__init__.py")


def test_kernels_package_stands_alone(pure_tree):
    code = "import sys, fastppo_kernels; print(fastppo_kernels.__file__, 'fastppo' in sys.modules)"
    expected = f"{pure_tree / 'kernels/fastppo_kernels/__init__.py'} False"
    assert python(code, pure_tree / "kernels", cwd=pure_tree / "kernels") == expected


def test_a_broken_extension_is_reported_not_raised(pure_tree):
    (pure_tree / f"fastppo/_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    code = "from fastppo.engines import extension; print(extension.load(), extension.why_missing())"
    said = python(code, pure_tree, cwd=pure_tree)
    assert said.startswith("None fastppo._C does not load: ")
    assert len(said.splitlines()) == 1


BUILD = """
import sys
from scikit_build_core.build import build_wheel
# Unoptimized, which halves the time; .ci/run builds the wheel as it is shipped.
print(build_wheel(sys.argv[1], {"build-dir": sys.argv[2], "cmake.build-type": "Debug"}))
"""


def build_wheel(tmp_path, **env):
    for module in ("scikit_build_core", "nanobind"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-c", BUILD, str(tmp_path), str(tmp_path / "build")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def check_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastppo", "fastppo_kernels"}
    for source in ("fastppo", "kernels/fastppo_kernels"):
        python_files = [str(p.relative_to((ROOT / source).parent)) for p in (ROOT / source).rglob("*.py")]
        assert set(python_files) <= set(names)
    assert {"fastppo/py.typed", "fastppo_kernels/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    return [name for name in names if name.endswith((".so", ".pyd"))]


def test_without_a_compiler_the_wheel_is_pure_python(tmp_path):
    wheel = build_wheel(tmp_path, CXX=shutil.which("false"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert check_wheel(wheel) == []


@pytest.mark.slow
def test_wheel_holds_the_extension_once(tmp_path):
    compiled = check_wheel(build_wheel(tmp_path))
    assert len(compiled) == 1
    assert compiled[0].startswith("fastppo/_C.")


@pytest.mark.parametrize("module", ["aot", "tune"])
def test_a_kernel_tool_without_triton_says_so_in_one_line(module):
    without = "import runpy, sys; sys.modules['triton'] = None; "
    without += f"runpy.run_module('fastppo_kernels.{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT / "kernels", capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(rf"fastppo_kernels\.{module}: .*pip install triton\n", done.stderr)


@pytest.mark.slow
def test_help_of_the_example_makes_no_folder(tmp_path):
    command = [sys.executable, ROOT / "examples" / "make_tiny_run.py", "--help"]
    assert "usage: make_tiny_run.py" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert not list(tmp_path.iterdir())
