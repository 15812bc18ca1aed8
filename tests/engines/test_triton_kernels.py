"""What surrounds the Triton kernels: their tests in the interpreter, the gate, budgets and the tuner."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastppo
from fastppo.engines import dispatch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_agree_with_float64_in_the_interpreter(interpreted_kernels):
    """tests/triton_kernels, which began with the other tests: see conftest.py."""
    status = interpreted_kernels.process.wait()
    interpreted_kernels.output.seek(0)
    assert status == 0, interpreted_kernels.output.read()[-8000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter multiplies in float32 always")
def test_float32_is_multiplied_as_pytorch_is_told_to():
    """In a process of its own: PyTorch's older and newer switches exclude each other."""
    code = """
import torch
from fastppo_kernels import launch

def show(arch="sm_90", dtype=torch.float32):
    with launch.recording(arch, None):
        print(launch.precision(dtype))

show()
for name in ("high", "highest"):
    torch.set_float32_matmul_precision(name)
    show()
for allowed in (True, False):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    show()
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
else:
    torch.backends.cuda.matmul.allow_tf32 = True
show()
show(dtype=torch.bfloat16)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ieee", "tf32", "ieee", "tf32", "ieee", "tf32", "half"]


def test_a_preference_that_cannot_be_met_is_explained_once(monkeypatch):
    """FASTPPO_BACKEND falls back, with one warning whatever the operator; an argument is refused."""
    monkeypatch.setenv("FASTPPO_BACKEND", "triton")
    monkeypatch.setattr(dispatch.triton_kernels, "why_unusable", lambda device, dtype: "there is no such chip")
    monkeypatch.setattr(dispatch, "_warned", set())
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fastppo.linear_logprob(hidden, weight, targets)
            fastppo.gae(torch.randn(2, 3), torch.randn(2, 3), gamma=1.0, lam=1.0)
    assert [str(w.message).count("there is no such chip") for w in caught] == [1]
    with pytest.raises(ValueError, match="there is no such chip"):
        fastppo.linear_logprob(hidden, weight, targets, backend="triton")


def a_launch(arch: str = "sm_90", case: str = "half", **changes):
    from fastppo_kernels import aot

    launch = aot.Launch(
        arch=arch,
        name="logit_gradient",
        case=case,
        kernel="module:kernel",
        signature=(("hidden", "tensordesc<bf16[128, 64]>"), ("bias", "*fp32")),
        constants=(("PRECISION", "ieee"), ("BLOCK_M", 128), ("BLOCK_N", 128), ("BLOCK_K", 64)),
        attributes=(),
        options=(("num_warps", 8),),
    )
    return launch._replace(**changes)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((9, 0), "triton"), ((8, 0), "chunked"), ((10, 0), "chunked"), ((12, 0), "chunked")]
)
def test_the_kernels_are_the_default_on_the_chips_that_they_were_measured_on(monkeypatch, capability, chosen):
    monkeypatch.delenv("FASTPPO_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(dispatch.triton_kernels, "why_unusable", lambda device, dtype: None)
    assert dispatch.select("linear_ppo_loss", torch.device("cuda"), torch.bfloat16) == chosen
    assert dispatch.select("linear_ppo_loss", torch.device("cpu"), torch.bfloat16) != "triton"


def test_without_a_compiler_for_their_launchers_another_backend_is_taken(monkeypatch):
    from fastppo_kernels import launch

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert "install gcc" in launch._no_launchers.__wrapped__()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_gate_fails_on_what_it_is_there_for(arch):
    from fastppo_kernels import aot

    instruction = aot.TENSOR_CORE[arch]
    good = aot.Report(
        a_launch(arch),
        registers=200,
        shared_bytes=aot.SHARED_LIMIT[arch],
        tensor_core=instruction,
        wide_loads=True,
    )
    assert good.failures() == []
    assert good._replace(wide_loads=False).failures() == ["no 16-byte loads"]
    assert good._replace(spill_bytes=8).failures() == ["spills 8 bytes"]
    assert "shared memory" in good._replace(shared_bytes=aot.SHARED_LIMIT[arch] + 1).failures()[0]
    assert "tensor memory" in good._replace(tensor_memory=513).failures()[0]
    assert good._replace(tensor_core="-").failures() == [f"no {instruction}"]
    assert good._replace(error="it broke").failures() == ["it broke"]


def test_only_products_in_true_float32_may_do_without_tensor_cores():
    from fastppo_kernels import aot

    for signature, precision, wanted in (
        ((("hidden", "tensordesc<fp32[64, 16]>"),), "ieee", False),
        ((("hidden", "*fp32"),), "tf32", True),
        ((("hidden", "*fp16"),), "ieee", True),
    ):
        constants = (("PRECISION", precision), ("BLOCK_K", 16))
        report = aot.Report(a_launch(signature=signature, constants=constants), wide_loads=True)
        assert bool(report.failures()) == wanted


def test_a_kernel_over_its_budget_fails(monkeypatch):
    from fastppo_kernels import budgets

    budget = {"registers": 200, "shared": 100_000, "tensor_core": 8, "loop": 100, "other": 1000, "special": 128}
    known = {budgets.VERSION: {"sm_90": {"budgets": {"logit_gradient half": budget}}}}
    monkeypatch.setattr(budgets, "read", lambda: known)
    assert budgets.excess("sm_90", "logit_gradient half", budget) == []
    assert budgets.excess("sm_90", "logit_gradient half", budget | {"other": 1100, "tensor_core": 4}) == []
    for name in ("registers", "shared", "loop", "other", "special"):
        value = budget[name] * 6 // 5
        assert budgets.excess("sm_90", "logit_gradient half", budget | {name: value}) == [
            f"{name} {value}, its budget is {budget[name]}"
        ]
    assert budgets.excess("sm_90", "logit_gradient tf32", budget) == ["has no budget: run --write-budgets"]
    assert budgets.excess("sm_80", "logit_gradient half", budget) == ["has no budget: run --write-budgets"]
    monkeypatch.setattr(budgets, "VERSION", "0.0")
    assert budgets.excess("sm_80", "logit_gradient half", budget) == []  # a Triton nobody has measured


def test_what_is_written_of_budgets_and_candidates_is_read(monkeypatch, tmp_path):
    from fastppo_kernels import budgets
    from fastppo_kernels.configs import Gemm

    monkeypatch.setattr(budgets, "PATH", tmp_path / "budgets.json")
    good, bad = Gemm(128, 256, 64, warps=4, stages=3), Gemm(128, 256, 64, warps=8, stages=9)
    figures = dict.fromkeys(("registers", "shared", "tensor_core", "loop", "other", "special"), 100)
    key = ("logit_gradient", "sm_90", "half")
    budgets.write({("sm_90", "logit_gradient half"): figures}, {(*key, good): True, (*key, bad): False})
    assert budgets.excess("sm_90", "logit_gradient half", figures) == []
    assert budgets.excess("sm_90", "logit_gradient half", figures | {"loop": 200}) != []
    assert budgets.candidates(*key) == [good]
    assert budgets.candidates("logit_gradient", "sm_80", "half") == []

    first, both = budgets.VERSION, Gemm(64, 64, 64, warps=4, stages=3)
    monkeypatch.setattr(budgets, "VERSION", "0.1")
    budgets.write({("sm_90", "logit_gradient half"): figures}, {(*key, bad): True, (*key, both): True})
    assert budgets.candidates(*key) == [bad, both]
    monkeypatch.setattr(budgets, "VERSION", first)
    budgets.write({("sm_90", "logit_gradient half"): figures}, {(*key, good): True, (*key, both): True})
    monkeypatch.setattr(budgets, "VERSION", "0.2")
    assert budgets.candidates(*key) == [both]  # what every Triton that was asked compiles


def test_every_shipped_configuration_has_a_budget():
    from fastppo_kernels import aot, budgets

    known = budgets.read()
    assert {"3.6", "3.9"} <= set(known)
    for version, of_version in known.items():
        for arch in aot.SHARED_LIMIT:
            written = set(of_version[arch]["budgets"])
            for kernel in aot.GEMM:
                missing = {f"{kernel} {precision}" for precision in aot.precisions(kernel, arch)} - written
                assert not missing, (version, arch)


def test_loops_around_products_are_told_from_the_rest():
    from fastppo_kernels import machine_code

    def text(*lines: str) -> str:
        numbered = (line if line.startswith(".L") else f"        /*{i:04x}*/ {line} ;" for i, line in enumerate(lines))
        return "\n".join(numbered)

    nested = text(
        "S2R R0, SR_TID.X",
        ".L_x_1:",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",  # an iteration that was peeled off
        ".L_x_0:",
        "SYNCS R1",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "UTCHMMA gdesc[UR22], gdesc[UR20]",
        "@!P1 BRA `(.L_x_0)",
        "MUFU.EX2 R3, R3",
        "@P0 FADD R3, R3, R4",
        "@!UP2 BRA.U `(.L_x_1)",
        "@P3 BRA `(.L_x_2)",
        "MUFU.RCP R3, R3",
        ".L_x_2:",
        "EXIT",
        ".L_x_3:",
        "BRA `(.L_x_3)",
        "NOP",
    )
    assert machine_code.count_instructions(nested) == (3, 2, 8, 2)

    without = text("FFMA R0, R0, R0, R0", ".L_x_0:", *["FFMA R0, R0, R0, R0"] * 4, "@P0 BRA `(.L_x_0)", "EXIT")
    assert machine_code.count_instructions(without) == (0, 5, 2, 0)
    assert machine_code.count_instructions(text("FADD R0, R0, R0", "EXIT")) == (0, 0, 2, 0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_arguments_are_specialized_as_the_compiler_would(tmp_path, monkeypatch):
    """Against Triton's own binder; what a kernel asks not to be specialized for leaves no trace."""
    (tmp_path / "some_kernel.py").write_text(
        "import triton\nimport triton.language as tl\n\n"
        "@triton.jit(do_not_specialize=['count'], do_not_specialize_on_alignment=['x', 'width'])\n"
        "def kernel(x, y, described, count, width, stride, big, factor, absent, BLOCK: tl.constexpr):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from fastppo_kernels import aot
    from some_kernel import kernel
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    described = TensorDescriptor.from_tensor(x, [16, 64])
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(aot.target("sm_90")))
    seen = set()
    for number in (1, 7, 16, 48):
        arguments = (x, x, described, number, number, number, 2**40, 0.5, None)
        launch = aot.specialize("sm_90", "", "case", kernel, arguments, {"BLOCK": 64, "num_warps": 8})
        _, expected, options = bind(*arguments, BLOCK=64, num_warps=8)
        signature, constants, attributes = dict(launch.signature), dict(launch.constants), dict(launch.attributes)
        assert list(signature.values()) == [kind for kind, _ in expected]
        assert constants.keys() == {name for name, kind in signature.items() if kind == "constexpr"}
        keys = [key for kind, key in expected]
        assert attributes == {i: key for i, key in enumerate(keys) if isinstance(key, str) and key}
        assert dict(launch.options) == options == {"num_warps": 8}
        assert launch.name == "kernel"
        assert (signature["count"], 3 in attributes) == ("i32", False)
        assert {0, 4}.isdisjoint(attributes)
        assert (5 in attributes) == (number in (16, 48))
        assert ("stride" in constants) == ("width" in constants) == (number == 1)
        assert (signature["big"], signature["absent"]) == ("i64", "constexpr")
        seen.add((signature["count"], 3 in attributes))
    assert len(seen) == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_a_compiler_that_aborts_is_survived(tmp_path, monkeypatch):
    (tmp_path / "some_kernels.py").write_text(
        "import os\nimport triton\n\n"
        "@triton.jit\ndef kernel(x):\n    pass\n\n"
        "class Aborting:\n    def __getattr__(self, name):\n        os.abort()\n\n"
        "aborting = Aborting()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "kernels")]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from fastppo_kernels import aot

    good = a_launch(kernel="some_kernels:kernel", signature=(("x", "*fp32"),), constants=())
    launches = [good, good._replace(kernel="some_kernels:aborting"), good._replace(budget="kernel")]
    first, second, third = aot.compile_all(launches, jobs=1)
    assert second.error == "the compiler aborted"
    assert [report.launch for report in (first, second, third)] == launches
    assert first.failures() == third.failures() == []
    assert first.registers > 0
    assert (first.counts, third.counts.other > 0) == (None, True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_a_kernel_that_computes_in_float64_fails_unless_it_is_meant_to(tmp_path, monkeypatch):
    (tmp_path / "squared.py").write_text(
        "import triton\nimport triton.language as tl\n\n"
        "@triton.jit\ndef kernel(x, WIDE: tl.constexpr):\n"
        "    value = tl.load(x).to(tl.float64 if WIDE else tl.float32)\n"
        "    tl.store(x, value * value + 1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "kernels")]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from fastppo_kernels import aot

    signature = (("x", "*fp32"), ("WIDE", "constexpr"))
    launch = a_launch(kernel="squared:kernel", signature=signature, constants=())
    launches = [launch._replace(constants=(("WIDE", wide),)) for wide in (True, False)]
    wide, narrow = aot.compile_all(launches, jobs=1)
    assert wide.failures() == ["computes in float64"]
    assert narrow.failures() == []
    monkeypatch.setattr(aot, "FLOAT64", ("squared:kernel",))
    assert wide.failures() == []
