"""The `rollout` section of the configuration."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastppo.config_fields import STRICT, FiniteFloat, PositiveInt, Text

Ratio = Annotated[FiniteFloat, Field(gt=0, le=1e10)]


@dataclass(config=STRICT)
class VLLMConfig:
    """Options of `rollout.engine: vllm`."""

    tensor_parallel_size: PositiveInt = 1
    """Number of ranks that share one engine."""
    gpu_memory_utilization: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    """Share of the device's memory for vLLM. Default: what `fastppo plan` leaves to it, and no more than it can use."""
    enforce_eager: bool = False
    """Capture no CUDA graphs: slower, with less memory and a quicker start."""


@dataclass(config=STRICT)
class RolloutConfig:
    """How completions are sampled."""

    num_prompts: PositiveInt = 8
    """Prompts per step."""
    num_generations: PositiveInt = 4
    """Completions per prompt."""
    max_new_tokens: PositiveInt = 32
    """Maximum length of a completion in tokens."""
    temperature: Annotated[FiniteFloat, Field(ge=1e-10, le=1e10)] = 1.0  # as the operators take it
    """Divides the logits, for sampling and for log-probabilities, entropy and KL."""
    generation_batch_size: PositiveInt = 64
    """Maximum number of sequences that are decoded together."""
    engine: Literal["auto", "loop", "transformers", "continuous", "vllm"] = "auto"
    """What samples: our own `loop` on a CPU, transformers' `generate()`, its continuous batching, or vLLM. `auto`
    takes the fastest that fits; `fastppo doctor` says which and why."""
    stop: list[Text] = field(default_factory=list)
    """Strings that end a completion, beside the EOS tokens, once its text (special tokens included) contains one. The
    token that completes the string is the last."""
    correction: Literal["none", "truncate", "mask", "sequence_mask", "sequence_ratio"] = "none"
    """Weigh the surrogates by the ratio of the policy's probabilities to those that the engine sampled with: each
    token's own, truncated (TIS) or masked (IcePop), or that of its completion."""
    correction_min: Ratio | None = None
    """Lower bound of the ratio, below which `mask` and `sequence_mask` drop a token or a completion. Default: 0.5."""
    correction_max: Ratio | None = None
    """Upper bound of the ratio; above it, it is truncated or dropped. Default: 5 for `mask`, 2 for the others."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
