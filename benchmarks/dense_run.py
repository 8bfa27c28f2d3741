"""The measuring half of `dense.py`: correctness against PyTorch, then times, on one NVIDIA GPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bandwidth import usable_cores
from dense_graphs import LAUNCHES, SHAPES
from max.driver import Buffer
from max.engine import Model
from moe_run import DEVICE, Machine, relative_error
from report import Environment, format_table, write_json

ROUNDS = 4
"""Executions of a graph that are timed, one behind the other."""

COPY_RATE, PRODUCT_RATE = 3.02e12, 750e12
"""Bytes and floating-point operations a second that the floor assumes: an H100's measured copy, and cuBLAS there."""

LARGEST_ERROR = 3e-3
"""Of `|y - reference| / |reference|`: the results are rounded to bfloat16."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    variant: str
    op: str
    in_features: int
    out_features: int
    tokens: int
    floor_us: float
    busy_us: float
    wall_us: float
    times_floor: float
    tflop_s: float
    error: float
    all_close: bool
    same_bits: bool
    nan_contained: bool

    def correct(self) -> bool:
        return self.error < LARGEST_ERROR and self.all_close and self.same_bits and self.nan_contained

    def cells(self) -> list[str]:
        checks = (self.all_close, self.same_bits, self.nan_contained)
        return [
            self.variant,
            self.op,
            f"{self.in_features}->{self.out_features}",
            str(self.tokens),
            f"{self.floor_us:.1f}",
            f"{self.busy_us:.1f}",
            f"{self.wall_us:.1f}",
            f"{self.times_floor:.2f}",
            f"{self.tflop_s:.0f}",
            f"{self.error:.1e}",
            *("yes" if check else "NO" for check in checks),
        ]


HEADER = ["variant", "op", "shape", "tokens", "floor, us", "busy, us", "wall, us", "x floor", "TFLOP/s", "error"]
HEADER += ["close", "same bits", "NaN kept"]


@dataclasses.dataclass
class Report:
    """Everything that a run found."""

    benchmark: str
    gpu: str
    environment: Environment
    rows: list[Row]


def reference(op: str, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a launch in float32."""
    products = [x.float() @ w.float().T for w in weights]
    return [torch.nn.functional.silu(products[0]) * products[1]] if op == "swiglu" else products


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether every single element is right up to its rounding and the sums' order."""
    return torch.allclose(found.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.std()))


def busy_seconds(machine: Machine, model: Model, operands: Sequence[Buffer]) -> tuple[float, float]:
    """Seconds of one execution: in which the device ran any kernel, and by the host's clock."""
    machine.execute(model, operands)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for _ in range(ROUNDS):
            outputs = model.execute(*operands)
        machine.device.synchronize()
        wall = time.perf_counter() - start
        del outputs
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not ranges:
        raise RuntimeError("the profiler saw no kernel: CUPTI is missing or in use by another program")
    busy, until = 0.0, 0.0
    for begin, end in ranges:
        busy += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return 1e-6 * busy / ROUNDS, wall / ROUNDS


def measure(machine: Machine, model: Model, variant: str, op: str, weights: list[torch.Tensor], tokens: int) -> Row:
    """Checks one graph at one size, then times it."""
    each = len(weights) // LAUNCHES
    rows, in_features = sum(len(w) for w in weights[:each]), weights[0].shape[1]
    x = torch.randn(tokens, in_features, device=DEVICE).to(torch.bfloat16)
    fixed = [Buffer.from_dlpack(w) for w in weights]

    def execute(values: torch.Tensor) -> list[torch.Tensor]:
        return machine.execute(model, [Buffer.from_dlpack(values), *fixed])

    poisoned = execute(torch.full_like(x, torch.nan))
    of_launch = len(poisoned) // LAUNCHES
    del poisoned
    outputs = execute(x)
    first = [output.clone() for output in outputs[:of_launch]]
    errors, all_close = [], True
    for i in (0, LAUNCHES - 1):
        found = outputs[i * of_launch : (i + 1) * of_launch]
        expected = reference(op, x, weights[i * each : (i + 1) * each])
        for of_kernel, of_torch in zip(found, expected, strict=True):
            errors.append(relative_error(of_kernel, of_torch))
            all_close &= close(of_kernel, of_torch)
        del found, expected, of_kernel, of_torch
    del outputs
    same_bits = all(map(torch.equal, execute(x), first))
    broken, row = x.clone(), tokens // 2
    broken[row, 7] = torch.nan
    contained = True
    for with_nan, clean in zip(execute(broken), first, strict=False):
        contained &= bool(with_nan[row].isnan().all())
        with_nan[row] = clean[row]
        contained &= torch.equal(with_nan, clean)
    del with_nan
    busy, wall = (seconds / LAUNCHES for seconds in busy_seconds(machine, model, [Buffer.from_dlpack(x), *fixed]))
    out_features = sum(result.shape[1] for result in first)
    operations = 2 * tokens * in_features * rows
    moved = 2 * (in_features * rows + tokens * (in_features + out_features))
    floor = max(moved / COPY_RATE, operations / PRODUCT_RATE)
    return Row(
        variant=variant,
        op=op,
        in_features=in_features,
        out_features=out_features,
        tokens=tokens,
        floor_us=1e6 * floor,
        busy_us=1e6 * busy,
        wall_us=1e6 * wall,
        times_floor=busy / floor,
        tflop_s=1e-12 * operations / busy,
        error=max(errors),
        all_close=all_close,
        same_bits=same_bits,
        nan_contained=contained,
    )


def run(folder: Path, variants: Sequence[str] | None, tokens: Sequence[int], json: Path) -> None:
    """Checks and measures the graphs in `DIR`, prints rows as they come and a table, and writes `json`.

    Raises:
        SystemExit: If a result was wrong; after everything has been printed and written.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = Machine()
    environment = Environment.of_this_process(usable_cores())
    report = Report("dense", torch.cuda.get_device_name(), environment, [])
    names = variants if variants is not None else sorted(path.name for path in folder.iterdir() if path.is_dir())
    for variant in names:
        for op, shapes in SHAPES.items():
            file = folder / variant / f"{op}.mef"
            if not file.exists():
                continue
            model = machine.load(file)
            for in_features, rows in shapes:
                weights = [
                    torch.randn(out_features, in_features, device=DEVICE, dtype=torch.bfloat16).mul_(in_features**-0.5)
                    for _ in range(LAUNCHES)
                    for out_features in rows
                ]
                for size in tokens:
                    report.rows.append(measure(machine, model, variant, op, weights, size))
                    print(*report.rows[-1].cells(), flush=True)
    print(format_table(HEADER, [row.cells() for row in report.rows]))
    write_json(json, report)
    wrong = [row for row in report.rows if not row.correct()]
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong results, the first: {wrong[0]}")
