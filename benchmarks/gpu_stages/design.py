"""Which design wins on this chip: the kernels' configurations, and whose matrix products the loss is made of.

A winner is printed as the line to put into kernels/fastppo_kernels/configs.py.
"""

from __future__ import annotations

import functools

from gpu_stages import inputs, loss
from gpu_stages.bench import Bench, describe


def run(bench: Bench) -> None:
    products(bench)
    configurations(bench)


def products(bench: Bench) -> None:
    """The loss with its gradients' products from cuBLAS and from kernels of fastppo's own."""
    case, name = "design: products of the loss", next(iter(loss.SHAPES))
    try:
        from fastppo_kernels import configs

        configs.PRODUCTS  # noqa: B018
    except (ImportError, AttributeError) as error:
        bench.row(case, "configs.PRODUCTS", "skipped", error=f"not available: {describe(error)}")
        return
    size = bench.shape(*loss.SHAPES[name])
    x = functools.cache(lambda: inputs.head(*size, bench.dtype, bench.device))
    shipped = configs.PRODUCTS
    try:
        for half in (False, True):
            for products in ("cublas", "triton"):
                configs.PRODUCTS = products
                label = f"{products}, {'half masked' if half else 'all tokens real'}"
                make = loss.loss(bench, x, half=half, entropy_coef=loss.ENTROPY)
                bench.time(case, label, make, operator="linear_ppo_loss")
    finally:
        configs.PRODUCTS = shipped


def configurations(bench: Bench) -> None:
    """For each kernel with a matrix product, the configurations that the tuner tries, the fastest first."""
    try:
        from fastppo_kernels import tune
        from fastppo_kernels.configs import GEMM
        from fastppo_kernels.launch import architecture, precision

        trials, as_code = tune.trials, tune.as_code
    except (ImportError, AttributeError) as error:
        bench.row("design: configurations", "tune.trials", "skipped", error=f"not available: {describe(error)}")
        return
    # The statistics and the loss first: they are what a training step spends its time in.
    kernels = sorted(GEMM, key=lambda kernel: "fisher" in kernel)
    for number, kernel in enumerate(kernels):
        seconds = max(0.0, bench.left() / (len(kernels) - number))
        case = f"design: {kernel}"

        def tried(kernel: str = kernel, case: str = case, seconds: float = seconds) -> dict:
            rows = []
            for row in trials(kernel, bench.device, min(seconds, 1.0) if bench.tiny else seconds):
                ms, config = row.get("ms"), row.get("config")
                bench.row(case, str(config), "ok" if ms else "error", ms=ms, error=row.get("error"), trial=True)
                if ms:
                    rows.append((ms, config))
            if not rows:
                return {"status": "error", "error": "no configuration ran"}
            ms, best = min(rows, key=lambda row: row[0])
            kind = precision(bench.dtype)
            code = as_code(kernel, architecture(bench.device), kind, best)
            return {"ms": ms, "floor_ms": rows[0][0], "code": code, "tried": len(rows)}

        bench.attempt(case, "winner", tried)
