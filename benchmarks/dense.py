"""Times dense products (`qkv`: attention's first four, of the same tokens) on one NVIDIA GPU, against the bytes that
they must move and the operations that they must do.

    python benchmarks/dense.py compile DIR    cross-compiles for sm_90a, on a machine without a GPU
    python benchmarks/dense.py run DIR        on the GPU's machine, which needs PyTorch

`run` checks every result against PyTorch in float32 on the same bfloat16 operands (outputs are written to memory that
held NaN), that the same input gives the same bits and that a NaN stays in its token. Times are the device's busy time
over back-to-back launches, each with other weights. Sizes are Step-3.5-Flash's.

`compile` takes a variant, graphs and other kernel constants: see `kernel_variants.py`.
"""

from __future__ import annotations

from pathlib import Path

from dense_graphs import GRAPHS
from kernel_variants import OpBenchmark, Variant

BENCHMARK = OpBenchmark(
    Path(__file__),
    GRAPHS,
    {
        "default": Variant((), tuple(GRAPHS)),
        "few": Variant(("crossover.DENSE_FROM_TOKENS=1", "crossover.WIDE_FROM_TOKENS=1"), ("linear",)),
        "single": Variant(("dense_wgmma_gpu.SHARERS=1",), ("linear",)),
    },
)


TOKENS = (16, 32, 64, 65, 128, 192, 256, 384, 512, 1024, 2048, 8192)

if __name__ == "__main__":
    BENCHMARK.sweep(__doc__, TOKENS)
