"""The tuner runs from end to end, and what it writes is what the launcher then takes."""

from __future__ import annotations

import json

import pytest
import torch
from fastppo_kernels import launch, tune
from fastppo_kernels.configs import CEILINGS, GEMM, Gemm

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="tries every configuration: a job of its own on a GPU")
CPU = torch.device("cpu")


def shipped(kernel: str) -> Gemm:
    return launch.gemm_config(kernel, torch.float32, CPU)


def test_what_the_tuner_writes_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"another chip": {}}))
    before = {kernel: dict(table) for kernel, table in GEMM.items()}
    assert tune.main(["--output", str(path)]) == 0
    assert before == GEMM  # the shipped table is as it was
    written = json.loads(path.read_text())
    assert set(written) == {"another chip", "interpreter"}
    assert set(written["interpreter"]["gemm"]) == set(GEMM)

    monkeypatch.setenv("FASTPPO_TUNED", str(path))
    for kernel, entries in written["interpreter"]["gemm"].items():
        assert shipped(kernel) == Gemm(**entries["ieee"])
    assert launch.ceilings(CPU)._asdict() == written["interpreter"]["ceilings"]


def test_without_the_variable_the_shipped_configurations_stand(monkeypatch):
    monkeypatch.delenv("FASTPPO_TUNED", raising=False)
    assert shipped("logit_gradient") == GEMM["logit_gradient"]["interpreter", "ieee"]
    assert launch.ceilings(CPU) == CEILINGS["interpreter"]


@pytest.mark.parametrize(
    "text", [None, "not json", '{"interpreter": {"gemm": {"logit_gradient": {"ieee": {"x": 1}}}}}']
)
def test_a_file_that_cannot_be_read_is_named_and_passed_over(tmp_path, monkeypatch, text):
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("FASTPPO_TUNED", str(path))
    with pytest.warns(UserWarning, match="FASTPPO_TUNED"):
        config = shipped("logit_gradient")
    assert config == GEMM["logit_gradient"]["interpreter", "ieee"]


def test_trials_compare_with_the_shipped_configuration_and_leave_the_table_alone():
    before = dict(GEMM["logit_gradient"])
    rows = []
    for row in tune.trials("logit_gradient", CPU, 60.0):
        assert before == GEMM["logit_gradient"]
        rows.append(row)
    assert [row["config"] for row in rows] == tune.candidates("logit_gradient", "interpreter", "ieee")
    assert rows[0]["config"] == before["interpreter", "ieee"]
    for row in rows:
        assert (row["kernel"], row["precision"], row["error"]) == ("logit_gradient", "ieee", "")
        assert row["ms"] > 0
        assert row["ratio_to_shipped"] == row["ms"] / rows[0]["ms"]


def test_a_trial_that_fails_is_reported_and_the_next_one_runs(monkeypatch):
    first = GEMM["logit_gradient"]["interpreter", "ieee"]

    def fail_once(function, device):
        if GEMM["logit_gradient"]["interpreter", "ieee"] == first:
            raise RuntimeError("out of resources")
        return 0.5

    monkeypatch.setattr(tune, "median_seconds", fail_once)
    failed, other = tune.trials("logit_gradient", CPU, 60.0)
    assert failed["error"] == "RuntimeError: out of resources"
    assert (failed["ms"], failed["ratio_to_shipped"]) == (None, None)
    assert other["ms"] == 500.0
    assert other["ratio_to_shipped"] is None  # there is nothing to compare with
    assert GEMM["logit_gradient"]["interpreter", "ieee"] == first


def test_a_configuration_that_computes_something_else_is_not_timed(monkeypatch):
    first = GEMM["logit_gradient"]["interpreter", "ieee"]
    results = {True: torch.randn(5, 7), False: torch.randn(5, 7)}

    def run():
        return [results[GEMM["logit_gradient"]["interpreter", "ieee"] == first]]

    monkeypatch.setattr(tune, "runs", lambda inputs: {"logit_gradient": run})
    right, wrong = tune.trials("logit_gradient", CPU, 60.0)
    assert right["error"] == ""
    assert "differs" in wrong["error"]
    assert wrong["ms"] is None


def test_trials_stop_in_time(monkeypatch):
    """No trial is begun that, lasting as long as the longest before it, would end too late."""
    clock = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tune, "candidates", lambda *_: [GEMM["logit_gradient"]["interpreter", "ieee"]] * 10)

    def take(function, device):
        clock[0] += 3.0
        return 3.0

    monkeypatch.setattr(tune, "median_seconds", take)
    assert len(list(tune.trials("logit_gradient", CPU, 10.0))) == 3
    assert clock[0] == 9.0
    assert list(tune.trials("logit_gradient", CPU, -1.0)) == []


def test_a_configuration_as_code_is_the_configuration():
    config = GEMM["logit_gradient"]["sm_90", "half"]._replace(group_m=5, per_processor=2)
    assert eval(f"{{{tune.as_code('logit_gradient', 'sm_90', 'half', config)}\n}}", {"Gemm": Gemm}) == {
        ("sm_90", "half"): config
    }


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_candidates_begin_with_the_shipped_one_and_are_few(arch):
    for kernel, table in GEMM.items():
        for precision in tune.PRECISIONS:
            if (arch, precision) in table:
                found = tune.candidates(kernel, arch, precision)
                assert found[0] == table[arch, precision]
                assert len(found) == len(set(found)) <= 10
