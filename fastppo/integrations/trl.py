"""TRL's GRPOTrainer and RLOOTrainer on fastppo's kernels: one line before the trainer is built.

    import fastppo.integrations.trl as fastppo_trl

    fastppo_trl.patch()
    trainer = GRPOTrainer(...)

Since 1.15 these trainers call ``add_fused_lm_head(model, temperature, ...)`` when they are built, and from then on
``model(..., labels=labels, fused_lm_head=True)`` for the log-probabilities of policy and reference. `patch` replaces
that function in their two modules, so that their models get fastppo's forward. Trainers built before keep TRL's. SFT,
DPO and KTO need statistics that fastppo does not compute, and keep TRL's function. Options, metrics and checkpoints are
TRL's. Tested with TRL 1.15.0 and 1.16.0.
"""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastppo.integrations.patching import Patch, require
from fastppo.integrations.transformers import SLOT, LogprobForward, install

SUPPORTED = ">=1.15,<2"
_KEYWORD = "fused_lm_head"
_HOME = "trl.trainer.utils"


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's function of this name, computed by `fastppo.linear_logprob`."""
    if unknown := set(outputs) - {"log_probs", "entropy"}:
        raise ValueError(f"outputs: fastppo computes log_probs and entropy, not {', '.join(sorted(unknown))}")
    output = partial(_to_trl, with_entropy="entropy" in outputs)
    earlier = getattr(model, SLOT, None)
    if earlier is not None and earlier.keyword == _KEYWORD:
        # A second trainer of the same model: its settings may differ, and the forward may be wrapped by now.
        earlier.temperature, earlier.output, earlier.float32_head = temperature, output, cast_lm_head_to_fp32
        return
    install(model, LogprobForward(_KEYWORD, output, temperature, float32_head=cast_lm_head_to_fp32))


def _to_trl(*, with_entropy: bool, logprobs: Tensor, entropy: Tensor, **fields: Tensor | None) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(log_probs=logprobs, entropy=entropy if with_entropy else None, **fields)


class _Patch(Patch):
    def apply(self) -> None:
        """Make every GRPOTrainer and RLOOTrainer that is built from now on compute with fastppo.

        Raises:
            ImportError: TRL is missing, or its version is outside the supported range.
            RuntimeError: already patched, by fastppo or by another library, or TRL's function has other arguments.
        """
        require("trl", SUPPORTED)
        signature = inspect.signature(importlib.import_module(_HOME).add_fused_lm_head)
        if list(signature.parameters) != list(inspect.signature(add_fused_lm_head).parameters):
            raise RuntimeError(
                f"{_HOME}.add_fused_lm_head{signature}: this version of TRL is not one that fastppo knows "
                f"({SUPPORTED}); do without the patch"
            )
        super().apply()


_PATCH = _Patch(
    "trl",
    SUPPORTED,
    {f"{_HOME}.add_fused_lm_head": add_fused_lm_head},
    only_in=("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"),
)
# `patched` is `patch` for the length of a with-block: build the trainer inside, train it inside or after. A trainer
# keeps fastppo's forward after `unpatch`; `fastppo.unpatch_model` would leave it without any.
patch, unpatch, patched = _PATCH.apply, _PATCH.undo, _PATCH.applied
