"""Arithmetic, not a measurement: what the head loss costs at the limits of an accelerator.

    python tools/roofline.py [--rows 3584 --chunk-rows 512 --tflops 989 --hbm 3.35 --link 0.45]

Defaults: an H100 SXM by its data sheet (dense bf16, HBM3, NVLink in one direction). Real kernels
reach less; the ratios between the columns say what bounds what.
"""

import argparse

from benchmarking import text_table

from dspark_megatron.planning.cost.rates import Rates

TARGETS = {
    "8B (h 4096, v 151936)": (4096, 151936),
    "70B (h 8192, v 128256)": (8192, 128256),
}
RANK = 256
HALF = 2
"""Bytes of a bf16 number."""
# Two logits written by products; two reads of both for maximum and sum, one for the distances, one
# for the gradient; the gradient written, and read by two products.
LOGIT_BYTES = HALF * (2 + 4 + 2 + 2 + 1 + 2)
"""Traffic of a row and vocabulary entry when `loss.compile` fuses each pass."""
FORMATS = {
    "target": "",
    "tp": "d",
    "products": ".2f",
    "weights": ".2f",
    "logits": ".2f",
    "gradient all-reduce": ".2f",
    "small collectives": "d",
}


def row(name: str, tp: int, args: argparse.Namespace) -> dict[str, object]:
    """Milliseconds of one call: rows n of width h, Markov rank r, v/tp columns."""
    h, v = TARGETS[name]
    n, columns = args.rows, v / tp
    chunks = -(-n // args.chunk_rows)
    # u: h + r; t: h; gradient of [h z]: h + r; gradient of W2: r.
    flops = 2 * n * columns * (3 * h + 3 * RANK)
    weights = chunks * columns * HALF * (3 * h + 3 * RANK)  # each product reads its matrix
    logits = n * columns * LOGIT_BYTES
    gradients = 2 * (tp - 1) / tp * n * (h + RANK) * HALF  # a ring all-reduce
    return {
        "target": name,
        "tp": tp,
        "products": 1e3 * flops / (args.tflops * 1e12),
        "weights": 1e3 * weights / (args.hbm * 1e12),
        "logits": 1e3 * logits / (args.hbm * 1e12),
        "gradient all-reduce": 1e3 * gradients / (args.link * 1e12),
        "small collectives": 2 * chunks if tp > 1 else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=3584, help="supervised slots")
    parser.add_argument("--chunk-rows", type=int, default=512)
    parser.add_argument(
        "--tflops", type=float, default=Rates.tflops, help="dense bf16, 10^12 a second"
    )
    parser.add_argument("--hbm", type=float, default=Rates.hbm, help="memory, TB/s")
    parser.add_argument(
        "--link", type=float, default=Rates.nvlink / 1e3, help="link, 10^12 bytes a second"
    )
    args = parser.parse_args()
    rows = [row(name, tp, args) for name in TARGETS for tp in (1, 2, 4, 8)]
    print("milliseconds at the limits of the machine: arithmetic, not measured")
    print(text_table(rows, FORMATS))


if __name__ == "__main__":
    main()
