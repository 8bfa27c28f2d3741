"""The graph that draws greedily."""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Type
from max.nn.layer import Module
from max.pipelines.lib.graph_specs import GraphSpec

from . import kernels

DRAW = "greedy_draw"
"""Role of the graph; a model on a CPU has none, but for cycles."""


class GreedyDraw(Module):
    """The token of the greatest logit.

    Args:
        vocab_size: Of the logits.
        device: Where they are.
    """

    def __init__(self, vocab_size: int, device: DeviceRef) -> None:
        super().__init__()
        self.vocab_size, self.device = vocab_size, device

    def __call__(self, logits: TensorValue, known_tokens: TensorValue) -> tuple[TensorValue]:
        """Draws a token a row.

        Args:
            logits: `[rows, vocab_size]` float32.
            known_tokens: `[1]` int64: tokens from this id on have no words and are not drawn.

        Returns:
            `[rows]` int64.
        """
        return (kernels.greedy(logits, known_tokens),)

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        return (
            TensorType(DType.float32, ["logit_rows", self.vocab_size], self.device),
            TensorType(DType.int64, [1], self.device),
        )


def draw_spec(vocab_size: int, device: DeviceRef) -> GraphSpec:
    """How `GreedyDraw` is compiled."""
    draw = GreedyDraw(vocab_size, device)
    return GraphSpec(draw, "step3p5_mtp_draw", draw.input_types(), weights={})
