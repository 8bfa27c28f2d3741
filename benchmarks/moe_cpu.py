"""Times the ops of the mixture-of-experts layer on the CPU, each alone, in interleaved rounds.

    python benchmarks/moe_cpu.py [--tokens 1 8 64 512] [--dtype bfloat16] [--rounds 15]

Prints medians with GFLOP/s and with the GB/s of the weights that the hit experts hold, and, measured by numpy in the
same rounds, what the machine reads and multiplies at; `matmul` is MAX's own. Routing is uniformly random, and
successive rounds hit different experts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops

from step3p5 import kernels

CPU_REF = DeviceRef.CPU()
F32 = DType.float32
I32 = DType.int32
DTYPES = {"float32": DType.float32, "bfloat16": DType.bfloat16}
Floats = npt.NDArray[np.float32]


@dataclass
class Case:
    """One measured call: `calls` are rotated over, `flop` and `weight_bytes` are of one call."""

    name: str
    calls: list[Callable[[], object]]
    flop: float
    weight_bytes: float
    seconds: list[float] = field(default_factory=list)

    def run(self, round_index: int) -> None:
        call = self.calls[round_index % len(self.calls)]
        start = time.perf_counter()
        call()
        self.seconds.append(time.perf_counter() - start)

    def line(self) -> str:
        median, best = float(np.median(self.seconds)), min(self.seconds)
        return (
            f"{self.name:24} {1e3 * median:9.3f} ms (best {1e3 * best:9.3f})"
            f" {1e-9 * self.flop / median:8.1f} GFLOP/s {1e-9 * self.weight_bytes / median:7.1f} GB/s"
        )


def no_limit() -> TensorValue:
    return ops.constant(np.inf, F32, device=CPU_REF)


def compile_graphs(weight_dtype: DType, top_k: int) -> dict[str, Model]:
    """One model an op, with symbolic sizes."""
    tokens_k, tokens = TensorType(I32, ("TK",), CPU_REF), TensorType(F32, ("T", "H"), CPU_REF)
    offsets = TensorType(I32, ("E1",), CPU_REF)
    wide = TensorType(weight_dtype, ("E", "M", "H"), CPU_REF)
    inputs = {
        "route": [TensorType(F32, ("T", "E"), CPU_REF), TensorType(F32, ("E",), CPU_REF)],
        "group": [TensorType(I32, ("T", top_k), CPU_REF), TensorType(F32, ("E",), CPU_REF)],
        "gate_up": [tokens, wide, wide, tokens_k, offsets],
        "down": [
            TensorType(F32, ("TK", "M"), CPU_REF),
            TensorType(weight_dtype, ("E", "H", "M"), CPU_REF),
            tokens_k,
            offsets,
            TensorType(F32, ("T", top_k), CPU_REF),
        ],
        "linear": [tokens, TensorType(weight_dtype, ("N", "H"), CPU_REF)],
        "matmul": [tokens, TensorType(weight_dtype, ("N", "H"), CPU_REF)],
    }
    build: dict[str, Callable[..., object]] = {
        "route": lambda x, b: kernels.route(x, b, top_k=top_k, normalize=True, scale=3.0),
        "group": lambda ids, bias: kernels.group(ids, num_experts=bias.shape[0]),
        "gate_up": lambda x, gate, up, rows, starts: (kernels.gate_up(x, gate, up, rows, starts, no_limit()),),
        "down": lambda *operands: (kernels.down(*operands),),
        "linear": lambda *operands: (kernels.linear(*operands),),
        "matmul": lambda x, w: (x @ ops.cast(w, F32).transpose(0, 1),),
    }
    session = InferenceSession(devices=[CPU()])
    models = {}
    for name, types in inputs.items():
        with Graph(name, input_types=types) as graph:
            graph.output(*build[name](*(v.tensor for v in graph.inputs)))  # type: ignore[misc]
        models[name] = session.load(graph)
    return models


def weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Buffer:
    """Random weights; bfloat16 by dropping the low halves of float32."""
    values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
    if dtype == DType.float32:
        return Buffer.from_numpy(values)
    return Buffer.from_numpy((values.view(np.uint32) >> 16).astype(np.uint16)).view(DType.bfloat16, shape)


def machine_cases(rng: np.random.Generator) -> list[Case]:
    """What numpy reads and multiplies at, on all cores."""
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    parts = [np.ones(32 << 20, np.float32) for _ in range(workers)]
    a, b = (rng.standard_normal((2048, 2048), np.float32) for _ in range(2))
    return [
        Case("numpy max (reads)", [lambda: list(pool.map(np.max, parts))], 0, sum(p.nbytes for p in parts)),
        Case("numpy matmul 2048", [lambda: a @ b], 2 * 2048**3, 0),
    ]


def op_cases(models: dict[str, Model], args: argparse.Namespace, rng: np.random.Generator) -> list[Case]:
    """Every op at every number of tokens."""
    dtype = DTYPES[args.dtype]
    hidden, width, experts, top_k = args.hidden_size, args.intermediate_size, args.num_experts, args.top_k
    gate, up = (weights(rng, (experts, width, hidden), dtype) for _ in range(2))
    down = weights(rng, (experts, hidden, width), dtype)
    square = weights(rng, (4 * hidden, hidden), dtype)
    row_bytes = dtype.size_in_bytes * hidden
    bias = Buffer.from_numpy(np.zeros(experts, np.float32))
    cases = []
    for tokens in args.tokens:
        calls: dict[str, list[Callable[[], object]]] = {name: [] for name in models}
        hit = 0.0
        x = Buffer.from_numpy(rng.standard_normal((tokens, hidden), np.float32))
        act = Buffer.from_numpy(rng.standard_normal((tokens * top_k, width), np.float32))
        for _ in range(variants := 4):
            logits = Buffer.from_numpy(rng.standard_normal((tokens, experts), np.float32))
            ids, chosen = models["route"].execute(logits, bias)
            rows, offsets = models["group"].execute(ids, bias)
            hit += len(np.unique(ids.to_numpy())) / variants
            operands: dict[str, tuple[Buffer, ...]] = {
                "route": (logits, bias),
                "group": (ids, bias),
                "gate_up": (x, gate, up, rows, offsets),
                "down": (act, down, rows, offsets, chosen),
                "linear": (x, square),
                "matmul": (x, square),
            }
            for name, buffers in operands.items():
                calls[name].append(lambda m=models[name], b=buffers: m.execute(*b))  # type: ignore[misc]
        pair = 2.0 * tokens * top_k * width * hidden
        sizes = {
            "route": (0.0, 0.0),
            "group": (0.0, 0.0),
            "gate_up": (2 * pair, 2 * hit * width * row_bytes),
            "down": (pair, hit * width * row_bytes),
            **dict.fromkeys(("linear", "matmul"), (8.0 * tokens * hidden * hidden, 4 * hidden * row_bytes)),
        }
        cases += [Case(f"{name} T={tokens}", calls[name], *sizes[name]) for name in models]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--num-experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    cases = machine_cases(rng) + op_cases(compile_graphs(DTYPES[args.dtype], args.top_k), args, rng)
    for index in range(args.rounds):
        for case in cases:
            case.run(index)
    print("\n".join(case.line() for case in cases))


if __name__ == "__main__":
    main()
