"""A transformer's layers on a CPU under bfloat16 autocast, with gradients: csrc/{dense,attention,pointwise}.h.

Autocast makes a bfloat16 copy of every weight and of what each layer is given, lays the copies out for its products,
and rounds every weight's gradient to bfloat16 before it makes that float32 again. Here operands are rounded and laid
out in one go, in the caches; layers that are given the same tensor are one product, and its gradients are summed and
kept in float32. Normalization and the gated activation read their rows once instead of once an operation. What is
computed is the same but for that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastppo.engines import cpu, extension

_FEWEST = 64  # rows, and features on either side: the products' blocks; below, PyTorch's own are no slower


def only_reverse_mode() -> bool:
    """Whether nothing is being done for which the functions below are not written: derivatives of forward mode,
    functional transforms, compilation."""
    return (
        forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
    )


def fits_dense(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `dense` takes an activation and weights of these types and sizes, and is faster."""
    return torch.backends.mkldnn.enabled and all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.bfloat16)
        and t.shape[-1] == x.shape[-1] >= _FEWEST
        and t.numel() >= _FEWEST * t.shape[-1]
        for t in (x, *weights)
    )


def dense(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """x W_gᵀ + b_g for each of some layers.

    Args:
        x: [..., K] float32 or bfloat16.
        weights: [N_g, K] float32 or bfloat16; biases: [N_g] or None.

    Returns:
        [..., N_g] bfloat16. Gradients are in the dtypes of the arguments; first-order only, double backward raises.
    """
    return _Dense.apply(x, *weights, *biases)


def fits_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes tensors of these types."""
    return weight.shape == x.shape[-1:] and all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / √(mean x² + eps) of x [..., n], w [n], in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467)."""
    return _RmsNorm.apply(x, weight, eps)


def fits_gated(gate: Tensor, up: Tensor) -> bool:
    """Whether `gated` takes tensors of these types."""
    return gate.shape == up.shape and all(
        type(t) is Tensor and t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in (gate, up)
    )


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise in bfloat16, rounded once (SwiGLU; Shazeer, 2020, arXiv:2002.05202)."""
    return _Gated.apply(gate, up)


def fits_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> bool:
    """Whether `attention` takes tensors of these types and sizes, and is faster."""
    return (
        "bfloat16" in cpu.PRODUCTS
        and torch.backends.mkldnn.enabled
        and only_reverse_mode()
        and all(type(t) is Tensor and t.device.type == "cpu" for t in (query, key, value, visible))
        and value.dtype == torch.bfloat16
        and query.dtype in (torch.float32, torch.bfloat16)
        and key.dtype in (torch.float32, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 64 == 0
        and query.shape[1] // key.shape[1] * query.shape[2] >= 32  # of the 64 rows that go into a product
    )


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, the products in bfloat16, the softmax in float32.

    Args:
        query: [B, H, Q, d] float32 or bfloat16, d a multiple of 64.
        key, value: [B, H / G, K, d], one for every G query heads; value in bfloat16.
        visible: [B, 1, Q, K] bool, True where a query sees a key.

    Returns:
        [B, Q, H, d] bfloat16; what stands at queries that see nothing is finite.
    """
    return _Attention.apply(query, key, value, visible, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        batch, heads, queries, dim = query.shape
        visible = visible.expand(batch, 1, queries, key.shape[2])[:, 0]
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
        out = value.new_empty(batch, queries, heads, dim)
        log_sums = out.new_empty(batch, heads, queries, dtype=torch.float32)
        ctx.sizes = (batch, heads, key.shape[1], queries, key.shape[2], dim)
        ctx.scale = scale
        extension.load().attention(
            ctx.sizes, [*map(_heads, (query, key, value, out.transpose(1, 2)))], _mask(visible), scale, _at(log_sums),
            _settings(),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, visible, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, visible, log_sums = ctx.saved_tensors
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        extension.load().attention_backward(
            ctx.sizes, [*map(_heads, (query, key, value, d_out.transpose(1, 2)))], _mask(visible), ctx.scale,
            _at(log_sums), [*map(_heads, gradients)], _settings(),
        )  # fmt: skip
        return (*gradients, None, None)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights_and_biases: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = _halves(weights_and_biases)
        rows, matrices = _rows(x), [_rows(weight) for weight in weights]
        ctx.save_for_backward(rows, *weights)
        ctx.shape, ctx.bias_dtypes = x.shape, [None if bias is None else bias.dtype for bias in biases]
        ctx.set_materialize_grads(False)
        biases = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
        # Of their shape at once: autograd lets nobody write into a view that is made in here.
        ys = [rows.new_empty(*x.shape[:-1], len(weight), dtype=torch.bfloat16) for weight in weights]
        arguments = [(_matrix(w), _at(b), _at(y), 0, 0) for w, b, y in zip(matrices, biases, ys, strict=True)]
        extension.load().dense_forward(_matrix(rows), arguments, _settings())
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        need_x, (need_weight, need_bias) = ctx.needs_input_grad[0], _halves(ctx.needs_input_grad[1:])
        d_x = torch.empty_like(rows) if need_x else None
        d_weights: list[Tensor | None] = [None] * len(weights)
        d_biases: list[Tensor | None] = [None] * len(weights)
        used = [(g, _rows(weights[g]), _rows(d_y)) for g, d_y in enumerate(d_ys) if d_y is not None]
        if not used:
            return (None, *d_weights, *d_biases)
        arguments = []
        for g, weight, d_y in used:
            d_weights[g] = torch.empty_like(weight) if need_weight[g] else None
            d_biases[g] = torch.empty(len(weight)) if need_bias[g] else None
            arguments.append((_matrix(weight), 0, _at(d_y), _at(d_weights[g]), _at(d_biases[g])))
        extension.load().dense_backward(_matrix(rows), arguments, _at(d_x), _settings())
        d_biases = [None if d is None else d.to(t) for d, t in zip(d_biases, ctx.bias_dtypes, strict=True)]
        return (None if d_x is None else d_x.view(ctx.shape), *d_weights, *d_biases)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        scales = x.new_empty(x.shape[:-1])
        extension.load().rms_norm(
            _at(x), _at(weight), eps, scales.numel(), x.shape[-1], _at(y), _at(scales), _settings()
        )
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        d_y, d_x = d_y.contiguous(), torch.empty_like(x)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        extension.load().rms_norm_backward(
            _at(x),
            _at(weight),
            _at(scales),
            _at(d_y),
            scales.numel(),
            x.shape[-1],
            _at(d_x),
            _at(d_weight),
            _settings(),
        )
        return d_x, d_weight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        h = torch.empty_like(gate)
        extension.load().gated(_at(gate), _at(up), gate.numel(), _at(h), _settings())
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, d_h: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_h, d_gate, d_up = d_h.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        extension.load().gated_backward(_at(gate), _at(up), _at(d_h), gate.numel(), _at(d_gate), _at(d_up), _settings())
        return d_gate, d_up


def _halves(items: tuple) -> tuple[tuple, tuple]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def _rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix of whole rows."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _matrix(x: Tensor) -> tuple[int, bool, int, int]:
    return x.data_ptr(), x.dtype == torch.bfloat16, *x.shape


def _heads(x: Tensor) -> tuple[int, bool, int, int, int]:
    """[B, heads, rows, d], each row whole."""
    return x.data_ptr(), x.dtype == torch.bfloat16, *x.stride()[:3]


def _mask(visible: Tensor) -> tuple[int, int, int]:
    return visible.data_ptr(), *visible.stride()[:2]


def _settings() -> tuple[int, str | None]:
    return torch.get_num_threads(), cpu.isa
