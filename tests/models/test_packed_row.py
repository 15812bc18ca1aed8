"""Sequences in one row against rows with padding. On a CPU a plain function stands in for the GPU's attention."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import SIZES
from torch import nn

from fastppo.models import attention, token_hidden
from fastppo.models.attention import VARLEN
from fastppo.models.load import enable_gradient_checkpointing
from fastppo.models.packed_row import pack_row
from fastppo.models.packing import can_pack, completion_states

transformers = pytest.importorskip("transformers")


def causal_in_parts(query, key, value, boundaries, scale):
    """softmax(q kᵀ · scale) v [N, H, d] of every part by itself, in float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    parts = []
    for start, stop in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1).float() for x in (query, key, value))
        later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1).to(q.device)
        weights = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts).to(value.dtype)


def check_arguments(query, boundaries, keys, longest, longest_key):
    assert boundaries.dtype == torch.int32
    assert torch.equal(keys, boundaries)
    assert boundaries[0] == 0
    assert boundaries[-1] == len(query)
    assert isinstance(longest, int)
    assert longest == longest_key == int(boundaries.diff().max())


def varlen_with_groups(q, k, v, begin_q, begin_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """As PyTorch 2.13's."""
    check_arguments(q, begin_q, begin_k, max_q, max_k)
    assert window_size == (-1, 0)
    assert enable_gqa or q.shape[1] == k.shape[1]
    return causal_in_parts(q, k, v, begin_q, scale)


def varlen_without_groups(q, k, v, begin_q, begin_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """As PyTorch 2.11's."""
    return varlen_with_groups(q, k, v, begin_q, begin_k, max_q, max_k, scale=scale, window_size=window_size)


def flash_in_transformers(query, key, value, attention_mask, *args, cu_seq_lens_q=None, softmax_scale=None, **kwargs):
    """In place of the flash-attn package; [B, N, heads, d]."""
    assert attention_mask is None or cu_seq_lens_q is None
    if cu_seq_lens_q is not None:
        lengths = kwargs["cu_seq_lens_k"], kwargs["max_length_q"], kwargs["max_length_k"]
        check_arguments(query[0], cu_seq_lens_q, *lengths)
        return causal_in_parts(query[0], key[0], value[0], cu_seq_lens_q, softmax_scale)[None]
    real = torch.ones(query.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    begin = torch.cat([torch.zeros(1, dtype=torch.long), real.sum(1).cumsum(0)])
    out = torch.zeros_like(query)
    out[real] = causal_in_parts(query[real], key[real], value[real], begin, softmax_scale)
    return out


@pytest.fixture(params=["varlen_attn", "varlen_attn of groups", "flash_attention_2", "flash_attention_3"])
def implementation(request, monkeypatch):
    if request.param.startswith("flash"):
        from transformers.integrations import flash_attention

        monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_in_transformers)
        return request.param
    stand_in = varlen_with_groups if "groups" in request.param else varlen_without_groups
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    return VARLEN


def backbones(implementation: str, kind: str = "Llama", **changes) -> tuple[nn.Module, nn.Module]:
    """The model with that attention, and a copy with PyTorch's own."""
    sizes = SIZES | {"initializer_range": 0.2, "attn_implementation": "sdpa"}
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    plain = getattr(transformers, f"{kind}Model")(config).eval()
    model = copy.deepcopy(plain)
    model.config._attn_implementation = implementation  # transformers would look for the packages and a GPU
    return model, plain


def batch(device="cpu"):
    """Ragged sequences [5, 7 + 6], one of them without a completion, and their mask."""
    ids = torch.randint(0, 97, (5, 13), device=device)
    prompts, completions = torch.tensor([[7], [1], [4], [2], [7]]), torch.tensor([[3], [6], [0], [5], [1]])
    columns = torch.arange(13)
    return ids, ((columns >= 7 - prompts) & (columns < 7 + completions)).long().to(device)


def results(model, hidden, real, upstream):
    model.zero_grad()
    (hidden * upstream).sum().backward()
    return [hidden[real].detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_padded_rows(implementation, checkpointing):
    model, plain = backbones(implementation)
    assert can_pack(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
        model.train()
    ids, mask = batch()
    real = mask[:, 7:].bool()
    upstream = torch.randn(5, 6, 32) * real[..., None]
    widths = []
    model.register_forward_pre_hook(lambda _, args, given: widths.append(given["input_ids"].shape), with_kwargs=True)
    packed = completion_states(model, ids, mask, 6, 32)
    assert widths == [(1, int(mask.sum()))]
    ours = results(model, packed, real, upstream)
    expected = results(plain, token_hidden(plain, ids, mask)[:, 6:-1], real, upstream)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * (1 + b.abs().max().item()))


def test_padded_rows_and_generation_use_plain_attention(implementation):
    """Without boundaries, as where a prompt is empty."""
    model, plain = backbones(implementation)
    ids, mask = batch()
    mask[2, :7] = 0
    assert pack_row(ids, mask, 6) is None
    real = mask[:, 7:].bool()
    ours, expected = (completion_states(m, ids, mask, 6, 32)[real] for m in (model, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_layout():
    ids = torch.tensor([[0, 11, 12, 13, 14], [21, 22, 23, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    row = pack_row(ids, mask, 3)
    assert row.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert row.boundaries.tolist() == [0, 4, 7]
    assert row.longest == 4
    assert row.states[0].tolist() == [0, 1, 2]
    assert row.states[1, 0] == 5
    assert row.states.max() < 7


def test_the_layout_waits_for_the_device_once(monkeypatch):
    ids, mask = batch()
    waits = []
    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, own=own, name=name: (waits.append(name), own(*args))[1])
    pack_row(ids, mask, 6)
    assert waits == ["tolist"]


def test_only_models_that_allow_it_are_packed(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen_with_groups)
    assert not can_pack(backbones(VARLEN, "Mistral", sliding_window=8)[0])
    assert not can_pack(backbones("flash_attention_4")[0])
    assert can_pack(backbones(VARLEN)[0].bfloat16())
    model, _ = backbones(VARLEN)  # of which a layer drops arguments that it does not know

    def drop(layer, args, given):
        return args, {name: value for name, value in given.items() if not name.startswith("cu_seq_lens")}

    model.layers[1].register_forward_pre_hook(drop, with_kwargs=True)
    assert not can_pack(model)
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert not attention.has_varlen()
    assert not can_pack(backbones(VARLEN)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_ignores_the_boundaries_is_found_out(monkeypatch, dtype):
    def everything(q, k, v, begin_q, *others, scale=None, window_size=None, enable_gqa=False):
        return causal_in_parts(q, k, v, begin_q[[0, -1]], scale)

    monkeypatch.setattr(attention, "varlen_attn", everything)
    assert not can_pack(backbones(VARLEN)[0].to(dtype))


def test_a_window_or_a_cap_is_not_dropped_silently():
    module, q = nn.Module(), torch.randn(1, 2, 5, 4)
    for given in ({"softcap": 30.0}, {"sliding_window": 3}, {"dropout": 0.1}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(NotImplementedError, match="varlen_attn has no"):
            attention.attention_in_a_row(module, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 5]), **given)


def test_forward_mode_derivatives_come_from_padded_rows(monkeypatch):
    from torch.autograd import forward_ad

    monkeypatch.setattr(attention, "varlen_attn", varlen_with_groups)
    model, _ = backbones(VARLEN)
    assert can_pack(model)
    ids, mask = batch()
    widths = []
    model.register_forward_pre_hook(lambda _, args, given: widths.append(given["input_ids"].shape), with_kwargs=True)
    weight = model.norm.weight.detach()
    with forward_ad.dual_level():
        dual = {"norm.weight": forward_ad.make_dual(weight, torch.randn_like(weight))}
        torch.func.functional_call(_States(model), {f"model.{k}": v for k, v in dual.items()}, (ids, mask))
    assert widths == [(5, 13)]


class _States(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return completion_states(self.model, ids, mask, 6, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn is for a GPU, and there is none")
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(autocast):
    """PyTorch's own function, in half precision, against padded rows in float32; with grouped heads."""
    if not attention.has_varlen():
        pytest.skip("this PyTorch has no varlen_attn with a scale and a window (2.11 has)")
    model, plain = backbones(VARLEN, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    model, plain = model.cuda(), plain.cuda()
    model = model if autocast else model.bfloat16()
    ids, mask = batch("cuda")
    real = mask[:, 7:].bool()
    upstream = torch.randn(5, 6, 64, device="cuda") * real[..., None]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert can_pack(model)
        packed = completion_states(model, ids, mask, 6, 64)
        half = token_hidden(model, ids, mask)[:, 6:-1]
    found = [results(model, hidden.float(), real, upstream) for hidden in (packed, half)]
    expected = results(plain, token_hidden(plain, ids, mask)[:, 6:-1], real, upstream)
    for ours, padded, exact in zip(*found, expected, strict=True):
        # As near as padded rows of the same precision are.
        assert (ours - exact).norm() <= 2 * (padded - exact).norm() + 1e-3 * exact.norm()
