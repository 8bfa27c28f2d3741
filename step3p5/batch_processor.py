"""Batches requests into the graph's ragged inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from max.driver import Buffer
from max.nn.kv_cache import KVCacheInputs
from max.pipelines.architectures.llama3.batch_processor import Llama3EpBatchProcessorBase
from max.pipelines.context import TextContext
from max.pipelines.lib.interfaces.arch_config import ArchConfig
from max.pipelines.lib.interfaces.batch_processor import RAGGED_INPUT_TOKENS, BatchProcessorRuntime
from typing_extensions import override

if TYPE_CHECKING:
    from .model import Step3p5Inputs


class Step3p5BatchProcessor(Llama3EpBatchProcessorBase["Step3p5Inputs"]):
    """Ragged batching with what the several-device modes need besides: host offsets, splits and EP buffers."""

    def __init__(self, config: ArchConfig, runtime: BatchProcessorRuntime) -> None:
        super().__init__(config, runtime)
        self._decode_offsets: dict[int, tuple[Buffer, Buffer]] = {}

    @override
    def _stage_ragged_token_inputs(self, context_batch: Sequence[TextContext]) -> tuple[Buffer, Buffer, Buffer]:
        """As MAX's; the row offsets of a batch that decodes are those of any batch of its size, and made once."""
        batch_size = len(context_batch)
        if any(context.tokens.active_length != 1 for context in context_batch):
            return super()._stage_ragged_token_inputs(context_batch)
        with self._stager.stage() as staging:
            host_tokens, (tokens,) = staging.get(RAGGED_INPUT_TOKENS, (batch_size,))
            host_tokens.to_numpy()[:] = [context.tokens.active[0] for context in context_batch]
        if batch_size not in self._decode_offsets:
            offsets = Buffer.from_numpy(np.arange(batch_size + 1, dtype=np.uint32))
            self._decode_offsets[batch_size] = (offsets.to(tokens.device), offsets)
        return tokens, *self._decode_offsets[batch_size]

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
    ) -> Step3p5Inputs:
        """Stages the active tokens of every request, replica by replica.

        Args:
            replica_batches: One batch per data-parallel replica.
            kv_cache_inputs: The step's cache inputs.
            return_n_logits: Trailing positions whose logits a variable-logits graph returns.

        Raises:
            ValueError: If the number of batches is not `data_parallel_degree`.
        """
        from .model import Step3p5Inputs

        tokens, row_offsets, n_logits, splits, ep_inputs, host_row_offsets = self._prepare_ep_moe_token_inputs(
            replica_batches, return_n_logits
        )
        return Step3p5Inputs(
            tokens=tokens,
            input_row_offsets=row_offsets,
            return_n_logits=n_logits,
            signal_buffers=list(self.runtime.signal_buffers),
            kv_cache_inputs=kv_cache_inputs,
            data_parallel_splits=splits,
            host_input_row_offsets=host_row_offsets,
            ep_inputs=ep_inputs,
        )
