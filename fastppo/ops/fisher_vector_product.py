"""The Fisher matrix of a language model's policy times a direction, from hidden states, without [N, V].

    hidden, d_hidden [N, D], weight, d_weight [V, D]
        pass 1   tiles of z and ∂z  ->  logsumexp and Σ_v p ∂z of every row          4NDV, 6NDV with d_weight
        pass 2   tiles recomputed   ->  g = w t′ (diag(p) − p pᵀ) ∂z in place        4NDV, 6NDV with d_weight
                                    ->  g W, and gᵀ h with d_weight                  2NDV, 4NDV with d_weight

That is 10NDV, or 16NDV with a direction for the weight; the weight (and its direction) are read once a pass and block
of rows. The naive path does 6NDV, or 10NDV, and holds z, ∂z, p and u: four times [N, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.dispatch import ENGINES
from fastppo.engines.engine import Gradients, Head, Needs, Options, empty_gradients
from fastppo.ops import reference
from fastppo.ops.checks import check_mask, check_per_token, check_shape, checked
from fastppo.ops.head import open_head, open_options, whole
from fastppo.ops.outputs import FisherOutput


@checked
@torch.no_grad()
def fisher_vector_product(
    hidden: Tensor,
    weight: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    d_bias: Tensor | None = None,
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> FisherOutput:
    """Σ_n w_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n v with J_n = ∂z_n/∂(h, W, b) and v = (d_hidden, d_weight, d_bias).

    The middle of a Fisher-vector product of the whole model: forward mode through the backbone gives d_hidden = J v,
    this gives the vector that reverse mode carries back, u = (diag(p) − p pᵀ) ∂z pulled back through the head. For a
    softmax the Fisher matrix and the generalized Gauss-Newton matrix of the KL are one (Martens, 2020,
    arXiv:1412.1193); the product from both modes is Schraudolph's (2002, Neural Computation 14:1723). It is symmetric
    and positive semidefinite, and it is the Hessian of the mean KL(π_old ‖ π) at π = π_old that TRPO needs.

    Args:
        hidden: [..., D] float32, bfloat16 or float16; weight: [V, D], the lm_head; bias: [V].
        d_hidden: [..., D] in the dtype of hidden: the direction of the hidden states.
        d_weight, d_bias: [V, D], [V] in the dtypes of weight and bias: the direction of a head that is trained too;
            None holds it constant, and its product is then not computed. Give zeros for a trained head at rest.
        mask: [...] bool, True for a token that counts; the others give 0, cost nothing and may hold anything.
        row_weights: [...] w_n, 1 if None. For a mean over tokens give mask / mask.sum().
        temperature, logit_scale, softcap: transform(x) = softcap · tanh(logit_scale · x / softcap) / temperature.
        backend: None chooses by device; see `fastppo doctor`.

    Returns:
        FisherOutput(hidden, weight, bias), detached, summed in float32 (float64 for float64). In float32 the product is
        symmetric to about 1e-6 of its size; in bfloat16 only to about 1e-2, which conjugate gradients notice.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that don't go together, a row weight that is not finite, a
            direction for a bias that is not there.
    """
    head = open_head(hidden, weight, bias)
    d_weight, d_bias = whole(d_weight), whole(d_bias)
    _check_direction("d_hidden", d_hidden, "hidden", hidden)
    if d_weight is not None:
        _check_direction("d_weight", d_weight, "weight", head.weight)
    if d_bias is not None:
        if bias is None:
            raise ValueError("d_bias: there is no bias to move; give bias too, or leave d_bias out")
        _check_direction("d_bias", d_bias, "bias", head.bias)
    weights = _open_row_weights(hidden, mask, row_weights)
    options = open_options("fisher_vector_product", backend, hidden, temperature, logit_scale, softcap)
    directions = (d_hidden.reshape(head.hidden.shape), d_weight, d_bias)
    if options.backend == "reference":
        out = reference.fisher_vector_product(*head, *directions, weights, options.transform)
    else:
        out = FisherOutput(*_product(*head, *directions, weights, *options.flat()))
    return FisherOutput(
        out.hidden.view(hidden.shape),
        None if d_weight is None else out.weight,
        None if d_bias is None else out.bias,
    )


@torch.library.custom_op(
    "fastppo::fisher_vector_product",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor d_hidden, Tensor? d_weight, Tensor? d_bias, "
    f"Tensor row_weights, {Options.SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _product(*arguments) -> Gradients:
    """The products for hidden, weight and bias, in their dtypes; the last two empty where no direction was given."""
    options = Options.of(*arguments[7:])
    product = ENGINES[options.backend].fisher_vector_product
    return tuple(product(Head(*arguments[:3]), Head(*arguments[3:6]), arguments[6], options))


@_product.register_fake
def _(*arguments):
    return empty_gradients(Head(*arguments[:3]), Needs(*(direction is not None for direction in arguments[3:6])))


def _check_direction(name: str, direction: Tensor, like: str, tensor: Tensor) -> None:
    check_shape(name, direction, tuple(tensor.shape), f"like {like}")
    if direction.dtype != tensor.dtype:
        raise TypeError(f"{name}: expected {tensor.dtype} like {like}, got {direction.dtype}")


def _open_row_weights(hidden: Tensor, mask: Tensor | None, row_weights: Tensor | None) -> Tensor:
    """w [N], 0 where masked, in the dtype of the sums."""
    mask = check_mask(mask, hidden[..., 0])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = mask.to(dtype) if row_weights is None else check_per_token("row_weights", row_weights, mask, dtype)
    return weights.reshape(-1)
