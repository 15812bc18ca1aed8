"""Value models: a scalar head on hidden states, and one with a backbone of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastppo.errors import one_line
from fastppo.models.head import backbone_and_head, token_hidden
from fastppo.models.load import load_model
from fastppo.models.source import ModelError, ModelSource

if TYPE_CHECKING:
    from fastppo.models.config import ModelConfig

HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """A linear value head, ``v = h·w + b``, in float32.

    It is initialized to zero. The first advantages are then the returns themselves, without the noise of a random head,
    and a shared backbone gets no gradient from an untrained head.

    Args:
        hidden_size: D, the width of the hidden states.
        num_values: K, how many values a state has; None for a single one without a dimension of its own.
    """

    def __init__(self, hidden_size: int, num_values: int | None = None) -> None:
        super().__init__()
        shape = () if num_values is None else (num_values,)
        self.weight = nn.Parameter(torch.zeros(*shape, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] of any float type -> [...] float32, or [..., K] with `num_values` K."""
        # Advantages are differences of values, which autocast would round to half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            # As a DTensor, each rank has a copy.
            weight, bias = (p.to_local() if hasattr(p, "to_local") else p for p in (self.weight, self.bias))
            return F.linear(hidden.float(), weight.float()) + bias.float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `value_head.safetensors` into the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, Path(folder, HEAD_FILE))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> ValueHead:
        """Read what `save_pretrained` wrote; raises ModelError if it is absent or damaged."""
        path = Path(folder, HEAD_FILE)
        try:
            tensors = load_file(path)
            *num_values, hidden_size = tensors["weight"].shape
            head = cls(hidden_size, *num_values)
            head.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: not a saved value head ({one_line(error)})") from error
        return head.to(device)


class ValueModel(nn.Module):
    """A backbone, which is a transformers base model and is not copied, with a value head."""

    def __init__(self, backbone: nn.Module, head: ValueHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_causal_lm(cls, model: nn.Module, num_values: int | None = None, *, take: bool = False) -> ValueModel:
        """Copy a language model's backbone, or take it, and add a `ValueHead`.

        Raises:
            ModelError: the model has adapters.
        """
        if hasattr(model, "disable_adapter"):
            raise ModelError("make the value model before the policy gets its adapters")
        backbone, lm_head = backbone_and_head(model)
        value_head = ValueHead(lm_head.weight.shape[1], num_values).to(lm_head.weight.device)
        return cls((backbone if take else copy.deepcopy(backbone)).requires_grad_(True), value_head).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [B, T] or [B, T, K] float32 after each token, finite at padding; arguments as for `token_hidden`."""
        return self.head(token_hidden(self.backbone, input_ids, attention_mask))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads: a transformers base model, and the head beside it."""
        self.backbone.save_pretrained(folder)
        self.head.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: ModelConfig | None = None, *, device: torch.device | str = "cpu"
    ) -> ValueModel:
        """Read what `save_pretrained` wrote, in eval mode with dropout off; raises ModelError if it cannot.

        Args:
            config: for dtype, attention and permissions; float32 and nothing permitted without it.
        """
        from transformers import AutoModel

        from fastppo.models.config import ModelConfig  # needs pydantic, which `fastppo.patch_model` must not

        head = ValueHead.from_pretrained(folder, device=device)
        backbone = load_model(AutoModel, ModelSource(str(folder), None), config or ModelConfig(), torch.device(device))
        return cls(backbone, head).eval()
