"""PyTorch in tiles of a fixed budget, on any device; the interface is that of `fastppo.engines.engine`."""

from fastppo.engines.chunked.fisher import fisher_vector_product
from fastppo.engines.chunked.linear import linear_loss, linear_statistics, linear_vjp
from fastppo.engines.chunked.selective import selective_statistics, selective_vjp

__all__ = [
    "fisher_vector_product",
    "linear_loss",
    "linear_statistics",
    "linear_vjp",
    "selective_statistics",
    "selective_vjp",
]
