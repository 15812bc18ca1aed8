"""Other projects' kernels for what fastppo computes: what each computes and how to call it.

A peer is a function of the inputs that imports what it needs and returns the call to time; whatever it raises is
reported in its place. None of them has the whole PPO loss: the label says what it computes. Only the files with the
kernels are imported, so that a package's wheel suffices, without the packages that the rest of it needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]
Inputs = dict[str, Tensor]  # hidden [N, D], weight [V, D], targets, advantages, old [N]
ENTROPY_COEF = 0.01


def step(x: Inputs, loss: Callable[[], Tensor]) -> Call:
    """A forward and a backward to hidden and weight."""

    def run() -> None:
        x["hidden"].grad = x["weight"].grad = None
        loss().backward()

    return run


def weighted(x: Inputs, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A scalar that gives every token's log-probability and entropy a gradient of its own."""
    # Each is a product before it is summed: its gradient is then contiguous, which verl's kernel insists on.
    return (x["advantages"] * logprobs.float()).sum() + (ENTROPY_COEF * entropy.float()).sum()


def trl(x: Inputs) -> Call:
    function = trl_kernels("chunked_logprob").ChunkedLogProbFunction
    rest = (None, x["targets"], 1.0, 8192, None, 1.0, ("entropy",))
    return step(x, lambda: weighted(x, *function.apply(x["hidden"], x["weight"], *rest)[:2]))


def verl_kernel(x: Inputs) -> Call:
    with_bare_packages("verl", "verl.utils", "verl.utils.kernel", "verl.plugin")
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    importlib.import_module("verl.utils.kernel.kernels")  # what it would import on its first call
    return step(
        x, lambda: weighted(x, *module.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], 1.0, "none"))
    )


def verl_chunks(x: Inputs) -> Call:
    with_bare_packages("verl", "verl.utils", "verl.utils.experimental")
    fused = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    return step(x, lambda: weighted(x, *fused(x["hidden"], x["weight"], x["targets"])))


def liger_scaled(x: Inputs) -> Call:
    """On Hopper its CuTe-DSL kernels, which need the package nvidia-cutlass-dsl."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    return _liger_scaled(x, module.LigerFusedLinearScaledCrossEntropyFunction)


def liger_scaled_chunks(x: Inputs) -> Call:
    """What the same function does on chips for which it has no kernels."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    class Fallback:
        @staticmethod
        def apply(hidden, weight, targets, *, temperature, return_entropy):
            return module._FusedLinearPPOFallbackFunction.apply(
                hidden, weight, targets, temperature, -100, return_entropy
            )

    return _liger_scaled(x, Fallback)


def _liger_scaled(x: Inputs, function) -> Call:
    def loss() -> Tensor:
        nll, entropy = function.apply(x["hidden"], x["weight"], x["targets"], temperature=1.0, return_entropy=True)
        return weighted(x, -nll, entropy)

    return step(x, loss)


def liger_grpo(x: Inputs) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    rows = {
        "attention_mask": torch.ones_like(x["targets"]).unsqueeze(0),
        "advantages": x["advantages"][:1],
        "old_per_token_logps": x["old"].unsqueeze(0),
    }
    return step(x, lambda: loss(x["hidden"].unsqueeze(0), x["weight"], x["targets"].unsqueeze(0), **rows)[0])


def liger_cross_entropy(x: Inputs) -> Call:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return step(x, lambda: LigerFusedLinearCrossEntropyFunction.apply(x["hidden"], x["weight"], x["targets"])[0])


def cut_cross_entropy(x: Inputs) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if x["hidden"].is_cuda else "torch_compile"
    return step(x, lambda: linear_cross_entropy(x["hidden"], x["weight"], x["targets"], impl=implementation))


def quack(x: Inputs) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return step(x, lambda: chunked_linear_cross_entropy(x["hidden"], x["weight"], x["targets"]))


def pytorch(x: Inputs) -> Call:
    function = F.linear_cross_entropy  # an AttributeError before PyTorch 2.13
    return step(x, lambda: function(x["hidden"], x["weight"], x["targets"]))


# Label -> peer; the label says what it computes, each with the gradients of hidden and weight.
LOG_PROBS: dict[str, Callable[[Inputs], Call]] = {
    "TRL chunked, log-probs and entropy": trl,
    "verl kernel, log-probs and entropy": verl_kernel,
    "verl chunks, log-probs and entropy": verl_chunks,
    "Liger scaled, log-probs and entropy": liger_scaled,
    "Liger scaled chunks, log-probs and entropy": liger_scaled_chunks,
    "Liger GRPO loss, no entropy": liger_grpo,
    "Liger, cross-entropy only": liger_cross_entropy,
    "cut-cross-entropy, cross-entropy only": cut_cross_entropy,
    "QuACK, cross-entropy only": quack,
    "PyTorch, cross-entropy only": pytorch,
}


def trl_kernels(name: str) -> ModuleType:
    """A module of trl.kernels. Its backward takes one context manager from trl.trainer.utils, which needs `datasets`.

    Where that cannot be imported, a stand-in has the context manager as it is without DeepSpeed: empty.
    """
    module = importlib.import_module(f"trl.kernels.{name}")
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:
        stand_in = ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
        sys.modules["trl.trainer.utils"] = stand_in
    return module


def with_bare_packages(*names: str) -> None:
    """Let modules of these packages be imported without running the packages' own `__init__.py`."""
    for name in names:
        if name in sys.modules:
            continue
        parent, _, last = name.rpartition(".")
        if parent:
            folder = Path(sys.modules[parent].__path__[0]) / last
        else:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}")
            folder = Path(spec.submodule_search_locations[0])
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
