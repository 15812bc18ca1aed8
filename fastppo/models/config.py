"""The `model` section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastppo.config_fields import STRICT, AnyPath, AnyText, PathText, PositiveInt


@dataclass(config=STRICT)
class LoraConfig:
    """Low-rank adapters on the policy (peft); the reference is then the same model with its adapter off."""

    r: Annotated[PositiveInt, Field(le=2**14)] = 16
    """Rank of the adapters."""
    lora_alpha: PositiveInt = 32
    """The adapters' output is scaled by lora_alpha / r."""
    target_modules: AnyText | list[AnyText] = "all-linear"
    """Names of the modules to adapt, or `all-linear`."""
    merge: bool | None = None
    """Write `final/` as a plain model with the adapters merged into its weights; false writes the adapters alone. null
    merges them unless `model.quantization` is set."""


@dataclass(config=STRICT)
class ModelConfig:
    """The policy, and the value and reference models that go with it."""

    name_or_path: AnyPath = ""
    """Hub id, folder, GGUF file, `package:module/file`: a file inside an installed Python package, or
    `package:module:function`: a function of one that returns the path, after joining the file's parts for example."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters. In bfloat16 small updates are lost to rounding."""
    quantization: Literal["nf4"] | None = None
    """Keep the weights of the linear layers, but not of the head, in 4 bits (QLoRA; Dettmers et al., 2023). Needs
    `model.lora`: only adapters are trained."""
    autocast: Literal["bfloat16"] | None = None
    """Data type of matrix products; the parameters stay in `dtype`."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """`auto`: FlashAttention 2 on a GPU if it is installed, else PyTorch's own for packed sequences in half precision,
    else SDPA; on a CPU, plain products for short sequences. SDPA leaves out the soft cap of Gemma 2's attention
    scores, so without FlashAttention it gets `eager`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    activation_offloading: bool = False
    """Keep what the backward pass needs in the host's memory meanwhile."""
    offload_idle: bool = False
    """Keep a reference that is a copy, and a separate critic, in the host's memory while they are not used."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""
    allow_download: bool = False
    """Download models and datasets that are not on this machine from the Hugging Face Hub."""
    lora: LoraConfig | None = None
    value_model: Literal["shared", "separate", "adapter"] = "shared"
    """`shared`: a scalar head on the policy's backbone. `separate`: a backbone of its own. `adapter`: adapters of its
    own on the policy's base model; needs `model.lora`."""
    value_name_or_path: PathText | None = None
    """Initial weights of a separate value model. Default: the policy's."""
    reference: Literal["frozen", "none"] = "frozen"
    """Reference of the KL penalty: `frozen` is the initial policy."""
