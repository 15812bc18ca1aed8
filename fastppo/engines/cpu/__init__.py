"""C++ for a CPU (csrc/), behind `fastppo._C`; the interface is that of `fastppo.engines.engine`."""

from fastppo.engines.chunked import fisher_vector_product
from fastppo.engines.cpu.gae import gae
from fastppo.engines.cpu.linear import linear_loss, linear_statistics, linear_vjp
from fastppo.engines.cpu.selective import selective_statistics, selective_vjp

__all__ = [
    "fisher_vector_product",
    "gae",
    "linear_loss",
    "linear_statistics",
    "linear_vjp",
    "selective_statistics",
    "selective_vjp",
]
