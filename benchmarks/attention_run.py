"""The measuring half of `attention.py`: correctness against PyTorch, then times, on one NVIDIA GPU."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import numpy as np
import torch
from attention import FIXED, PATHS, SHAPES
from bandwidth import usable_cores
from heads import HEAD_DIM, KEY_HEADS, PAGE_SIZE
from heads_run import normed_and_rotated, randn
from max._kv_cache_ops import mha_decode_num_partitions
from max.driver import Buffer
from moe_graphs import LAUNCHES
from moe_run import DEVICE, Machine
from report import Environment, format_table, write_json

CASES = (
    (1, 1, 76),
    (1, 4, 76),
    (1, 1, 2048),
    (1, 1, 32768),
    (1, 4, 32768),
    (1, 1, 131072),
    (8, 1, 100),
    (8, 4, 100),
    (8, 1, 2048),
    (32, 1, 100),
    (64, 1, 100),
    (64, 4, 100),
    (64, 6, 100),
    (64, 4, 2048),
    (128, 1, 100),
    (128, 1, 2048),
    (2, 300, 50),
)
"""Requests, new tokens of each, and tokens in the cache before, of the longest; the last case goes to MAX's kernel."""

MOST_ROWS = 128
"""New tokens times query heads of a key head, up to which our kernel runs."""

FEWEST_REQUESTS = 17
"""Fewer requests with a single new token that sees all keys go to MAX's kernel, on 132 multiprocessors."""

LOOKAHEAD = 16
"""Columns that MAX's kernel may read behind a row of the page table."""

LARGEST_ERROR = 1e-2
"""Of `|y - reference| / |reference|`: weights and results are rounded to bfloat16."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    path: str
    kind: str
    requests: int
    tokens: int
    cached: int
    floor_us: float
    us: float
    spread_us: tuple[float, float]
    error: float
    same_bits: bool

    def correct(self) -> bool:
        return self.error < LARGEST_ERROR and self.same_bits

    def cells(self) -> list[str]:
        sizes = (self.path, self.kind, str(self.requests), str(self.tokens), str(self.cached))
        times = (f"{self.floor_us:.1f}", f"{self.us:.1f}", f"{self.us / self.floor_us:.2f}")
        return [*sizes, *times, f"{self.error:.1e}", "yes" if self.same_bits else "NO"]


HEADER = ["path", "layer", "requests", "tokens", "cached", "floor, us", "us", "x floor", "error", "same bits"]


@dataclasses.dataclass
class Report:
    """Everything that a run found."""

    benchmark: str
    gpu: str
    copy_tb_s: float
    environment: Environment
    rows: list[Row]


class Batch:
    """Requests of several lengths over a cache whose free places hold NaN."""

    def __init__(self, machine: Machine, kind: str, requests: int, tokens: int, cached: int) -> None:
        self.heads, self.window, rotated = SHAPES[kind]
        # The longest as asked, the others up to a tenth shorter; a last request with fewer tokens where there are two.
        self.lengths = [cached - int(cached * 0.1 * i / requests) for i in range(requests)]
        self.tokens = [tokens] * requests
        if requests > 1:
            self.tokens[-1] = max(tokens - 1, 1)
        self.offsets = np.cumsum([0, *self.tokens]).astype(np.uint32)
        pages_each = -(-(cached + tokens) // PAGE_SIZE)
        pages = requests * pages_each
        self.lookup = np.zeros((requests, pages_each + LOOKAHEAD), np.uint32)
        self.lookup[:, :pages_each] = np.random.permutation(pages).reshape(requests, pages_each)
        shape = (pages, 2, LAUNCHES, PAGE_SIZE, KEY_HEADS, HEAD_DIM)
        self.cache = torch.full(shape, torch.nan, device=DEVICE, dtype=torch.bfloat16)
        places = torch.from_numpy(self.lookup.astype(np.int64)).to(DEVICE)
        for r, end in enumerate(self.lengths):
            for index in range(-(-end // PAGE_SIZE)):
                rows = min(end - index * PAGE_SIZE, PAGE_SIZE)
                self.cache[places[r, index], :, :, :rows] = torch.randn(
                    (2, LAUNCHES, rows, KEY_HEADS, HEAD_DIM), device=DEVICE, dtype=torch.bfloat16
                )
        total = int(self.offsets[-1])
        widths = (self.heads * HEAD_DIM, KEY_HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM, self.heads)
        self.launches = [[randn(total, width) for width in widths] for _ in range(LAUNCHES)]
        self.weights = [randn(HEAD_DIM) for _ in range(2)]
        angles = torch.rand(total, rotated // 2, device=DEVICE) * 6
        self.table = torch.cat([angles.cos(), angles.sin()], 1)
        longest = max(length + count for length, count in zip(self.lengths, self.tokens, strict=True))
        partitions = mha_decode_num_partitions(requests, longest, KEY_HEADS, machine.device)
        host = [np.array([tokens], np.uint32), np.array([max(self.lengths)], np.uint32)]
        dispatch = np.array([requests, tokens, partitions, longest], np.int64)
        self.operands = [
            Buffer.from_numpy(self.offsets).to(machine.device),
            Buffer.from_dlpack(self.cache),
            Buffer.from_numpy(np.array([-1], np.int64)),
            Buffer.from_numpy(np.array(self.lengths, np.uint32)).to(machine.device),
            Buffer.from_numpy(self.lookup).to(machine.device),
            *(Buffer.from_numpy(value) for value in (*host, dispatch)),
            *(Buffer.from_dlpack(values) for values in (*self.weights, self.table)),
            *(Buffer.from_dlpack(values) for launch in self.launches for values in launch),
        ]

    def read_bytes(self) -> int:
        """Keys and values that a launch must read, queries and results."""
        seen = 0
        for length, count in zip(self.lengths, self.tokens, strict=True):
            keys = length + count
            seen += keys if self.window is None else min(keys, self.window + count - 1)
        return 2 * (2 * seen * KEY_HEADS * HEAD_DIM + 2 * self.launches[0][0].numel())

    def error(self, outputs: list[torch.Tensor]) -> float:
        """Of the first, middle and last request in the first and the last launch."""
        worst = 0.0
        for launch in (0, LAUNCHES - 1):
            torch.cuda.empty_cache()
            for r in sorted({0, len(self.lengths) // 2, len(self.lengths) - 1}):
                begin, end = int(self.offsets[r]), int(self.offsets[r + 1])
                expected = self.reference(launch, r, begin, end)
                found = outputs[launch][begin:end].float()
                worst = max(worst, float((found - expected).norm() / expected.norm()))
                if not bool(torch.isfinite(found).all()):
                    return float("inf")
        return worst

    def reference(self, launch: int, request: int, begin: int, end: int) -> torch.Tensor:
        """Gated attention in float32 `[tokens, heads * head_dim]`."""
        length = self.lengths[request]
        count = length + end - begin
        pages = torch.from_numpy(self.lookup[request].astype(np.int64)).to(DEVICE)
        held = self.cache[pages, :, launch].transpose(1, 2).reshape(-1, 2, KEY_HEADS, HEAD_DIM)[:length].float()
        q, k, v, gate = self.launches[launch]
        q, k = (
            normed_and_rotated(x[begin:end].view(end - begin, -1, HEAD_DIM), weight, self.table[begin:end])
            for x, weight in zip((q, k), self.weights, strict=True)
        )
        rows = torch.cat([held, torch.stack([k, v[begin:end].float().view_as(k)], 1)])
        at = torch.arange(count, device=DEVICE)
        own = torch.arange(length, count, device=DEVICE)[:, None]
        hidden = at > own
        if self.window is not None:
            hidden |= at <= own - self.window
        group = self.heads // KEY_HEADS
        results = []
        for head in range(KEY_HEADS):
            of_head = q[:, head * group : (head + 1) * group]
            scores = torch.einsum("thd,kd->htk", of_head, rows[:, 0, head]) * HEAD_DIM**-0.5
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
            results.append(torch.einsum("htk,kd->thd", weights, rows[:, 1, head]))
        return (torch.cat(results, 1) * gate[begin:end].float().sigmoid()[..., None]).flatten(1)


def run(folder: Path, file: Path) -> None:
    """Checks and measures the graphs in `DIR`, prints a table and writes the report.

    Raises:
        SystemExit: If a result was wrong.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = Machine()
    rate, _ = machine.memory_rates()
    environment = Environment.of_this_process(usable_cores())
    rows = []
    for kind in SHAPES:
        files = {path: folder / f"{path}-{kind}.mef" for path in PATHS}
        models = {path: machine.load(mef) for path, mef in files.items() if mef.exists()}
        for requests, tokens, cached in CASES:
            batch = Batch(machine, kind, requests, tokens, cached)
            poison = [
                Buffer.from_dlpack(torch.full_like(values, torch.nan)) for launch in batch.launches for values in launch
            ]
            for path, model in models.items():
                left = tokens == 1 and requests < FEWEST_REQUESTS and batch.window is None
                if path == "max" or left or tokens * batch.heads // KEY_HEADS > MOST_ROWS:
                    batch.cache.nan_to_num_(0)  # MAX's kernel multiplies what lies behind the last key by zero
                machine.execute(model, [*batch.operands[:FIXED], *poison])
                outputs = machine.execute(model, batch.operands)
                error = batch.error(outputs)
                again = machine.execute(model, batch.operands)
                same = all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
                del outputs, again
                times = [1e6 * seconds for seconds in machine.seconds(model, batch.operands)]
                floor = 1e6 * batch.read_bytes() / (1e12 * rate)
                spread = (min(times), max(times))
                us = statistics.median(times)
                rows.append(Row(path, kind, requests, tokens, cached, floor, us, spread, error, same))
                print(*rows[-1].cells(), flush=True)
            del batch, poison
    print(format_table(HEADER, [row.cells() for row in rows]))
    write_json(file, Report("attention", torch.cuda.get_device_name(), rate, environment, rows))
    wrong = [row for row in rows if not row.correct()]
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong results, the first: {wrong[0]}")
