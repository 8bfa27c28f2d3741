"""Times the routed experts, the router and the grouping on one NVIDIA GPU, against the bytes that they must read.

    python benchmarks/moe.py compile DIR    cross-compiles for sm_90a, on a machine without a GPU
    python benchmarks/moe.py run DIR        on the GPU's machine, which needs PyTorch

`run` checks every result against PyTorch in float32 on the same bfloat16 weights (outputs are written to memory that
held NaN), that the same input gives the same bits and that a NaN stays in its token, and measures the copy rate from
which the floor follows: the bytes of the experts that the tokens hit over that rate. Times are medians of replays of a
captured graph of launches, each with other experts or too large for the cache. Sizes are Step-3.5-Flash's.

`compile` takes a variant, graphs and other kernel constants: see `kernel_variants.py`.
"""

from __future__ import annotations

from pathlib import Path

from kernel_variants import OpBenchmark, Variant
from moe_graphs import GRAPHS

BENCHMARK = OpBenchmark(
    Path(__file__),
    GRAPHS,
    {
        "default": Variant((), tuple(GRAPHS)),
        "streamed": Variant(("crossover.GROUPED_FROM_TOKENS=1000000",), ("experts",)),
        "grouped": Variant(("crossover.GROUPED_FROM_TOKENS=1",), ("experts",)),
    },
)
"""The kernels as they are, and both paths for the crossover."""


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)

if __name__ == "__main__":
    BENCHMARK.sweep(__doc__, TOKENS)
