"""What the documentation says of memory: examples fit where their names say, and the table is current."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastppo.training.config import load_config
from fastppo.training.plan.phases import Machine, memory_of

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples/large").glob("*.yaml"))


@pytest.fixture
def what_fits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import what_fits

    yield what_fits
    sys.modules.pop("what_fits")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_where_its_name_says(path, what_fits):
    processes, card = re.search(r"_(?:(\d+)x)?(\d+)gb$", path.stem).groups()
    name = load_config(path).model.name_or_path.rpartition("/")[2].removesuffix("-Instruct")
    config = load_config(path, [f"--model.name_or_path={ROOT / 'tests/configurations' / name}"])
    machine = Machine("cuda", int(what_fits.CARDS[f"{card} GB"] * 2**30), int(processes or 1))
    needs = memory_of(config, machine).peak.total
    assert 0.3 * machine.memory < needs < 0.95 * machine.memory  # the plan is within 10% of what was measured


def test_the_table_has_a_row_for_every_model_and_way(what_fits):
    found = re.findall(r"^\| (\S+) \| ([^|]+) \| .* \| planned \|$", what_fits.PAGE.read_text(), re.MULTILINE)
    assert found == [(model, way) for model in what_fits.MODELS for way in what_fits.WAYS]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "way"), [("Llama-3.2-1B", "nf4"), ("Llama-3.2-1B", "full")])
def test_rows_of_the_table_are_what_is_planned_today(what_fits, model, way):
    """`python benchmarks/what_fits.py --write` writes them all."""
    assert what_fits.row(model, way) in what_fits.PAGE.read_text().splitlines()
