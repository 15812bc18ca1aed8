"""TRL's GRPOTrainer and RLOOTrainer on fastppo's kernels: one line before the trainer is built.

    import fastppo.integrations.trl as fastppo_trl

    fastppo_trl.patch()
    trainer = GRPOTrainer(...)

Since 1.15 those trainers call ``add_fused_lm_head(model, temperature, ...)`` when they are built, and from then on
``model(..., labels=labels, fused_lm_head=True)`` for the log-probabilities of policy and reference. That function is
the door: ours goes in its place in these two trainers' modules and puts fastppo's forward on their models. The others
(SFT, DPO, KTO) also want statistics that we do not compute, and keep TRL's own.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from torch import nn

from fastppo.integrations import transformers as patched_transformers
from fastppo.integrations.patching import between
from fastppo.integrations.transformers import CausalLMLogprobs
from fastppo.integrations.versions import require

SUPPORTED = ">=1.15,<2"
_KEYWORD = "fused_lm_head"
_DOOR = "add_fused_lm_head"
_HOME = "trl.trainer.utils"
_TRAINERS = ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")
_ARGUMENTS = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]


def patch() -> None:
    """Let every GRPOTrainer and RLOOTrainer that is built from now on compute with fastppo.

    Trainers that were built before stay as they are. Checkpoints, metrics and options are TRL's as ever.

    Raises:
        ImportError: TRL is missing, or its version is outside the supported range.
        RuntimeError: already patched, by fastppo or by somebody else, or the function has changed its arguments.
    """
    require("trl", SUPPORTED)
    modules = _trainer_modules()
    original = getattr(importlib.import_module(_HOME), _DOOR)
    if list(inspect.signature(original).parameters) != _ARGUMENTS:
        raise RuntimeError(
            f"{_HOME}.{_DOOR}{inspect.signature(original)} does not take {', '.join(_ARGUMENTS)}: this TRL is not one "
            f"that fastppo knows ({SUPPORTED}); do without the patch"
        )
    for module in modules:
        current = getattr(module, _DOOR)
        if current is _add_fused_lm_head:
            raise RuntimeError("TRL is already patched by fastppo; call unpatch() first")
        if current is not original or original.__module__ != _HOME:
            raise RuntimeError(
                f"{module.__name__}.{_DOOR} is {current.__module__}.{current.__qualname__}, not TRL's own: another "
                "patch is in place; remove it before fastppo's"
            )
    for module in modules:
        setattr(module, _DOOR, _add_fused_lm_head)


def unpatch() -> None:
    """Give trainers that are built from now on TRL's own computation again.

    A trainer that was built under `patch` keeps fastppo's; ``fastppo.unpatch_model(trainer.model)`` would leave it
    without any.

    Raises:
        RuntimeError: not patched, or somebody else has patched over it since; nothing is changed then.
    """
    modules = _trainer_modules()
    for module in modules:
        current = getattr(module, _DOOR)
        if current is not _add_fused_lm_head:
            raise RuntimeError(
                f"{module.__name__}.{_DOOR} is {current.__module__}.{current.__qualname__}, not fastppo's; there is "
                "nothing of ours to undo"
            )
    original = getattr(importlib.import_module(_HOME), _DOOR)
    for module in modules:
        setattr(module, _DOOR, original)


def patched() -> AbstractContextManager[None]:
    """`patch` for the length of a with-block: build the trainer inside, train it inside or after."""
    return between(patch, unpatch)


def _trainer_modules() -> list[ModuleType]:
    return [importlib.import_module(name) for name in _TRAINERS]


def _add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's function of this name, by `fastppo.linear_logprob`."""
    if unknown := set(outputs) - {"log_probs", "entropy"}:
        raise ValueError(f"outputs: fastppo computes log_probs and entropy, not {', '.join(sorted(unknown))}")
    convert = _with_entropy if "entropy" in outputs else _without_entropy
    earlier = getattr(model, patched_transformers.SLOT, None)
    if earlier is not None and earlier.keyword == _KEYWORD:
        # A second trainer of the same model: what it asks for may differ, and the forward may be wrapped by now.
        earlier.temperature, earlier.convert, earlier.float32_head = temperature, convert, cast_lm_head_to_fp32
        return
    patched_transformers.install(model, _KEYWORD, convert, temperature=temperature, float32_head=cast_lm_head_to_fp32)


def _with_entropy(out: CausalLMLogprobs) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(
        loss=out.loss,
        log_probs=out.logprobs,
        entropy=out.entropy,
        label_mask=out.label_mask,
        aux_loss=out.aux_loss,
    )


def _without_entropy(out: CausalLMLogprobs) -> Any:
    return _with_entropy(out._replace(entropy=None))
