"""Attention functions registered with transformers: for short sequences on a CPU, for packed ones on a GPU.

`fastppo_short` is for the short sequences of a policy update on a CPU.

PyTorch's fused CPU attention pays for its blocking at every (sequence, head), which dominates for short sequences, and
transformers repeats the keys and values of grouped heads for it. Here the queries of a group are stacked over their key
head and multiplied in two plain products: 5 times as fast at 33 tokens, 1.6 times at 200, equal at 512 (docs/LOG.md).

Scores and softmax are float32, as in the fused kernel. The backward pass needs the scores, so longer sequences, whose
scores would take more memory than everything else, use scaled_dot_product_attention.

`fastppo_varlen` takes sequences packed in one row (`fastppo.models.packed_row`) to PyTorch's `varlen_attn`, for a GPU
without flash-attn. Other calls, as in generation, use scaled_dot_product_attention. `fastppo_paged_flash` does so for
transformers' continuous batching, whose own choice without flash-attn has a dense mask over all keys of all sequences.
Neither has run on a GPU yet; layout and arguments are tested with a function for a CPU in place of `varlen_attn`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Set

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

NAME = "fastppo_short"
VARLEN = "fastppo_varlen"
PAGED = "fastppo_paged_flash"  # transformers gives no mask to attention whose name has "flash" in it
LONGEST = 512  # keys, for as many queries

# Further arguments of some architectures, which the plain products do not support.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "output_attentions", "cu_seq_lens_q")
_UNSUPPORTED_IN_ROWS = ("softcap", "s_aux", "position_bias", "output_attentions")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling) v, with the signature of transformers' attention functions.

    Args:
        query: [B, H, Q, d]; key, value: [B, H / G, K, d], one for every G query heads.
        attention_mask: [B, 1, Q, K] bool, True where a query sees a key.

    Returns:
        [B, Q, H, d] in the value's dtype, and None for the weights.
    """
    queries, keys = query.shape[2], key.shape[2]
    plain = attention_mask is not None and attention_mask.dtype == torch.bool and not dropout
    if not plain or queries * keys > LONGEST**2 or any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, _, dim = query.shape
    groups = heads // key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        stacked = (query.float() * scale).reshape(batch, -1, groups * queries, dim)
        scores = stacked @ key.float().transpose(-1, -2)  # [B, H / G, G Q, K]
        scores = scores.view(batch, -1, groups, queries, keys)
        # Adding takes a sixth of masked_fill's time and has no backward pass of its own.
        scores += torch.finfo(torch.float32).min * ~attention_mask[:, :, None]
        weights = scores.softmax(-1).to(value.dtype).view(batch, -1, groups * queries, keys)
        out = (weights @ value).view(batch, heads, queries, value.shape[-1])
    return out.transpose(1, 2).contiguous(), None


def _mask(*args, **kwargs) -> Tensor:
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def has_varlen() -> bool:
    """Whether this PyTorch has `varlen_attn` as `attention_in_a_row` calls it; that of 2.10 lacks the scale."""
    return varlen_attn is not None and {"scale", "window_size"} <= _arguments(varlen_attn)


@functools.cache
def _arguments(function: Callable) -> Set[str]:
    """The names of a function's arguments, which take too long to find out in every layer."""
    return inspect.signature(function).parameters.keys()


def attention_in_a_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each of several sequences in a row, with the signature of transformers' functions.

    Args:
        query: [1, H, N, d]; key, value: [1, H / G, N, d], one for every G query heads.
        attention_mask: not read, if the boundaries are given.
        cu_seq_lens_q: [sequences + 1] int32, where they begin, and N; those of the keys are the same.
        max_length_q: tokens of the longest sequence.

    Returns:
        [1, N, H, d] in the precision of the products, and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("sliding_window") is not None:
        raise NotImplementedError("varlen_attn has no window passed to it")
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return _attend_in_rows(query, key, value, lengths, dropout, scaling, None, kwargs), None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As `attention_in_a_row` for continuous batching, where each sequence has more keys than queries, or as many.

    Before transformers 5.23 the attention function itself adds to the cache and reads from it.
    """
    cu_seq_lens_k, longest_key = (kwargs.get(f"{name}_k") for name in ("cu_seq_lens", _longest(kwargs)))
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if "cache" in kwargs:
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        states = kwargs["cache"].update(key_states=key, value_states=value, layer_idx=module.layer_idx, **indices)
        key, value = (x.transpose(0, 1)[None] for x in states)
    if isinstance(cu_seq_lens_k, dict):
        layers = "sliding_attention" if window else "full_attention"
        cu_seq_lens_k, longest_key = cu_seq_lens_k[layers], longest_key[layers]
    lengths = (kwargs["cu_seq_lens_q"], cu_seq_lens_k.to(torch.int32), kwargs[f"{_longest(kwargs)}_q"], longest_key)
    return _attend_in_rows(query, key, value, lengths, dropout, scaling, window, kwargs), None


def _longest(kwargs: dict) -> str:
    return "max_length" if "max_length_q" in kwargs else "max_seqlen"


def _attend_in_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    dropout: float,
    scaling: float | None,
    window: int | None,
    kwargs: dict,
) -> Tensor:
    """[1, N, H, d]. The queries of a sequence are its last ones; each sees `window` keys, itself the last of them."""
    if dropout or any(kwargs.get(name) is not None for name in _UNSUPPORTED_IN_ROWS):
        raise NotImplementedError("varlen_attn has no dropout, soft cap, sink or bias")
    device = query.device.type
    # As autocast does for scaled_dot_product_attention; rotary embeddings have made queries and keys float32.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [N, heads, d]
    options = {"scale": scaling, "window_size": (window - 1 if window else -1, 0)}  # causal
    if "enable_gqa" in _arguments(varlen_attn):
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return varlen_attn(query, key, value, *lengths, **options)[None]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
AttentionInterface.register(VARLEN, attention_in_a_row)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
for name in (PAGED, f"paged|{PAGED}"):  # before transformers 5.23 with the prefix
    AttentionInterface.register(name, paged_attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
