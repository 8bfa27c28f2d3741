"""The measuring half of `heads.py`: correctness against PyTorch, then times, on one NVIDIA GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dense_run import COPY_RATE, busy_seconds
from heads import EPS, HEAD_DIM, KEY_HEADS, LAUNCHES, PAGE_SIZE, SHAPES
from max.driver import Buffer
from max.engine import Model
from moe_run import DEVICE, Machine
from report import format_table

CACHED = 3
"""Tokens of every request that the cache holds already."""

TOLERANCE = 2.0**-7
"""A rounding to bfloat16 as a share of the value, and as much again for the order of the norms' sums."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    op: str
    layer: str
    tokens: int
    floor_us: float
    busy_us: float
    correct: bool

    def cells(self) -> list[str]:
        times = (f"{self.floor_us:.1f}", f"{self.busy_us:.1f}", f"{self.busy_us / self.floor_us:.2f}")
        return [self.op, self.layer, str(self.tokens), *times, "yes" if self.correct else "NO"]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.float(), expected, rtol=TOLERANCE, atol=1e-5)


def normed_and_rotated(heads: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`[T, N, head_dim]` in float32."""
    x = heads.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + weight.float())
    half = table.shape[1] // 2
    cosines, sines = (part[:, None] for part in table.split(half, 1))
    a, b, rest = x.split([half, half, HEAD_DIM - 2 * half], -1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines, rest], -1)


def measure_qkv(machine: Machine, model: Model, layer: str, tokens: int, of_request: int) -> Row:
    query_heads, rotated = SHAPES[layer]
    lengths = [min(of_request, tokens - begin) for begin in range(0, tokens, of_request)]
    offsets = np.cumsum([0, *lengths]).astype(np.uint32)
    pages_each = -(-(max(lengths) + CACHED) // PAGE_SIZE)
    pages = len(lengths) * pages_each
    lookup = np.random.permutation(pages).astype(np.uint32).reshape(len(lengths), pages_each)
    shape = (pages, 2, LAUNCHES, PAGE_SIZE, KEY_HEADS, HEAD_DIM)
    cache = torch.full(shape, torch.nan, device=DEVICE, dtype=torch.bfloat16)
    q_weight, k_weight = randn(HEAD_DIM), randn(HEAD_DIM)
    angles = torch.rand(tokens, rotated // 2, device=DEVICE) * 6
    table = torch.cat([angles.cos(), angles.sin()], 1)
    projected = [
        (randn(tokens, query_heads * HEAD_DIM), *(randn(tokens, KEY_HEADS * HEAD_DIM) for _ in range(2)))
        for _ in range(LAUNCHES)
    ]
    small = [
        Buffer.from_numpy(offsets).to(machine.device),
        Buffer.from_dlpack(cache),
        Buffer.from_numpy(np.array([-1], np.int64)),
        Buffer.from_numpy(np.full(len(lengths), CACHED, np.uint32)).to(machine.device),
        Buffer.from_numpy(lookup).to(machine.device),
    ]
    operands = [Buffer.from_dlpack(t) for t in (q_weight, k_weight, table)] + small
    operands += [Buffer.from_dlpack(t) for launch in projected for t in launch]
    outputs = machine.execute(model, operands)
    tables = torch.from_numpy(lookup.astype(np.int64)).to(DEVICE)
    places = [
        (tables[r, (CACHED + i) // PAGE_SIZE], (CACHED + i) % PAGE_SIZE)
        for r, length in enumerate(lengths)
        for i in (torch.arange(length, device=DEVICE),)
    ]
    page, row = (torch.cat(parts) for parts in zip(*places, strict=True))
    correct = int(cache[:, 0].isnan().any(-1).logical_not().sum()) == LAUNCHES * tokens * KEY_HEADS
    for i in (0, LAUNCHES - 1):
        q, k, v = (part.view(tokens, -1, HEAD_DIM) for part in projected[i])
        correct &= close(outputs[i], normed_and_rotated(q, q_weight, table))
        correct &= close(cache[page, 0, i, row], normed_and_rotated(k, k_weight, table))
        correct &= torch.equal(cache[page, 1, i, row], v)
    del outputs
    moved = tokens * (2 * (query_heads + 2 * KEY_HEADS) * HEAD_DIM * 2 + rotated * 4)
    busy, _ = busy_seconds(machine, model, operands)
    return Row("qkv", layer, tokens, 1e6 * moved / COPY_RATE, 1e6 * busy / LAUNCHES, bool(correct))


def measure_gate(machine: Machine, model: Model, layer: str, tokens: int) -> Row:
    heads, _ = SHAPES[layer]
    pairs = [(randn(tokens, heads, HEAD_DIM), randn(tokens, heads)) for _ in range(LAUNCHES)]
    pairs[0][1][0, 3] = torch.nan
    operands = [Buffer.from_dlpack(t) for pair in pairs for t in pair]
    del_first = machine.execute(model, [Buffer.from_dlpack(torch.full_like(t, torch.nan)) for p in pairs for t in p])
    del del_first
    outputs = machine.execute(model, operands)
    correct = True
    for i in (0, LAUNCHES - 1):
        x, gate = (value.float() for value in pairs[i])
        expected = (x * gate.sigmoid()[..., None]).view(tokens, -1)
        correct &= torch.allclose(outputs[i].float(), expected, rtol=TOLERANCE, atol=1e-6, equal_nan=True)
    del outputs
    moved = tokens * heads * (2 * HEAD_DIM + 1) * 2
    busy, _ = busy_seconds(machine, model, operands)
    return Row("head_gate", layer, tokens, 1e6 * moved / COPY_RATE, 1e6 * busy / LAUNCHES, correct)


def run(folder: Path, tokens: Sequence[int], of_request: int) -> None:
    """Checks and measures the graphs in `DIR`, with so many tokens of a request, and prints a table.

    Raises:
        SystemExit: If a result was wrong.
    """
    machine = Machine()
    rows = []
    for op, measure in (("qkv", partial(measure_qkv, of_request=of_request)), ("head_gate", measure_gate)):
        file = folder / f"{op}.mef"
        if not file.exists():
            continue
        model = machine.load(file)
        for layer in SHAPES:
            for size in tokens:
                rows.append(measure(machine, model, layer, size))
                print(*rows[-1].cells(), flush=True)
    header = ["op", "layer", "tokens", "floor, us", "busy, us", "x floor", "correct"]
    print(format_table(header, [row.cells() for row in rows]))
    wrong = [row for row in rows if not row.correct]
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong results, the first: {wrong[0]}")
