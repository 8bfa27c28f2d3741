"""The pipelines that run the model: MAX's own; under the overlap scheduler with less to do between two steps."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from max.driver import Buffer
from max.dtype import DType
from max.pipelines.context import TextContext
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.pipeline_variants.overlap_text_generation import OverlapTextGenerationPipeline
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.sampling import FusedSamplingProcessor
from max.pipelines.sampling.sampling_logits_processor import _to_pinned_host_buffer
from max.pipelines.sampling.seeds import request_row_seed
from typing_extensions import override


class OverlapPipeline(OverlapTextGenerationPipeline[TextContext]):
    """MAX's overlap pipeline, whose sampling parameters stay on the device while the batch stays the same.

    MAX sends five parameters of every request anew at each step: that takes the host a tenth of a step at batch 1, and
    puts five copies before the device's next step. Of the five only the seed changes, and only a draw looks at it.
    """

    _sampler_of: tuple[list[TextContext], FusedSamplingProcessor, Buffer] | None = None
    """The requests of the step before, what sampled for them, and the tokens that it started from: none."""

    @override
    def _create_sampling_processor(
        self, flat_batch: list[TextContext]
    ) -> tuple[FusedSamplingProcessor, npt.NDArray[Any] | None]:
        """What samples for the batch, and the bitmask of what its grammars allow."""
        if self._sampler_of is not None and _same(self._sampler_of[0], flat_batch):
            _, processor, no_tokens = self._sampler_of
            processor.generated_tokens = no_tokens
            if not all(map(_takes_the_best, flat_batch)):
                seeds = [request_row_seed(context) for context in flat_batch]
                host = _to_pinned_host_buffer(seeds, device=self._sampler_device, dtype=DType.uint64)
                processor.sampler_inputs.seed = host.to(self._sampler_device)
            return processor, None
        processor, bitmask = super()._create_sampling_processor(flat_batch)
        keeps = bitmask is None and processor.penalty_inputs is None and not processor.min_tokens_masks
        self._sampler_of = (list(flat_batch), processor, processor.generated_tokens) if keeps else None
        return processor, bitmask


def _same(before: list[TextContext], now: list[TextContext]) -> bool:
    """Whether the batch has the same requests in the same order, none of them bound by a grammar since."""
    return len(before) == len(now) and all(
        a is b and b.json_schema is None and b.grammar is None for a, b in zip(before, now, strict=True)
    )


def _takes_the_best(context: TextContext) -> bool:
    return context.sampling_params.top_k == 1


class Step3p5Pipeline:
    """The architecture's pipeline: which one it is depends on the scheduler, as it does in MAX."""

    def __new__(cls, pipeline_config: PipelineConfig, *args: Any, **kwargs: Any) -> Any:
        """An `OverlapPipeline` under the overlap scheduler, else MAX's plain one."""
        overlaps = pipeline_config.runtime.enable_overlap_scheduler
        chosen = OverlapPipeline if overlaps else TextGenerationPipeline[TextContext]
        return chosen(pipeline_config, *args, **kwargs)
