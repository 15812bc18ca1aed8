"""The floor under each operator on a chip of given ceilings: max(FLOPs / rate, bytes / bandwidth), from shapes alone.

    python benchmarks/roofline.py --tflops 800 --gb-per-s 3000 --tokens 8192 --dim 4096 --vocab 128256

Use rates that were measured on the chip (benchmarks/gpu.py measures them), not those of its data sheet. Bytes are what
an operator must move at least once, with everything else in cache; each kernel's docstring has its own count.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from arguments import amount, count, run_script

MODELS = {  # D, V
    "SmolLM2-135M": (576, 49_152),
    "Qwen2.5-7B": (3584, 152_064),
    "Llama-3-8B": (4096, 128_256),
}


class Floor(NamedTuple):
    """FLOPs of the matrix products and bytes that must move, for one call."""

    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)

    def bound(self, flops_per_s: float, bytes_per_s: float) -> str:
        return "FLOPs" if self.flops / flops_per_s > self.bytes / bytes_per_s else "bytes"


def floors(tokens: int, dim: int, vocab: int, itemsize: int = 2) -> dict[str, Floor]:
    """For each operator; hidden, weight, logits, rewards and values have `itemsize` bytes an element.

    forward: one product. loss: three, the logits kept; in a small budget a fourth, the logits recomputed. Log-probs,
    advantages and returns are float32.
    """
    product = 2.0 * tokens * dim * vocab
    operands = itemsize * dim * (tokens + vocab)
    logits = float(itemsize) * tokens * vocab
    return {
        "linear_logprob, forward only": Floor(product, operands),
        "linear_ppo_loss": Floor(3 * product, 2 * operands),
        "linear_ppo_loss, logits recomputed": Floor(4 * product, 3 * operands),
        "linear_ppo_loss with exact KL": Floor(6 * product, 5 * operands),
        "linear_kl, forward only": Floor(2 * product, 2 * operands),
        "linear_kl with gradients": Floor(6 * product, 5 * operands),
        "fisher_vector_product": Floor(8 * product, 5 * operands),
        "from logits, forward": Floor(0.0, logits),
        "from logits, forward and backward": Floor(0.0, 3 * logits),
        "gae": Floor(0.0, (2.0 * itemsize + 2 * 4) * tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tflops", type=amount, required=True, help="measured rate of matrix products, in 10¹² FLOP/s")
    parser.add_argument("--gb-per-s", type=amount, required=True, help="measured bandwidth of a copy, in 10⁹ bytes/s")
    parser.add_argument("--tokens", type=count, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--dim", type=count)
    parser.add_argument("--vocab", type=count)
    options = parser.parse_args()
    if (options.dim is None) != (options.vocab is None):
        parser.error("--dim and --vocab: give both or neither")
    models = MODELS if options.dim is None else {"given": (options.dim, options.vocab)}
    ceilings = (options.tflops * 1e12, options.gb_per_s * 1e9)
    print("| model | tokens | operator | floor, ms | bound by |\n|---|---|---|---|---|")
    for model, (dim, vocab) in models.items():
        for tokens in options.tokens:
            for name, floor in floors(tokens, dim, vocab).items():
                milliseconds = 1e3 * floor.seconds(*ceilings)
                print(f"| {model} | {tokens} | {name} | {milliseconds:.3f} | {floor.bound(*ceilings)} |")


if __name__ == "__main__":
    run_script(main)
