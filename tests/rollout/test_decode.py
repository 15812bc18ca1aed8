"""The CPU's sampling loop, against transformers' generate() and the distribution it draws from."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from fastppo.models.fused import _groups
from fastppo.rollout.decode import _draw, _laid_out, decode

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("decode") / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def test_draws_follow_the_probabilities():
    """An even grid of uniform numbers falls on each token in proportion to its probability, to one grid point."""
    count = 20_000
    logits = 2 * torch.randn(1, 50)
    logits[0, [0, 7, 49]] = -torch.inf
    uniform = (torch.arange(count) + 0.5) / count
    chosen = _draw(logits.expand(count, -1), uniform)
    expected = logits[0].double().softmax(-1) * count
    assert (torch.bincount(chosen, minlength=50) - expected).abs().max() < 2.1
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert _draw(logits, largest[None]).item() == 48  # never a token of no probability
    assert _draw(logits, torch.zeros(1)).item() == 1


def test_what_is_not_finite_is_named():
    logits = torch.randn(3, 9)
    logits[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        _draw(logits, torch.rand(3))


def test_cold_sampling_is_greedy_generation(model):
    """Prompts of several lengths, some repeated; completions that end early, and at different times."""
    pad, longest = model.config.pad_token_id, 12
    lengths = torch.randint(1, 7, (5,))
    ids = torch.full((5, int(lengths.max())), pad)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 300, (int(length),))
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    order = torch.tensor([0, 3, 0, 1, 2, 4, 3, 0])
    ids, mask = ids[order], mask[order]
    plain = {"do_sample": False, "max_new_tokens": longest, "pad_token_id": pad}
    free = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=-1, **plain)[:, ids.shape[1] :]
    eos = [int(free[0, 2]), int(free[3, 5])]  # they end the completions of two prompts at least
    expected = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=eos, **plain)[:, ids.shape[1] :]
    tokens = decode(model, ids, mask, eos=eos, pad=pad, max_new_tokens=longest, temperature=1e-6)
    assert torch.equal(tokens, expected)


def test_an_end_elsewhere_changes_no_draw(model):
    """What a completion draws depends on its own past alone, not on how many others still run."""
    ids = torch.randint(3, 300, (6, 4))
    arguments = {"pad": 0, "max_new_tokens": 10, "temperature": 1.0}
    torch.manual_seed(3)
    free = decode(model, ids, torch.ones_like(ids), eos=[-1], **arguments)
    eos = int(free[0, 1])
    torch.manual_seed(3)
    ended = decode(model, ids, torch.ones_like(ids), eos=[eos], **arguments)
    for row, tokens in enumerate(free.tolist()):
        own = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        assert ended[row, : len(own)].tolist() == own


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products on this machine")
def test_layers_with_one_input_share_a_product():
    """A third layer has an input of its own; one of those together is called out of order, one on another tensor."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(40, size) for size in (24, 8, 16))
            self.o_proj = torch.nn.Linear(24, 40, bias=False)

        def forward(self, x, y):
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return self.o_proj(q), k, v, self.v_proj(y), self.k_proj(x), self.q_proj(y)

    layer, (x, y) = Layer(), torch.randn(2, 3, 1, 40)
    assert [len(group) for group in _groups(layer)] == [3, 1]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x, y)
        with _laid_out(layer, 3):
            got = layer(x, y)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_layers_are_left_as_they_were(model):
    before = model(torch.tensor([[5, 6, 7]])).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain = model(torch.tensor([[5, 6, 7]])).logits
        with _laid_out(model, 4):
            laid_out = model(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(laid_out.float(), plain.float(), rtol=0, atol=0.05 * plain.abs().max().item())
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())
