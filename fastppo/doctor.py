"""What `fastppo doctor` prints: versions, devices, and which backends can be used here and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

import torch

import fastppo
from fastppo.engines import triton_kernels
from fastppo.engines.cpu.products import why_slow
from fastppo.engines.dispatch import BACKENDS, NAMES, select, unusable

# Package, and what is lost without it.
_PACKAGES = (
    ("torch", "required"),
    ("triton", "the triton backend"),
    ("transformers", "the trainer"),
    ("safetensors", "checkpoints"),
    ("pydantic", "configuration files"),
    ("vllm", "rollout.engine: vllm"),
    ("datasets", "prompts from the Hub or a saved dataset"),
    ("gguf", "GGUF models"),
    ("peft", "LoRA"),
    ("bitsandbytes", "model.quantization; optim.name: adamw_8bit and paged_adamw_8bit"),
    ("flash_attn", "FlashAttention 2 on a GPU"),
    ("vaderSentiment", "the vader_sentiment reward"),
    ("reasoning_gym", "the reasoning_gym reward"),
    ("tensorboard", "report_to: tensorboard"),
    ("trackio", "report_to: trackio"),
    ("wandb", "report_to: wandb"),
    ("mlflow", "report_to: mlflow"),
    ("matplotlib", "the report's plots"),
)


def report() -> str:
    """The report as text."""
    lines = [f"fastppo {fastppo.__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += ["Packages"]
    lines += [f"  {name:16} {_version(name) or f'not installed (only for: {purpose})'}" for name, purpose in _PACKAGES]
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    lines += ["", "Devices", f"  cpu              {cpu}"]
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(torch.device("cuda", index))
        lines.append(
            f"  cuda:{index}           {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    if len(devices) == 1:
        lines.append("  cuda             none")
    lines += ["", f"Backends (FASTPPO_BACKEND={os.environ.get('FASTPPO_BACKEND') or 'auto'})"]
    for device in devices:
        for name in NAMES:
            reason = unusable(name, device)
            state = f"unusable on {device}: {reason}" if reason else f"usable on {device}"
            if name == "cpu" and not reason and (slow := why_slow()):
                state += f", but at the speed of chunked: {slow}"
            if name == "triton" and device.type == "cuda" and not reason and not triton_kernels.is_measured(device):
                state += ", but by name alone: every check has passed on sm_90, and none has run on this chip"
            lines.append(f"  {name:16} {state}")
        lines += [f"    {op:18} -> {select(op, device, torch.float32)}" for op in BACKENDS]
    return "\n".join([*lines, "", "Rollouts (rollout.engine)", *_engines(devices)])


def _engines(devices: list[torch.device]) -> Iterator[str]:
    if importlib.util.find_spec("transformers") is None:
        yield "  none             transformers is not installed"
        return
    from fastppo.rollout.choose import NAMES as engines
    from fastppo.rollout.choose import auto, why_not

    for device in devices:
        for name in engines:
            reason = why_not(name, device)
            yield f"  {name:16} unusable on {device}: {reason}" if reason else f"  {name:16} usable on {device}"
        name, why = auto(device)
        known = {"loop": "a model whose states it knows", "continuous": "a model that it knows, in half precision"}
        for_ = f"; for {known[name]}, else transformers" if name in known else ""
        yield f"    {'auto':18} -> {name}: {why}{for_}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(package) else None
