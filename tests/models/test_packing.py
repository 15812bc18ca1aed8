"""Packed sequences and the CPU's attention, against rows with padding and PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import SIZES
from torch import nn

from fastppo.models import attention, token_hidden
from fastppo.models.packing import can_pack, pack, packed_hidden

transformers = pytest.importorskip("transformers")


def _backbone(kind: str = "Llama", **changes) -> nn.Module:
    sizes = SIZES | {"initializer_range": 0.2, "attn_implementation": "sdpa"}
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    return getattr(transformers, f"{kind}Model")(config).eval()


def _batch(prompts: int, generations: int, longest_prompt: int, longest_completion: int):
    """Sequences [B, P + T], their mask, T; every prompt `generations` times, in a random order."""
    starts = torch.randint(1, longest_prompt + 1, (prompts,)).repeat_interleave(generations)
    width, count = int(starts.max()), torch.randint(0, longest_completion + 1, (len(starts),))
    ids = torch.randint(0, 97, (prompts, width)).repeat_interleave(generations, 0)
    sequences = torch.cat([ids, torch.randint(0, 97, (len(starts), longest_completion))], 1)
    columns = torch.arange(width + longest_completion)
    mask = (columns >= (width - starts)[:, None]) & (columns < (width + count)[:, None])
    order = torch.randperm(len(starts))
    return sequences[order], mask.long()[order], longest_completion


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
@pytest.mark.parametrize("shape", [(5, 4, 7, 9), (1, 8, 30, 3), (4, 1, 3, 20), (3, 5, 2, 1)])
def test_packed_states_and_gradients_are_those_of_padded_rows(implementation, shape):
    backbone = _backbone(attn_implementation=implementation)
    sequences, mask, completion = _batch(*shape)
    packed = pack(sequences, mask, completion, dim=10_000)
    if packed is None:  # nothing to save in this draw
        return
    assert packed.input_ids.numel() < sequences.numel()
    real = mask[:, -completion:].bool()
    upstream = torch.randn(*real.shape, 32) * real[..., None]
    results = []
    for hidden in (
        packed_hidden(backbone, packed),
        token_hidden(backbone, sequences, mask)[:, -completion - 1 : -1],
    ):
        backbone.zero_grad()
        (hidden * upstream).sum().backward()
        results.append([hidden[real].detach(), *(p.grad.clone() for p in backbone.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * (1 + plain.abs().max().item()))


def test_a_shared_prompt_is_computed_once():
    """Eight completions of 4 tokens after a prompt of 40: 72 tokens, not 8 rows of 44."""
    sequences = torch.cat([torch.randint(1, 97, (1, 40)).expand(8, -1), torch.randint(1, 97, (8, 4))], 1)
    packed = pack(sequences, torch.ones_like(sequences), 4, dim=1000)
    assert packed.input_ids.shape == (1, 72)


def test_nothing_is_packed_where_there_is_nothing_to_save():
    sequences = torch.randint(0, 97, (6, 12))
    assert pack(sequences, torch.ones_like(sequences), 5, dim=64) is None
    empty = torch.cat([torch.zeros(6, 7), torch.ones(6, 5)], 1).long()
    assert pack(sequences, empty, 5, dim=64) is None  # no prompt, no state before the first token


def test_completions_of_no_tokens():
    sequences, mask, completion = _batch(2, 6, 8, 5)
    mask[:, -completion:] = 0
    packed = pack(sequences, mask, completion, dim=10_000)
    assert packed.input_ids.numel() <= 2 * 8
    assert torch.isfinite(packed_hidden(_backbone(), packed)).all()


def test_only_models_that_allow_it_are_packed():
    assert can_pack(_backbone())
    assert can_pack(_backbone(attn_implementation=attention.NAME))
    assert can_pack(_backbone("Qwen2", use_sliding_window=False))
    assert not can_pack(_backbone(attn_implementation="eager"))  # its masks are added
    assert not can_pack(_backbone("Mistral", sliding_window=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_layout_is_told_from_rounding(dtype):
    assert can_pack(_backbone().to(dtype))
    positions = _backbone().to(dtype)
    rotary = positions.rotary_emb.forward  # positions by column, as in a model that ignores position_ids
    positions.rotary_emb.forward = lambda x, ids: rotary(x, torch.arange(ids.shape[1])[None].expand_as(ids))
    assert not can_pack(positions)
    mask = _backbone().to(dtype)

    def causal(layer, args, given):  # as in a model that makes a mask of its own
        visible = given["attention_mask"]
        shared = visible.shape[0] == 1 and visible.shape[-1] > 20
        return args, given | {"attention_mask": torch.ones_like(visible).tril() if shared else visible}

    mask.layers[0].register_forward_pre_hook(causal, with_kwargs=True)
    assert not can_pack(mask)


def test_a_model_with_weights_of_other_types_is_tried_as_it_is():
    """The first parameter does not tell, as where linear layers are quantized."""
    backbone = _backbone()
    for layer in backbone.layers:
        layer.mlp.bfloat16()
        layer.mlp.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
        layer.mlp.register_forward_hook(lambda module, args, out: out.float())
    assert next(backbone.parameters()).dtype == torch.float32
    assert can_pack(backbone)
    sequences, mask, completion = _batch(3, 5, 7, 9)
    real = mask[:, -completion:].bool()
    packed = packed_hidden(backbone, pack(sequences, mask, completion, dim=10_000))[real]
    padded = token_hidden(backbone, sequences, mask)[:, -completion - 1 : -1][real]
    assert (packed - padded).norm() < 0.05 * padded.norm()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (1, 23), (600, 600)])
def test_attention_is_scaled_dot_product_attention(groups, queries, keys):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    query = torch.randn(2, 2 * groups, queries, 8, dtype=torch.float32, requires_grad=True)
    key, value = (torch.randn(2, 2, keys, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, queries, keys) < 0.7
    mask[..., 0] = True
    out, _ = attention.attention(module, query, key, value, mask, scaling=0.3)
    repeated = [x.repeat_interleave(groups, 1) for x in (key, value)]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), upstream)
    plain = torch.autograd.grad(expected, (query, key, value), upstream)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
