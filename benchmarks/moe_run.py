"""The measuring half of `moe.py`: correctness against PyTorch, then times, on one NVIDIA GPU."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bandwidth import usable_cores
from busy import Timeline, device_kernels
from gpu_clock import ClockWatch
from max.driver import Accelerator, Buffer
from max.engine import InferenceSession, Model
from max.engine.api import read
from moe_graphs import EXPERTS, HIDDEN, LAUNCHES, SCALE, TOP_K, WIDTH
from moe_layer import measure_layer
from moe_report import KernelRow, LayerRow, Report, Row, SmallRow
from report import Environment, write_json
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda"
ROUNDS = 6
"""Measurements of a graph, after one that does not count."""

ROUND_SECONDS, MOST_REPLAYS = 0.01, 20
"""A measurement is of as many replays behind one another as take so long, but of no more than so many."""

VLLM_MS = dict(
    zip(
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192),
        (0.113, 0.196, 0.367, 0.684, 1.126, 1.747, 2.545, 3.007, 3.121, 3.182, 3.464, 5.648),
        strict=True,
    )
)
"""vLLM 0.23's fused MoE kernel at these sizes on one H100 with random routing, as a CUDA graph: measured before,
not by this program."""

LAYER_TOKENS = 512
"""Most tokens for which the whole layer is measured."""

LARGEST_ERROR = 1e-2
"""Of `|y - reference| / |reference|`: the activations are bfloat16, and so may be the products that are summed."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """A launch's choice of experts, as the graph takes it."""

    ids: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor) -> Routing:
        flat = ids.reshape(-1)
        counts = torch.bincount(flat, minlength=EXPERTS)
        offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32, device=DEVICE)
        offsets[1:] = counts.cumsum(0)
        rows = flat.argsort(stable=True).to(torch.int32)
        weights = torch.rand(ids.shape, device=DEVICE) + 0.1
        return cls(ids.to(torch.int32), weights * SCALE / weights.sum(1, keepdim=True), rows, offsets)

    def experts_hit(self) -> int:
        return int((self.offsets[1:] != self.offsets[:-1]).sum())

    def buffers(self) -> list[Buffer]:
        return [Buffer.from_dlpack(tensor) for tensor in (self.rows, self.offsets, self.weights)]


def random_ids(tokens: int) -> torch.Tensor:
    """Every token's experts uniformly random."""
    return torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOP_K, 1).indices


def eight_ids(tokens: int) -> torch.Tensor:
    """All tokens on the same eight experts."""
    chosen = torch.randperm(EXPERTS, device=DEVICE)[:TOP_K]
    order = torch.rand(tokens, TOP_K, device=DEVICE).argsort(1)
    return chosen[order]


def zipf_ids(tokens: int) -> torch.Tensor:
    """Distinct experts drawn with probabilities 1, 1/2, 1/3, …"""
    popularity = 1.0 / torch.arange(1, EXPERTS + 1, device=DEVICE)
    popularity = popularity[torch.randperm(EXPERTS, device=DEVICE)]
    exponential = -torch.rand(tokens, EXPERTS, device=DEVICE).log()
    return (popularity / exponential).topk(TOP_K, 1).indices


ROUTINGS: dict[str, Callable[[int], torch.Tensor]] = {"random": random_ids, "eight": eight_ids, "zipf": zipf_ids}


class Experts:
    """The layer's weights, and its result in float32."""

    def __init__(self) -> None:
        def matrices(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(EXPERTS, rows, columns, device=DEVICE, dtype=torch.bfloat16)
            return values.mul_(columns**-0.5)

        self.gate, self.up = (matrices(WIDTH, HIDDEN) for _ in range(2))
        self.down = matrices(HIDDEN, WIDTH)

    def buffers(self) -> list[Buffer]:
        return [Buffer.from_dlpack(tensor) for tensor in (self.gate, self.up, self.down)]

    def routed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The result for given experts and weights of every token."""
        return self.reference(x, dataclasses.replace(Routing.of(ids), weights=weights))

    def reference(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        y = torch.zeros(x.shape, device=DEVICE)
        offsets = routing.offsets.tolist()
        weights = routing.weights.reshape(-1)
        for e in range(EXPERTS):
            assignments = routing.rows[offsets[e] : offsets[e + 1]].long()
            if len(assignments) == 0:
                continue
            tokens = assignments // TOP_K
            values = x[tokens].float()
            act = torch.nn.functional.silu(values @ self.gate[e].float().T) * (values @ self.up[e].float().T)
            y[tokens] += weights[assignments, None] * (act @ self.down[e].float().T)
        return y


class Machine:
    """The GPU with its session, and times on it."""

    def __init__(self) -> None:
        self.device = Accelerator()
        self.session = InferenceSession(devices=[self.device])

    def load(self, file: Path) -> Model:
        return self.session.init(read(file))

    def execute(self, model: Model, operands: Sequence[Buffer]) -> list[torch.Tensor]:
        torch.cuda.synchronize()
        outputs = model.execute(*operands)
        self.device.synchronize()
        return [torch.from_dlpack(output) for output in outputs]

    def seconds(self, model: Model, operands: Sequence[Buffer]) -> list[float]:
        """Seconds a launch, of every measurement: replays of the captured graph, which wait for no host."""
        key = 1
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the capture takes memory of its own
        outputs = model.capture(key, *operands)
        self.device.synchronize()

        def replay(times: int) -> float:
            start = time.perf_counter()
            for _ in range(times):
                model.replay(key, *operands)
            self.device.synchronize()
            return (time.perf_counter() - start) / times

        replay(1)
        times = min(MOST_REPLAYS, max(1, int(ROUND_SECONDS / replay(1))))
        seconds = [replay(times) / LAUNCHES for _ in range(ROUNDS + 1)]
        del outputs
        model.release_captured_graph(key)
        return seconds[1:]

    @staticmethod
    def memory_rates() -> tuple[float, float]:
        """TB/s of a copy (read plus written) and of a sum (read) over 4 GiB."""
        source = torch.randint(0, 100, (1 << 32,), device=DEVICE, dtype=torch.uint8).view(torch.float32)
        target = torch.empty_like(source)
        rates = []
        for call, traffic in ((lambda: target.copy_(source), 2), (lambda: source.amax(), 1)):
            times = []
            for _ in range(12):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            rates.append(traffic * source.nbytes / statistics.median(times[2:]) * 1e-9)
        return rates[0], rates[1]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def measure_experts(
    machine: Machine,
    experts: Experts,
    model: Model,
    variant: str,
    routing: str,
    tokens: int,
    rate: float,
    watch: ClockWatch,
) -> Row:
    """Checks one graph at one size, then times it."""
    x = torch.randn(tokens, HIDDEN, device=DEVICE).to(torch.bfloat16)
    routings = [Routing.of(ROUTINGS[routing](tokens)) for _ in range(LAUNCHES)]
    fixed = experts.buffers()
    varied = [buffer for each in routings for buffer in each.buffers()]

    def execute(values: torch.Tensor) -> list[torch.Tensor]:
        return machine.execute(model, [Buffer.from_dlpack(values), *fixed, *varied])

    poisoned = execute(torch.full_like(x, torch.nan))
    del poisoned
    outputs = execute(x)
    first = [y.clone() for y in outputs[:2]]
    errors = [relative_error(outputs[i], experts.reference(x, routings[i])) for i in (0, LAUNCHES - 1)]
    del outputs
    again = execute(x)
    same_bits = all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
    del again
    broken = x.clone()
    broken[0, 7] = torch.nan
    with_nan = execute(broken)[0]
    contained = bool(with_nan[0].isnan().all()) and torch.equal(with_nan[1:], first[0][1:])
    del with_nan
    begin = time.perf_counter()
    times = machine.seconds(model, [Buffer.from_dlpack(x), *fixed, *varied])
    clock = watch.since(begin)
    median = statistics.median(times)
    hit = statistics.mean(each.experts_hit() for each in routings)
    floor = hit * 3 * HIDDEN * WIDTH * 2 / (rate * 1e12)
    return Row(
        variant=variant,
        routing=routing,
        tokens=tokens,
        experts_hit=hit,
        floor_ms=1e3 * floor,
        ms=1e3 * median,
        spread_ms=(1e3 * min(times), 1e3 * max(times)),
        times_floor=median / floor,
        vllm_ms=VLLM_MS.get(tokens) if routing == "random" else None,
        error=max(errors),
        same_bits=same_bits,
        nan_contained=contained,
        clock=clock,
    )


def measure_kernels(machine: Machine, experts: Experts, model: Model, variant: str, tokens: int) -> list[KernelRow]:
    """What `torch.profiler` sees of one graph with random routing."""
    x = torch.randn(tokens, HIDDEN, device=DEVICE).to(torch.bfloat16)
    routings = [Routing.of(random_ids(tokens)) for _ in range(LAUNCHES)]
    varied = [buffer for each in routings for buffer in each.buffers()]
    operands = [Buffer.from_dlpack(x), *experts.buffers(), *varied]
    machine.execute(model, operands)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        machine.execute(model, operands)
    kernels = sorted(device_kernels(profiler), key=lambda kernel: kernel.start)
    order = list(dict.fromkeys(kernel.name for kernel in kernels))
    sums = sorted(Timeline.of(kernels, LAUNCHES).kernels, key=lambda kernel: order.index(kernel.name))
    return [KernelRow(variant, tokens, kernel.name, kernel.runs, 1e3 * kernel.milliseconds) for kernel in sums]


def measure_router(machine: Machine, model: Model, tokens: int) -> SmallRow:
    """Product and assignment: the choice against float64 but for near ties, its order against a stable sort."""
    bias = torch.randn(EXPERTS, device=DEVICE) * 0.1
    launches = [
        (torch.randn(rows, HIDDEN, device=DEVICE) * size).to(torch.bfloat16)
        for _ in range(LAUNCHES)
        for rows, size in ((EXPERTS, HIDDEN**-0.5), (tokens, 1.0))
    ]
    operands = [Buffer.from_dlpack(tensor) for tensor in (bias, *launches)]
    outputs = machine.execute(model, operands)
    correct = True
    for i in range(LAUNCHES):
        ids, weights, rows, offsets = outputs[4 * i : 4 * i + 4]
        router, x = (operand.double() for operand in launches[2 * i : 2 * i + 2])
        scores = (x @ router.T).sigmoid()
        chosen = scores.gather(1, ids.long())
        keys, best = chosen + bias[ids.long()], (scores + bias).topk(TOP_K, 1).values
        order = Routing.of(ids.long())
        correct &= torch.allclose(keys, best, rtol=0, atol=1e-4)
        correct &= torch.allclose(weights.double(), chosen * SCALE / chosen.sum(1, keepdim=True), rtol=1e-3)
        correct &= torch.equal(rows, order.rows) and torch.equal(offsets, order.offsets)
    return SmallRow("router", tokens, 1e6 * statistics.median(machine.seconds(model, operands)), correct)


def measure_route(machine: Machine, model: Model, tokens: int) -> SmallRow:
    """The router's choice against float64."""
    logits = [torch.randn(tokens, EXPERTS, device=DEVICE) for _ in range(LAUNCHES)]
    bias = torch.randn(EXPERTS, device=DEVICE) * 0.1
    operands = [Buffer.from_dlpack(tensor) for tensor in (bias, *logits)]
    ids, weights = machine.execute(model, operands)[:2]
    scores = logits[0].double().sigmoid().float()
    # A stable sort keeps the lower of two equal experts first.
    expected = (scores + bias).sort(dim=1, descending=True, stable=True).indices[:, :TOP_K]
    chosen = scores.gather(1, expected)
    chosen = chosen / (chosen.sum(1, keepdim=True) + 1e-20) * SCALE
    correct = torch.equal(ids.long(), expected) and torch.allclose(weights, chosen, rtol=1e-5, atol=0)
    return SmallRow("route", tokens, 1e6 * statistics.median(machine.seconds(model, operands)), correct)


def measure_group(machine: Machine, model: Model, tokens: int) -> SmallRow:
    """The grouping against a stable sort, half of the launches with all tokens on eight experts."""
    routings = [Routing.of((random_ids if i % 2 else eight_ids)(tokens)) for i in range(LAUNCHES)]
    operands = [Buffer.from_dlpack(each.ids) for each in routings]
    outputs = machine.execute(model, operands)
    correct = all(
        torch.equal(outputs[2 * i], each.rows) and torch.equal(outputs[2 * i + 1], each.offsets)
        for i, each in enumerate(routings)
    )
    return SmallRow("group", tokens, 1e6 * statistics.median(machine.seconds(model, operands)), correct)


def run(folder: Path, variants: Sequence[str] | None, tokens: Sequence[int], json: Path) -> None:
    """Checks and measures the graphs in `DIR`, prints tables and writes `json`.

    Raises:
        SystemExit: If a result was wrong; after everything has been printed and written.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = Machine()
    copy_rate, read_rate = machine.memory_rates()
    environment = Environment.of_this_process(usable_cores())
    report = Report(torch.cuda.get_device_name(), copy_rate, read_rate, environment, [], [], [], [])
    experts = Experts()
    names = variants if variants is not None else sorted(path.name for path in folder.iterdir() if path.is_dir())
    for variant in names:
        file = folder / variant / "experts.mef"
        if file.exists():
            model = machine.load(file)
            with ClockWatch() as watch:
                for routing in ROUTINGS:
                    for size in tokens:
                        row = measure_experts(machine, experts, model, variant, routing, size, copy_rate, watch)
                        report.experts.append(row)
                        gc.collect()
            for size in tokens:
                report.kernels += measure_kernels(machine, experts, model, variant, size)
            del model
        file = folder / variant / "layer.mef"
        if file.exists():
            model = machine.load(file)
            report.layer += [
                measure_layer(
                    machine.execute, machine.seconds, experts.routed, experts.buffers(), model, size, copy_rate
                )
                for size in tokens
                if size <= LAYER_TOKENS
            ]
        small: tuple[tuple[str, Callable[..., SmallRow]], ...] = (
            ("router", measure_router),
            ("route", measure_route),
            ("group", measure_group),
        )
        for op, measure in small:
            file = folder / variant / f"{op}.mef"
            if file.exists():
                model = machine.load(file)
                report.small += [measure(machine, model, size) for size in tokens]
    print(report.text())
    write_json(json, report)
    wrong: list[Any] = [row for row in report.small if not row.correct]
    checked: list[Row | LayerRow] = [*report.experts, *report.layer]
    wrong += [row for row in checked if not (row.error < LARGEST_ERROR and row.same_bits and row.nan_contained)]
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong results, the first: {wrong[0]}")
