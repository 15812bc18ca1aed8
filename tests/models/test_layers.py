"""Layers on a CPU in bfloat16 against float64, and models run by them."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from architectures import SIZES
from torch import nn
from torch.autograd import forward_ad

from fastppo.engines import cpu, extension
from fastppo.models import attention, fused, layers, token_hidden

transformers = pytest.importorskip("transformers")

BUILT = pytest.mark.skipif(extension.load() is None, reason=extension.why_missing() or "")
PRODUCTS = pytest.mark.skipif("bfloat16" not in cpu.PRODUCTS, reason="no bfloat16 products on this machine")
ISAS = extension.load().instruction_sets() if extension.load() else []


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(cpu, "isa", request.param)


def close(got, want, tolerance):
    """Within a share of the largest value wanted."""
    assert got.shape == want.shape
    size = torch.linalg.vector_norm(want, torch.inf) if want.numel() else 0.0
    error = torch.linalg.vector_norm(got.double() - want, torch.inf) if want.numel() else 0.0
    assert error <= tolerance * size, f"{error:.3g} of {size:.3g}"


def same_with_any_number_of_threads(run):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@PRODUCTS
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((64,), [64]), ((3, 61), [130, 7]), ((1,), [1, 2, 3]), ((2, 5, 13), [64, 100]), ((129,), [65, 64, 200])],
)
@pytest.mark.parametrize("dim", [64, 5, 133, 2112, 4100])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_dense(shape, sizes, dim, dtypes, isa):
    x = torch.randn(*shape, dim).to(dtypes[0]).requires_grad_()
    weights = [torch.randn(n, dim, dtype=dtypes[1]).requires_grad_() for n in sizes]
    biases = [torch.randn(n).requires_grad_() if g != 1 else None for g, n in enumerate(sizes)]
    upstream = [torch.randn(*shape, n).bfloat16() for n in sizes]
    ys = layers.dense(x, weights, biases)
    torch.autograd.backward(ys, upstream)

    x64, *w64 = (t.detach().bfloat16().double().requires_grad_() for t in (x, *weights))
    b64 = [None if b is None else b.detach().double().requires_grad_() for b in biases]
    want = [F.linear(x64, w, b) for w, b in zip(w64, b64, strict=True)]
    torch.autograd.backward(want, [u.double() for u in upstream])
    for y, z in zip(ys, want, strict=True):
        assert y.dtype == torch.bfloat16
        close(y, z.detach(), 0.5 * torch.finfo(torch.bfloat16).eps)
    # Operands are rounded; sums are not, unless they are kept in bfloat16.
    close(x.grad, x64.grad, 1e-5 if x.dtype == torch.float32 else 0.5 * torch.finfo(torch.bfloat16).eps)
    for got, exact in zip(weights, w64, strict=True):
        close(got.grad, exact.grad, 1e-5)
    for got, exact in zip(biases, b64, strict=True):
        if got is not None:
            close(got.grad, exact.grad, 1e-5)


@PRODUCTS
def test_dense_with_weights_in_bfloat16():
    x, weight = torch.randn(70, 96, requires_grad=True), torch.randn(80, 96).bfloat16().requires_grad_()
    bias = torch.randn(80).bfloat16().requires_grad_()
    (y,) = layers.dense(x, [weight], [bias])
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    half = 0.5 * torch.finfo(torch.bfloat16).eps
    rows = x.detach().bfloat16().double()
    close(y, (rows @ weight.detach().double().T + bias.detach().double()), half)
    close(weight.grad, upstream.double().T @ rows, half)
    close(bias.grad, upstream.double().sum(0), half)
    close(x.grad, upstream.double() @ weight.detach().double(), 1e-5)


@PRODUCTS
def test_dense_gives_only_the_gradients_that_are_asked_for():
    """Frozen weights, an output that is not used, an input without a gradient, views that are not whole rows."""
    x = torch.randn(66, 200)[:, ::2].requires_grad_()
    first, second = torch.randn(70, 100), torch.randn(80, 100, requires_grad=True)
    _, y = layers.dense(x, [first, second], [None, None])
    upstream = torch.randn(80, 66).bfloat16().t()
    y.backward(upstream)
    assert first.grad is None
    rows, weight = x.detach().bfloat16().double(), second.detach().bfloat16().double()
    close(x.grad, upstream.double() @ weight, 1e-5)
    close(second.grad, upstream.double().T @ rows, 1e-5)
    second.grad = None
    layers.dense(x.detach(), [second], [None])[0].backward(upstream)
    close(second.grad, upstream.double().T @ rows, 1e-5)
    (d_x,) = torch.autograd.grad(layers.dense(x, [second], [None])[0].float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


@PRODUCTS
def test_bits_of_dense_do_not_depend_on_the_number_of_threads():
    x, weights = torch.randn(200, 130, requires_grad=True), [torch.randn(n, 130, requires_grad=True) for n in (70, 200)]
    upstream = [torch.randn(200, n).bfloat16() for n in (70, 200)]

    def run():
        ys = layers.dense(x, weights, [None, None])
        return [*ys, *torch.autograd.grad(ys, [x, *weights], upstream)]

    same_with_any_number_of_threads(run)


@BUILT
@pytest.mark.parametrize("shape", [(1, 3), (7, 33), (3, 5, 64), (90, 577), (0, 12)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm(shape, scale, isa):
    x = (scale * torch.randn(shape)).requires_grad_()
    weight = torch.randn(shape[-1], requires_grad=True)
    upstream = torch.randn(shape)
    y = layers.rms_norm(x, weight, 1e-6)
    y.backward(upstream)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    want = w64 * x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want.backward(upstream.double())
    close(y, want.detach(), 1e-6)
    close(x.grad, x64.grad, 1e-4)  # a difference of larger terms
    close(weight.grad, w64.grad, 1e-5)
    assert torch.equal(layers.rms_norm(torch.zeros(2, 9), torch.ones(9), 1e-6), torch.zeros(2, 9))


@BUILT
@pytest.mark.parametrize("shape", [(1,), (3, 37), (2, 100, 400), (0,)])
def test_gated(shape, isa):
    gate, up = ((4 * torch.randn(shape)).bfloat16().requires_grad_() for _ in range(2))
    with torch.no_grad():
        gate.view(-1)[:1] = -200.0  # whose exponential is infinite
        gate.view(-1)[1:2] = 200.0
    upstream = torch.randn(shape).bfloat16()
    h = layers.gated(gate, up)
    h.backward(upstream)
    g64, u64 = (t.detach().double().requires_grad_() for t in (gate, up))
    want = F.silu(g64) * u64
    want.backward(upstream.double())
    half = 0.51 * torch.finfo(torch.bfloat16).eps
    for got, exact in ((h, want.detach()), (gate.grad, g64.grad), (up.grad, u64.grad)):
        assert ((got.double() - exact).abs() <= half * exact.abs() + 1e-6).all()


@PRODUCTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "queries", "keys", "dim"),
    [(2, 4, 2, 70, 70, 64), (1, 9, 3, 55, 55, 64), (3, 3, 1, 33, 130, 128), (2, 2, 2, 64, 64, 64), (1, 1, 1, 1, 1, 64)],
)
def test_attention(batch, heads, key_heads, queries, keys, dim, dtype, isa):
    # As attention layers give them: views of [B, T, heads, d].
    query = torch.randn(batch, queries, heads, dim).to(dtype).transpose(1, 2).requires_grad_()
    key = torch.randn(batch, keys, key_heads, dim).to(dtype).transpose(1, 2).requires_grad_()
    value = torch.randn(batch, key_heads, keys, dim).bfloat16().requires_grad_()
    visible = torch.rand(batch, 1, queries, keys) < 0.6
    visible[..., -1] = True
    out = layers.attention(query, key, value, visible, 0.2)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    q64, k64, v64 = (t.detach().bfloat16().double().requires_grad_() for t in (query, key, value))
    group = heads // key_heads
    scores = 0.2 * q64 @ k64.repeat_interleave(group, 1).transpose(-1, -2)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    want = (weights @ v64.repeat_interleave(group, 1)).transpose(1, 2)
    want.backward(upstream.double())
    assert out.dtype == torch.bfloat16
    # Weights and their gradients are rounded to bfloat16 on their way into the products.
    for got, exact in ((out, want.detach()), (value.grad, v64.grad)):
        assert (got.double() - exact).norm() <= 4e-3 * exact.norm()
    for got, exact in ((query, q64), (key, k64)):
        assert got.grad.dtype == dtype
        assert (got.grad.double() - exact.grad).norm() <= 4e-3 * exact.grad.norm() + 1e-2 * (keys == 1)


@PRODUCTS
def test_attention_of_rows_that_see_nothing_is_finite_and_spoils_no_other():
    query, key, value = (torch.randn(2, 2, 40, 64).bfloat16().requires_grad_() for _ in range(3))
    visible = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40).clone()
    visible[1, :, :7] = False  # padding, whose gradient is 0
    out = layers.attention(query, key, value, visible, 0.125)
    upstream = torch.randn_like(out)
    upstream[1, :7] = 0
    out.backward(upstream)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(t.grad).all() for t in (query, key, value))
    want = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), visible, scale=0.125)
    torch.testing.assert_close(out[1, 7:].float(), want.transpose(1, 2)[1, 7:].detach(), atol=2e-2, rtol=2e-2)
    assert query.grad[1, :, :7].abs().max() == 0


@PRODUCTS
def test_bits_of_attention_do_not_depend_on_the_number_of_threads():
    query, key, value = (torch.randn(5, 3, 70, 64).bfloat16().requires_grad_() for _ in range(3))
    visible = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    upstream = torch.randn(5, 70, 3, 64).bfloat16()

    def run():
        out = layers.attention(query, key, value, visible, 0.125)
        return [out, *torch.autograd.grad(out, [query, key, value], upstream)]

    same_with_any_number_of_threads(run)


def model_of(kind: str, **changes) -> nn.Module:
    torch.manual_seed(torch.seed())
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 96, "initializer_range": 0.1, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "attn_implementation": attention.NAME}
    config = getattr(transformers, f"{kind}Config")(**sizes | heads | changes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model


def forwards(model):
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def run(model, ids, upstream, autocast=True):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        hidden = token_hidden(model, ids, torch.ones_like(ids))
    (hidden * upstream.to(hidden.dtype)).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters())]


@PRODUCTS
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "GPTNeoX", "Phi3"])
def test_a_model_is_as_near_to_float64_as_under_autocast_alone(kind, monkeypatch):
    options = {"rotary_pct": 0.5} if kind == "GPTNeoX" else {}
    model = model_of(kind, **options)
    ids, upstream = torch.randint(1, 97, (3, 40)), torch.randn(3, 40, 128)
    taken = set()
    for name in ("gated", "rms_norm", "dense", "attention"):
        function = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *args, f=function, n=name: taken.add(n) or f(*args))
    ours = [x.clone() for x in run(model, ids, upstream)]
    monkeypatch.setattr(fused, "_usable", lambda model: False)
    monkeypatch.setattr(layers, "fits_attention", lambda *args: False)
    plain = [x.clone() for x in run(model, ids, upstream)]
    exact = run(model.double(), ids, upstream, autocast=False)
    # Gemma normalizes with 1 + w and has another activation; Phi 3 has one weight for both halves of the gate.
    attending = {"attention", "dense"}
    everything = attending | {"gated", "rms_norm"}
    assert taken == {"Gemma": attending, "GPTNeoX": attending, "Phi3": attending | {"rms_norm"}}.get(kind, everything)
    errors = [sum((a.double() - c).norm() / c.norm() for a, c in zip(x, exact, strict=True)) for x in (ours, plain)]
    # On average the two are equal; in one draw rounding may favour either.
    assert errors[0] <= 2 * errors[1]


@PRODUCTS
def test_a_model_is_left_as_it_was():
    model = model_of("Llama")
    inside = set()

    def fail():
        with torch.autocast("cpu", torch.bfloat16), fused.fused_layers(model):
            inside.update(forwards(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    # Two layers of seven products, a gated MLP and two norms, and the last norm.
    assert len(inside) == 2 * (7 + 1 + 2) + 1
    assert not forwards(model)


def test_a_model_is_left_alone_where_the_layers_would_not_do():
    model = model_of("Llama")
    half = torch.autocast("cpu", torch.bfloat16)
    with fused.fused_layers(model):  # float32
        assert not forwards(model)
    with torch.autocast("cpu", torch.float16), fused.fused_layers(model):
        assert not forwards(model)
    with half, forward_ad.dual_level(), fused.fused_layers(model):
        assert not forwards(model)
    compiled = model_of("Llama")
    compiled.layers[0].compile()
    with half, fused.fused_layers(compiled):
        assert not forwards(compiled)
    model.gradient_checkpointing_enable()
    with half, fused.fused_layers(model.train()):
        assert not forwards(model)


class Clamped(nn.Module):
    """As some architectures have it: a gated MLP until the gate is very large, or `factor` has been trained."""

    def __init__(self, limit: float = torch.inf, factor: float | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(64, 64) for _ in range(3))
        self.limit = limit
        self.factor = None if factor is None else nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        out = self.down_proj(F.silu(self.gate_proj(x).clamp(max=self.limit)) * self.up_proj(x))
        return out if self.factor is None else out * self.factor


@PRODUCTS
def test_a_module_that_is_a_gated_mlp_only_sometimes_is_none():
    def taken(module: nn.Module) -> bool:
        with torch.autocast("cpu", torch.bfloat16), fused.fused_layers(module):
            return "forward" in module.__dict__

    assert taken(Clamped())
    assert not taken(Clamped(limit=7.0))
    assert not taken(Clamped(factor=1.0))
    watched = Clamped()
    watched.act_fn = nn.SiLU()
    assert taken(watched)
    watched.act_fn.register_forward_hook(lambda *_: None)
    assert not taken(watched)
    zero = Clamped()
    nn.init.zeros_(zero.down_proj.weight)
    nn.init.zeros_(zero.down_proj.bias)
    zero.limit = 8.0  # settings of its own, which have not been tried
    assert not taken(zero)


@PRODUCTS
def test_layers_whose_weight_is_made_before_they_run_are_left_alone():
    module = Clamped()
    nn.utils.parametrizations.weight_norm(module.up_proj)  # another class
    module.down_proj.register_forward_pre_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16), fused.fused_layers(module):
        assert forwards(module) == {"gate_proj"}


@PRODUCTS
def test_outputs_may_be_written_into_and_errors_are_those_of_torch():
    linear, x = nn.Linear(64, 64), torch.randn(70, 64)
    with torch.autocast("cpu", torch.bfloat16), fused.fused_layers(linear):
        linear(x).clamp_(min=0.0).sum().backward()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.randn(70, 128))
        with torch.autocast("cpu", enabled=False):
            assert linear(x).dtype == torch.float32
        with torch.backends.mkldnn.flags(enabled=False):
            assert linear(x).dtype == torch.bfloat16
    half = x.bfloat16().double() @ linear.weight.detach().bfloat16().double().T + linear.bias.detach().double()
    close(linear.bias.grad, (half > 0).double().sum(0), 0.05)


@PRODUCTS
def test_modules_that_compute_something_else_are_left_alone():
    class Shifted(type(model_of("Llama").norm)):
        def forward(self, x):
            return super().forward(x) + 1

    model = model_of("Llama")
    model.norm.__class__ = Shifted
    model.layers[0].mlp.act_fn = nn.GELU()
    model.layers[1].self_attn.q_proj.forward = lambda x: F.linear(x, torch.zeros(64, 64))
    with torch.autocast("cpu", torch.bfloat16), fused.fused_layers(model):
        inside = forwards(model)
    assert "norm" not in inside
    assert "layers.0.mlp" not in inside
    assert "layers.1.mlp" in inside
    assert "layers.0.self_attn.q_proj" in inside
    assert "forward" in model.layers[1].self_attn.q_proj.__dict__
