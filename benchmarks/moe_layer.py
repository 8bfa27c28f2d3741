"""The whole MoE layer on one NVIDIA GPU: router, assignment, routed and shared experts, their sum; see `moe.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from max.driver import Buffer
from max.engine import Model
from moe_graphs import EXPERTS, HIDDEN, LAUNCHES, SCALE, TOP_K, WIDTH
from moe_report import LayerRow

DEVICE = "cuda"
MATRIX_BYTES = 2 * HIDDEN * WIDTH


class Layer:
    """The layer's weights beside those of the routed experts, and its result in float32."""

    def __init__(self) -> None:
        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=DEVICE).mul_(columns**-0.5).to(torch.bfloat16)

        self.router, self.bias = matrix(EXPERTS, HIDDEN), 0.1 * torch.randn(EXPERTS, device=DEVICE)
        self.gate, self.up, self.down = matrix(WIDTH, HIDDEN), matrix(WIDTH, HIDDEN), matrix(HIDDEN, WIDTH)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token's experts, in descending order of their score, and their weights."""
        scores = (x.float() @ self.router.float().T).sigmoid()
        ids = (scores + self.bias).topk(TOP_K, 1).indices
        weights = scores.gather(1, ids)
        return ids, weights * SCALE / weights.sum(1, keepdim=True)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The shared expert's result."""
        values = x.float()
        act = torch.nn.functional.silu(values @ self.gate.float().T) * (values @ self.up.float().T)
        return act @ self.down.float().T

    def buffers(self, experts: Sequence[Buffer]) -> list[Buffer]:
        """The graph's operands up to the tokens; `experts` are the routed ones' gate, up and down."""
        own = [Buffer.from_dlpack(tensor) for tensor in (self.router, self.bias, self.gate, self.up, self.down)]
        return [*own[:2], *experts, *own[2:]]


def measure_layer(
    execute: Callable[[Model, Sequence[Buffer]], list[torch.Tensor]],
    seconds: Callable[[Model, Sequence[Buffer]], list[float]],
    routed: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    experts: Sequence[Buffer],
    model: Model,
    tokens: int,
    rate: float,
) -> LayerRow:
    """Checks the layer at one size, then times it, every launch with tokens of its own.

    Args:
        execute: Runs a graph.
        seconds: Times a launch of it.
        routed: The routed experts' result in float32, of tokens, their experts and weights.
        experts: The routed experts' matrices.
        model: The graph.
        tokens: Tokens of a launch.
        rate: The floor's TB/s.
    """
    layer = Layer()
    xs = [torch.randn(tokens, HIDDEN, device=DEVICE).to(torch.bfloat16) for _ in range(LAUNCHES)]
    fixed = layer.buffers(experts)

    def operands(first: torch.Tensor) -> list[Buffer]:
        return [*fixed, *(Buffer.from_dlpack(x) for x in (first, *xs[1:]))]

    poisoned = [*fixed, *(Buffer.from_dlpack(torch.full_like(x, torch.nan)) for x in xs)]
    execute(model, poisoned)
    outputs = execute(model, operands(xs[0]))
    first = outputs[0].clone()
    errors = []
    for i in (0, LAUNCHES - 1):
        expected = routed(xs[i], *layer.route(xs[i])) + layer.shared(xs[i])
        errors.append(float((outputs[i].float() - expected).norm() / expected.norm()))
    del outputs
    same_bits = torch.equal(first, execute(model, operands(xs[0]))[0])
    broken = xs[0].clone()
    broken[0, 7] = torch.nan
    with_nan = execute(model, operands(broken))[0]
    hit = statistics.mean(len(layer.route(x)[0].unique()) for x in xs)
    floor = ((3 * hit + 3) * MATRIX_BYTES + 2 * EXPERTS * HIDDEN) / (rate * 1e12)
    time = statistics.median(seconds(model, operands(xs[0])))
    return LayerRow(
        tokens=tokens,
        experts_hit=hit,
        floor_ms=1e3 * floor,
        ms=1e3 * time,
        times_floor=time / floor,
        error=max(errors),
        same_bits=same_bits,
        nan_contained=bool(with_nan[0].isnan().all()) and torch.equal(with_nan[1:], first[1:]),
    )
