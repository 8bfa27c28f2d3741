"""The head, and an embedding whose rows, one a token of the vocabulary, may lie on several devices."""

from __future__ import annotations

from max.dtype import DType
from max.graph import TensorValue, ops
from typing_extensions import override

from ..kernels import linear
from ..parallel_plan import Placement
from .linear import Linear


class Head(Linear):
    """The layer that gives the logits: in float32, in which they are summed, whatever `x` and the weights are."""

    @override
    def __call__(self, x: TensorValue) -> TensorValue:
        """`[tokens, hidden_size]` to `[tokens, vocab_size]` float32."""
        return linear(x, self.weight, dtype=DType.float32)


def embed_part(tokens: TensorValue, table: TensorValue, placement: Placement, device: int) -> TensorValue:
    """A device's share of the embeddings: its own rows of the table, and zeros for tokens of other devices.

    Args:
        tokens: `[tokens]` int64.
        table: The device's part of the embedding, `[vocab_size / parts, hidden_size]`.
        placement: How the embedding is cut.
        device: Index of the device.

    Returns:
        `[tokens, hidden_size]`; the sum over the devices has every token's embedding.
    """
    if not placement.is_cut:
        return ops.gather(table, tokens, axis=0)
    size = int(table.shape[0])
    local = tokens - ops.constant(device * size, DType.int64, device=tokens.device)
    zero = ops.constant(0, DType.int64, device=tokens.device)
    here = ops.logical_and(local >= zero, local < ops.constant(size, DType.int64, device=tokens.device))
    rows = ops.gather(table, ops.where(here, local, zero), axis=0)
    return ops.where(ops.unsqueeze(here, -1), rows, ops.constant(0, rows.dtype, device=rows.device))
