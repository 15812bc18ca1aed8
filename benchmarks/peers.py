"""Other projects' kernels for the operators of fastppo, where installed: what each computes and how to call it.

A peer is a function without arguments that imports what it needs and returns the call to time; whatever it raises is
reported in its place. None of them has the whole PPO loss: the label says what it computes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]
Inputs = dict[str, Tensor]


def step(x: Inputs, loss: Callable[[], Tensor]) -> Call:
    """A forward and a backward to hidden and weight."""

    def run() -> None:
        x["hidden"].grad = x["weight"].grad = None
        loss().backward()

    return run


def log_probs(x: Inputs) -> dict[str, Callable[[], Call]]:
    """Per-token log-probabilities and entropies with both gradients, or the cross-entropy where that is all."""
    hidden, weight, targets, g = x["hidden"], x["weight"], x["targets"], x["advantages"]

    def both(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return (g * logprobs.float()).sum() + 0.01 * entropy.float().sum()

    def trl() -> Call:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def loss() -> Tensor:
            out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",))
            return both(out[0], out[1])

        return step(x, loss)

    def verl_kernel() -> Call:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return step(x, lambda: both(*linear_cross_entropy(hidden, weight, targets, 1.0, "none")))

    def verl_chunks() -> Call:
        fused = _module_alone("verl", "utils/experimental/torch_functional.py").FusedLinearForPPO()
        return step(x, lambda: both(*fused(hidden, weight, targets)))

    def liger_scaled() -> Call:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        def loss() -> Tensor:
            nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
                hidden, weight, targets, temperature=1.0, return_entropy=True
            )
            return both(-nll, entropy)

        return step(x, loss)

    def liger_grpo() -> Call:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
        rows = {
            "attention_mask": torch.ones_like(targets).unsqueeze(0),
            "advantages": g[:1],
            "old_per_token_logps": x["old"].unsqueeze(0),
        }
        return step(x, lambda: loss(hidden.unsqueeze(0), weight, targets.unsqueeze(0), **rows)[0])

    def liger_cross_entropy() -> Call:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        function = LigerFusedLinearCrossEntropyLoss()
        return step(x, lambda: function(weight, hidden, targets))

    def cce() -> Call:
        from cut_cross_entropy import linear_cross_entropy

        implementation = "cce" if hidden.is_cuda else "torch_compile"
        return step(x, lambda: linear_cross_entropy(hidden, weight, targets, impl=implementation))

    def quack() -> Call:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return step(x, lambda: chunked_linear_cross_entropy(hidden, weight, targets))

    def pytorch() -> Call:
        return step(x, lambda: F.linear_cross_entropy(hidden, weight, targets))

    found = {
        ("trl", "TRL chunked, log-probs and entropy"): trl,
        ("verl", "verl kernel, log-probs and entropy"): verl_kernel,
        ("verl", "verl chunks, log-probs and entropy"): verl_chunks,
        ("liger_kernel", "Liger scaled, log-probs and entropy"): liger_scaled,
        ("liger_kernel", "Liger GRPO loss, no entropy"): liger_grpo,
        ("liger_kernel", "Liger, cross-entropy only"): liger_cross_entropy,
        ("cut_cross_entropy", "cut-cross-entropy, cross-entropy only"): cce,
        ("quack", "QuACK, cross-entropy only"): quack,
    }
    installed = {f"peer: {label}": make for (package, label), make in found.items() if _installed(package)}
    if hasattr(F, "linear_cross_entropy"):
        installed["peer: PyTorch linear_cross_entropy, cross-entropy only"] = pytorch
    return installed


def divergence(x: Inputs) -> dict[str, Callable[[], Call]]:
    """KL(policy ‖ reference) of two heads, with gradients."""

    def trl() -> Call:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        reference = (x["ref_hidden"], x["ref_weight"], None)
        return step(
            x, lambda: ChunkedDivergenceFunction.apply(x["hidden"], x["weight"], None, *reference, 1.0)[0].mean()
        )

    return {"peer: TRL chunked divergence": trl} if _installed("trl") else {}


def advantages(rewards: Tensor, values: Tensor) -> dict[str, Callable[[], Call]]:
    """Generalized advantage estimation over [B, T]."""

    def torchrl() -> Call:
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

        after = F.pad(values[:, 1:], (0, 1)).unsqueeze(-1)
        done = torch.zeros_like(rewards, dtype=torch.bool).unsqueeze(-1)
        now, reward = values.unsqueeze(-1), rewards.unsqueeze(-1)
        return lambda: vec_generalized_advantage_estimate(0.99, 0.95, now, after, reward, done)

    return {"peer: torchrl vectorized": torchrl} if _installed("torchrl") else {}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _module_alone(package: str, path: str) -> ModuleType:
    """A module of a package whose other modules need what may not be installed (verl wants ray)."""
    (root, *_) = importlib.util.find_spec(package).submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"peer_{Path(path).stem}", Path(root) / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
