"""Load models and tokenizers, and set them up for training: attention, dropout, checkpointing, adapters.

Nothing is downloaded and no code that came with a model is run unless the configuration allows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from fastppo.errors import one_line
from fastppo.extras import install_command
from fastppo.models.head import backbone_of, check_head
from fastppo.models.quantize import check_bitsandbytes, quantize_
from fastppo.models.source import ModelError, ModelSource, hub_offline, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fastppo.models.config import ModelConfig


def load_causal_lm(
    config: ModelConfig, *, device: torch.device | str = "cpu", on: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a causal language model, ready to be trained or frozen: in eval mode, dropout off, its head checked.

    One to be quantized is read on the host. It can only be trained by adapters.

    With ``gradient_checkpointing`` a trainer must switch to ``train()`` for the update, since transformers checkpoints
    only there, and back to ``eval()`` to generate with a cache.

    Args:
        config: the model section of the configuration; `apply_lora` adds its adapters.
        device: what computes with the model.
        on: where the parameters go, if not to the device yet.

    Raises:
        ModelError: the model is absent, incomplete, quantized already, of an unknown kind, or computes its logits in an
            unknown way.
    """
    from transformers import AutoModelForCausalLM

    from fastppo.models.packing import can_pack

    source = resolve(config.name_or_path, allow_download=config.allow_download)
    device, on = torch.device(device), torch.device(on or device)
    if config.quantization:
        check_bitsandbytes("model.quantization")  # before the weights are read
        on = torch.device("cpu")
    here = config if on.type == device.type else dataclasses.replace(config, attn_implementation="auto")
    model = load_model(AutoModelForCausalLM, source, here, on)
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{config.name_or_path}: its weights are quantized, which are not trained here; name a float32 or bfloat16 "
            "model (model.quantization: nf4 and model.lora save memory)"
        )
    try:
        check_head(model)
        if here is not config:
            _set_attention(model, config, device)
    except (ImportError, ValueError) as error:
        raise ModelError(f"{config.name_or_path}: {one_line(error, 300)}") from None
    if device.type == "cpu":
        can_pack(backbone_of(model))  # tried now, since sharded, or under functional_call, it could not be
    if config.quantization:
        quantize_(model, device=device, compute_dtype=getattr(torch, config.autocast or config.dtype))
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a pad token pads with eos.

    Raises:
        ModelError: there is no tokenizer, or it has no eos token.
    """
    from transformers import AutoTokenizer

    source = resolve(config.name_or_path, allow_download=config.allow_download)
    tokenizer = load_pretrained(AutoTokenizer, source, config)
    if source.gguf_file:
        _check_gguf_eos(tokenizer, Path(source.path, source.gguf_file))
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{config.name_or_path}: the tokenizer has no eos token, so a completion could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_context_length(config: ModelConfig) -> int | None:
    """`context_length` of the configuration's model, without reading its weights.

    Raises:
        ModelError: there is no such model.
    """
    return _context_length(load_configuration(config))


def load_configuration(config: ModelConfig) -> PretrainedConfig:
    """transformers' configuration of a model; the next caller gets the same one, so change copies only.

    Raises:
        ModelError: there is none to be had.
    """
    source = resolve(config.name_or_path, allow_download=config.allow_download)
    file = Path(source.path, source.gguf_file or "config.json")
    changed = file.stat().st_mtime_ns if file.exists() else None
    return _load_configuration(source, changed, config.trust_remote_code, config.allow_download)


@functools.lru_cache(maxsize=8)
def _load_configuration(
    source: ModelSource, changed: int | None, trust_remote_code: bool, allow_download: bool
) -> PretrainedConfig:
    """From a GGUF file it takes over a second, and a run needs it twice.

    Args:
        changed: when the file did, so that another one is read anew.
    """
    from transformers import AutoConfig

    from fastppo.models.config import ModelConfig

    permissions = ModelConfig(trust_remote_code=trust_remote_code, allow_download=allow_download)
    return load_pretrained(AutoConfig, source, permissions)


def load_model(auto_class: Any, source: ModelSource, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """`load_pretrained` with the configuration's dtype, attention and gradient checkpointing, and dropout off."""
    arguments: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    auto = config.attn_implementation == "auto"
    if not auto:
        arguments["attn_implementation"] = config.attn_implementation
    model = load_pretrained(auto_class, source, config, **arguments)
    if auto:
        _set_attention(model, config, device)
    disable_dropout(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.to(device)


def load_pretrained(auto_class: Any, source: ModelSource, config: ModelConfig, **arguments: Any) -> Any:
    """``auto_class.from_pretrained`` with the configuration's permissions, no output, and errors of one line.

    Args:
        auto_class: AutoTokenizer, or an AutoModel class, which must then find every one of its weights.
        arguments: further arguments of `from_pretrained`; a model needs `dtype`.

    Raises:
        ModelError: the model or tokenizer cannot be loaded.
    """
    import transformers

    is_model = "dtype" in arguments
    if is_model:  # what does not fit is named below, rather than in a table on stderr
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    where = Path(source.path, source.gguf_file or "")
    try:
        with hub_offline(not config.allow_download), quiet(), contextlib.ExitStack() as stack:
            if source.gguf_file:
                stack.enter_context(_faster_gguf(where))
                arguments["gguf_file"] = source.gguf_file
                if is_model and hasattr(transformers, "GgufConfig"):  # 4.x, which lacks it, always unpacks the weights
                    # By default 5.x treats the model as a quantized one, which it refuses to cast, train or save.
                    arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded = auto_class.from_pretrained(
                source.path,
                trust_remote_code=config.trust_remote_code,
                local_files_only=not config.allow_download,
                **arguments,
            )
            if hasattr(loaded, "encode"):  # a tokenizer, whose nonsensical settings show once it is used
                loaded.encode("a")
    except ModelError:
        raise
    except Exception as error:  # readers of a damaged file raise anything, struct.error and KeyError included
        what = "model" if is_model else auto_class.__name__.removeprefix("Auto").lower()
        raise ModelError(f"{where}: the {what} cannot be loaded ({why(error)})") from error
    if not is_model:
        return loaded
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers and only warns
        raise ModelError(f"{where}: {len(missing)} weights of {type(model).__name__} are missing, first {missing[0]!r}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, *shapes = mismatched[0]
        found, expected = map(list, shapes)
        raise ModelError(
            f"{where}: {len(mismatched)} weights of {type(model).__name__} have another shape than its configuration "
            f"says, first {name!r}: {found}, expected {expected}"
        )
    return model


def context_length(model: nn.Module) -> int | None:
    """Most tokens of a sequence, prompt and completion together; None if the architecture sets no limit."""
    return _context_length(model.config)


def _context_length(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and router-noise probability of the model to zero, in place.

    PPO compares the log-probabilities of one set of weights with those of another. With dropout, two passes of the
    *same* weights already differ, so the probability ratio is not 1 before the first update and clipping acts on
    noise. Zero probabilities, rather than eval mode alone, hold when gradient checkpointing needs train().
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def enable_gradient_checkpointing(model: PreTrainedModel, **options: Any) -> None:
    """Recompute each layer's activations in the backward pass, in train mode only; `options` of torch's `checkpoint`.

    Raises:
        ModelError: the architecture does not support it.
    """
    # transformers 5.2x renamed it and warns of the old name, the only one in 4.x.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        # The reentrant kind drops gradients when a checkpointed input needs none, as under LoRA.
        enable({"use_reentrant": False, **options})
    except ValueError as error:
        raise ModelError(f"model.gradient_checkpointing: {why(error)}") from None
    if getattr(model, "_require_grads_hooks", None):  # for the reentrant kind, and they cannot be pickled
        model.disable_input_require_grads()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing: what goes wrong is raised. Its settings are restored at the end."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_gguf_eos(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise ModelError if the tokenizer has the file's bos as eos (transformers 5.0): no completion would end."""
    if tokenizer.eos_token_id != tokenizer.bos_token_id:
        return
    import gguf

    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.eos_token_id")
    if field is not None and field.contents() != tokenizer.eos_token_id:
        raise ModelError(
            f"{path}: this transformers takes token {tokenizer.eos_token_id} for its eos, but the file says "
            f"{field.contents()} (pip install --upgrade transformers; 5.24 reads it right)"
        )


@contextlib.contextmanager
def _faster_gguf(path: Path) -> Iterator[None]:
    """Make transformers read a GGUF file several times faster, with the same result (14 s to 4 s for SmolLM2-135M).

    gguf's reader slices an np.memmap once for each of some 100,000 vocabulary strings, which costs several times a
    slice of a plain array, and transformers rebuilds the table of tensor names for every submodule. Inside this context
    the reader gets a plain array over the same mapping, and the table is cached. Raises ModelError without `gguf`.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path}: reading a GGUF file needs gguf; {install_command('demo')}")
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as loader

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    with (
        mock.patch.object(gguf, "GGUFReader", Reader),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        mock.patch.object(loader, "tqdm", lambda items, **_: items),  # a progress bar that no setting turns off
    ):
        yield


def _set_attention(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> None:
    """Compute attention as configured, or as suits the device."""
    if (chosen := _attention_for(model, config, device)) != model.config.get_text_config()._attn_implementation:
        model.set_attn_implementation(chosen)


def _attention_for(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> str:
    from fastppo.models.attention import NAME, VARLEN, has_varlen

    half = config.dtype != "float32" or config.autocast is not None  # FlashAttention does not support float32
    flash = device.type == "cuda" and half and getattr(model, "_supports_flash_attn", False)
    given = model.config.get_text_config()._attn_implementation
    if config.attn_implementation != "auto":
        return config.attn_implementation
    if flash and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    if caps_attention(model):
        return "eager"
    # transformers itself chooses SDPA if the architecture supports it, else eager.
    if given not in ("sdpa", NAME, VARLEN):
        return given
    if device.type == "cpu":
        return NAME
    return VARLEN if flash and has_varlen() else "sdpa"


def caps_attention(model: PreTrainedModel) -> bool:
    """Whether attention scores have a soft cap (Gemma 2), which transformers leaves out in SDPA."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 200)}"
