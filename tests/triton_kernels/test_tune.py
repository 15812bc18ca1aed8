"""The tuner runs from end to end, and what it writes is what the launcher then takes."""

from __future__ import annotations

import json

import pytest
import torch
from fastppo_kernels import launch, tune
from fastppo_kernels.configs import CEILINGS, GEMM, Gemm

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="tries every configuration: a job of its own on a GPU")
WEIGHT = torch.zeros(8, 16)


def test_what_the_tuner_writes_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"another chip": {}}))
    shipped = {kernel: dict(table) for kernel, table in GEMM.items()}
    assert tune.main(["--output", str(path)]) == 0
    assert shipped == GEMM  # the shipped table is as it was
    written = json.loads(path.read_text())
    assert set(written) == {"another chip", "interpreter"}
    assert set(written["interpreter"]["gemm"]) == set(GEMM)

    monkeypatch.setenv("FASTPPO_TUNED", str(path))
    for kernel, entries in written["interpreter"]["gemm"].items():
        assert launch.gemm_config(kernel, torch.float32, WEIGHT, 16) == Gemm(**entries["ieee"])
    assert launch.ceilings(WEIGHT.device)._asdict() == written["interpreter"]["ceilings"]


def test_without_the_variable_the_shipped_configurations_stand(monkeypatch):
    monkeypatch.delenv("FASTPPO_TUNED", raising=False)
    assert (
        launch.gemm_config("logit_gradient", torch.float32, WEIGHT, 16) == GEMM["logit_gradient"]["interpreter", "ieee"]
    )
    assert launch.ceilings(WEIGHT.device) == CEILINGS["interpreter"]


@pytest.mark.parametrize(
    "text", [None, "not json", '{"interpreter": {"gemm": {"logit_gradient": {"ieee": {"x": 1}}}}}']
)
def test_a_file_that_cannot_be_read_is_named_and_passed_over(tmp_path, monkeypatch, text):
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("FASTPPO_TUNED", str(path))
    with pytest.warns(UserWarning, match="FASTPPO_TUNED"):
        config = launch.gemm_config("logit_gradient", torch.float32, WEIGHT, 16)
    assert config == GEMM["logit_gradient"]["interpreter", "ieee"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_candidates_begin_with_the_shipped_one_and_are_few(arch):
    for table in GEMM.values():
        found = tune.candidates(table[arch, "half"], arch, 2)
        assert found[0] == table[arch, "half"]
        assert 5 < len(found) == len(set(found)) < 150
