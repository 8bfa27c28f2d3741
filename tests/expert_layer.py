"""The routed experts in numpy float64, and their operands for the ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer
from max.dtype import DType

Array = npt.NDArray[Any]
Operands = list[Array | Buffer]
LIMIT = 0.4
"""The clamp of the limited results."""


def as_bfloat16(values: Array) -> Buffer:
    """A bfloat16 buffer of float32 values that bfloat16 can hold."""
    halves = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return Buffer.from_numpy(halves).view(DType.bfloat16, values.shape)


def rounded(values: Array, dtype: DType) -> Array:
    """float32 `values`, cut to what `dtype` can hold."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if dtype == DType.bfloat16 else values


def grouped(ids: Array, num_experts: int) -> tuple[Array, Array]:
    """Assignments by expert, in order, and where each expert starts."""
    flat = ids.reshape(-1)
    rows = np.concatenate([np.flatnonzero(flat == e) for e in range(num_experts)])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=num_experts))])
    return rows.astype(np.int32), offsets.astype(np.int32)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


class Layer:
    """Random operands of the experts, their results in float64, and the same operands for the ops.

    Args:
        rng: Draws them.
        dtype: The type of the weights.
        sizes: Tokens, experts, experts a token, hidden size, intermediate size.
        choose_from: How many of the experts the tokens choose from.
        activations: The type of `x`.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        dtype: DType,
        sizes: tuple[int, int, int, int, int],
        choose_from: int,
        activations: DType = DType.float32,
    ) -> None:
        tokens, num_experts, top_k, hidden, width = sizes
        self.dtype, self.activations = dtype, activations
        self.x = rounded(rng.standard_normal((tokens, hidden), np.float32), activations)
        self.gate, self.up = (self._weights(rng, (num_experts, width, hidden)) for _ in range(2))
        self.down = self._weights(rng, (num_experts, hidden, width))
        pool = rng.permutation(num_experts)[:choose_from]
        self.ids = np.array([rng.permutation(pool)[:top_k] for _ in range(tokens)], np.int32).reshape(tokens, top_k)
        self.weights = rng.uniform(0.1, 1.0, (tokens, top_k)).astype(np.float32)
        self.rows, self.offsets = grouped(self.ids, num_experts)

    def _weights(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return rounded(rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1])), self.dtype)

    def operands(self) -> Operands:
        typed = [(self.x, self.activations), *((v, self.dtype) for v in (self.gate, self.up, self.down))]
        stored = [as_bfloat16(v) if dtype == DType.bfloat16 else v for v, dtype in typed]
        return [*stored, self.rows, self.offsets, self.weights]

    def keep(self, tokens: int) -> None:
        """Drops all but the first tokens."""
        self.x, self.ids, self.weights = self.x[:tokens], self.ids[:tokens], self.weights[:tokens]
        self.rows, self.offsets = grouped(self.ids, len(self.gate))

    def expected(self) -> list[Array]:
        x, gate, up, down, weights = (
            v.astype(np.float64) for v in (self.x, self.gate, self.up, self.down, self.weights)
        )
        top_k = self.ids.shape[1]
        act, limited = (np.empty((self.rows.size, gate.shape[1])) for _ in range(2))
        y = np.zeros_like(x)
        for slot, a in enumerate(self.rows):
            token, k = divmod(int(a), top_k)
            e = self.ids[token, k]
            g, u = gate[e] @ x[token], up[e] @ x[token]
            act[slot] = silu(g) * u
            limited[slot] = np.minimum(silu(g), LIMIT) * np.clip(u, -LIMIT, LIMIT)
            y[token] += weights[token, k] * (down[e] @ act[slot])
        product = x @ gate[0].T
        swiglu = np.minimum(silu(product), LIMIT) * np.clip(x @ up[0].T, -LIMIT, LIMIT)
        return [act, limited, y, product, swiglu]
