"""`import fastppo` loads a public name on its first use, and still looks like a module that imported them all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastppo

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_had_and_listed():
    everything: dict = {}
    exec("from fastppo import *", everything)
    for name in fastppo.__all__:
        assert everything[name] is getattr(fastppo, name)
    assert set(fastppo.__all__) <= set(dir(fastppo))
    assert not hasattr(fastppo, "nothing")


@pytest.mark.slow  # torch is imported anew
def test_a_package_comes_with_its_modules():
    code = "import fastppo; fastppo.ops.gae.gae; fastppo.engines.budget.scratch_budget; fastppo.reference.gae"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(fastppo.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(item.module, alias.name) for item in block.body for alias in item.names}
    lazy = {(f"fastppo.{module}", name) for name, module in fastppo._HOME.items()}
    assert seen == lazy | {("fastppo.ops", "reference")}
    assert {name for _, name in seen} == set(fastppo.__all__)


def test_a_first_use_inside_of_torch_compile():
    fastppo.__dict__.pop("selective_logprob", None)
    compiled = torch.compile(lambda x, y: fastppo.selective_logprob(x, y).logprobs, fullgraph=True, backend="eager")
    logits, targets = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2])
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(compiled(logits, targets), expected)


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["--version"], 0), (["train", "--help"], 0), (["trian"], 2), (["train"], 2), ([], 2)],
)
def test_help_and_wrong_usage_load_no_torch(words, status):
    code = "import sys\ntry:\n import fastppo.cli\n fastppo.cli.main(sys.argv[1:])\nfinally:\n print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert not {"torch", "numpy", "pydantic", "transformers"} & set(done.stdout.split())
