"""The graphs around the drafts: the verifying target, the choice of its tokens, and that of the rows drafts read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Type, ops
from max.nn.layer import Module
from max.pipelines.lib.interfaces.batch_processor import ragged_kv_symbolic_input_tree
from typing_extensions import override

from ..step3p5 import Step3p5


class VerifyingStep3p5(Step3p5):
    """The target: logits of any rows, and the hidden states of all that the drafts start from."""

    @override
    def outputs(
        self, h: TensorValue, input_row_offsets: TensorValue, return_n_logits: TensorValue
    ) -> tuple[TensorValue, ...]:
        """Logits `[len(return_n_logits), vocab_size]` float32 of the rows `return_n_logits`, and `h` itself.

        `return_n_logits` is `[logit_rows]` int64 here: rows of the ragged batch, in any number a request.
        """
        del input_row_offsets
        rows = ops.gather(h, return_n_logits, axis=0)
        return ops.cast(self.lm_head(self.norm(rows)), DType.float32), h

    @override
    def input_tree(self) -> Mapping[str, object]:
        """Names the graph's inputs; the leaves, in order, are the graph's inputs."""
        tree = ragged_kv_symbolic_input_tree(
            kv_params=self.kv_params,
            device_refs=list(self.config.devices),
            include_signal_buffers=False,
            batch_order=("tokens", "row_offsets"),
        )
        logit_rows = TensorType(DType.int64, ["logit_rows"], self.config.devices[0])
        return OrderedDict(
            batch=tree["batch"], logit_rows=logit_rows, kv=tree["kv"]
        )  # a plain dict is flattened sorted


class RowSelection(Module):
    """Gathers hidden states of this step and of the steps before into the rows that the drafts read.

    Args:
        hidden_size: Width of a row.
        dtype: Type of the hidden states.
        device: Where they are.
    """

    def __init__(self, hidden_size: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.hidden_size, self.dtype, self.device = hidden_size, dtype, device

    def __call__(
        self, hidden: TensorValue, kept: TensorValue, rows: TensorValue, keep: TensorValue
    ) -> tuple[TensorValue, TensorValue]:
        """Selects rows of `hidden` followed by `kept`.

        Args:
            hidden: The target's hidden states of this step, `[total_seq_len, hidden_size]`.
            kept: Rows kept from the steps before, `[kept, hidden_size]`.
            rows: `[rows]` int64, what the drafts read.
            keep: `[keep]` int64, what the next step will need again.

        Returns:
            `[rows, hidden_size]` and `[keep, hidden_size]`.
        """
        all_rows = ops.concat([hidden, kept], axis=0)
        return ops.gather(all_rows, rows, axis=0), ops.gather(all_rows, keep, axis=0)

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        return (
            TensorType(self.dtype, ["total_seq_len", self.hidden_size], self.device),
            TensorType(self.dtype, ["kept", self.hidden_size], self.device),
            TensorType(DType.int64, ["rows"], self.device),
            TensorType(DType.int64, ["keep"], self.device),
        )


class TokenSelection(Module):
    """Puts the tokens that the target verifies together from those that the host knows and the drafts.

    Args:
        depth: The most drafts of a request.
        device: Where they are.
    """

    def __init__(self, depth: int, device: DeviceRef) -> None:
        super().__init__()
        self.depth, self.device = depth, device

    def __call__(self, known: TensorValue, places: TensorValue, *drafted: TensorValue) -> TensorValue:
        """Gathers `[total_seq_len]` int64.

        Args:
            known: Tokens that the host knows, `[known]` int64.
            places: `[total_seq_len]` int64, where each token stands in `known` followed by `drafted`.
            drafted: What each depth drafted, `[drafts]` int64.
        """
        return ops.gather(ops.concat([known, *drafted]), places, axis=0)

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        drafted = (f"drafts_{index}" for index in range(self.depth))
        return tuple(TensorType(DType.int64, [name], self.device) for name in ("known", "total_seq_len", *drafted))
