from __future__ import annotations

import re
from pathlib import Path

from fastppo import extras

ROOT = Path(__file__).parents[1]


def test_the_command_works_in_a_source_tree_and_in_an_installation(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert extras.install_command("trl") == 'pip install -e ".[trl]"'
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("trl") == f'pip install -e "{ROOT}[trl]"'
    monkeypatch.setattr(extras, "_ROOT", tmp_path)  # as in site-packages, where pip finds fastppo installed
    assert extras.install_command("trl") == 'pip install "fastppo[trl]"'


def test_every_message_names_an_extra_that_exists_by_that_command():
    extras_known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for path in (ROOT / "fastppo").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert path.stem == "extras" or not re.search(r"fastppo\[\w", source), path
        assert set(re.findall(r"install_command\(['\"](\w+)", source)) <= set(extras_known), path
