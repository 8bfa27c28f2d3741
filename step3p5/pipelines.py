"""The pipelines that run the model: MAX's own, with less to do between two steps of the same requests.

At batch 1 a step of a GPU's takes less time than MAX's Python needs to prepare the next one. Most of that prepares
anew what has not changed where the same requests go on decoding.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from max.driver import Buffer
from max.dtype import DType
from max.pipelines.context import TextContext
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.pipeline_variants.overlap_text_generation import OverlapTextGenerationPipeline
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.modeling.types import BatchType
from max.pipelines.sampling import FusedSamplingProcessor
from max.pipelines.sampling.sampling_logits_processor import _to_pinned_host_buffer
from max.pipelines.sampling.seeds import request_row_seed
from typing_extensions import override

from .steady_batch import SteadyPipeline, in_same_order, same_requests


class FutureTokens:
    """MAX's processor of the tokens that the step before is still drawing, with a short way for an unchanged batch."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def realize_future_tokens(
        self, prev_batch: Any, inputs: Any, model_inputs: Any, draft_tokens_np: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any] | None:
        """Puts the drawn tokens where the step reads its own; the result is MAX's, of drafts."""
        if (
            draft_tokens_np is None
            and inputs.batch_type is BatchType.TG
            and prev_batch.inputs.batch_type is BatchType.TG
            and in_same_order(prev_batch.inputs.flat_batch, inputs.flat_batch)
        ):
            model_inputs.tokens = prev_batch.generated_tokens_device
            return None
        return self._own.realize_future_tokens(
            prev_batch=prev_batch, inputs=inputs, model_inputs=model_inputs, draft_tokens_np=draft_tokens_np
        )


class OverlapPipeline(OverlapTextGenerationPipeline[TextContext]):
    """MAX's overlap pipeline; while the batch stays the same, so do its sampling parameters on the device.

    MAX sends five parameters of every request anew at each step. Of these only the seed changes, and only a draw looks
    at it.
    """

    _sampler_of: tuple[list[TextContext], FusedSamplingProcessor, Buffer] | None = None
    """The requests of the step before, what sampled for them, and the tokens that it started from: none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self._realize_future_token_processor
        self._realize_future_token_processor: Any = None if own is None else FutureTokens(own)

    @override
    def _create_sampling_processor(
        self, flat_batch: list[TextContext]
    ) -> tuple[FusedSamplingProcessor, npt.NDArray[Any] | None]:
        """What samples for the batch, and the bitmask of what its grammars allow."""
        if self._sampler_of is not None and same_requests(self._sampler_of[0], flat_batch):
            _, processor, no_tokens = self._sampler_of
            processor.generated_tokens = no_tokens
            if any(context.sampling_params.top_k != 1 for context in flat_batch):
                seeds = [request_row_seed(context) for context in flat_batch]
                host = _to_pinned_host_buffer(seeds, device=self._sampler_device, dtype=DType.uint64)
                processor.sampler_inputs.seed = host.to(self._sampler_device)
            return processor, None
        processor, bitmask = super()._create_sampling_processor(flat_batch)
        keeps = bitmask is None and processor.penalty_inputs is None and not processor.min_tokens_masks
        self._sampler_of = (list(flat_batch), processor, processor.generated_tokens) if keeps else None
        return processor, bitmask


class Step3p5Pipeline:
    """The architecture's pipeline: which one it is depends on the scheduler, as it does in MAX."""

    def __new__(cls, pipeline_config: PipelineConfig, *args: Any, **kwargs: Any) -> Any:
        """An `OverlapPipeline` under the overlap scheduler, else a `SteadyPipeline` on a CPU, else MAX's plain one."""
        chosen: type[TextGenerationPipeline[TextContext]] = TextGenerationPipeline
        if pipeline_config.runtime.enable_overlap_scheduler:
            chosen = OverlapPipeline
        elif pipeline_config.model.default_device_spec.device_type == "cpu":
            chosen = SteadyPipeline
        return chosen(pipeline_config, *args, **kwargs)
