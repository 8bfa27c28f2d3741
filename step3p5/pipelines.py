"""The pipelines that run the model: MAX's own, with less to do between two steps of the same requests.

At batch 1 a step of a GPU's takes less time than MAX's Python needs to prepare the next one. Most of that prepares
anew what has not changed where the same requests go on decoding.
"""

from __future__ import annotations

from typing import Any, cast

import numpy.typing as npt
from max.driver import Buffer, is_virtual_device_mode
from max.dtype import DType
from max.engine import Model
from max.pipelines.context import TextContext
from max.pipelines.context.logit_processors_type import BatchProcessorInputs
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.interfaces import ModelOutputs
from max.pipelines.lib.pipeline_variants.overlap_text_generation import OverlapTextGenerationPipeline
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.modeling.types import BatchType, TextGenerationInputs
from max.pipelines.sampling import FusedSamplingProcessor
from max.pipelines.sampling.sampling_logits_processor import _to_pinned_host_buffer
from max.pipelines.sampling.seeds import request_row_seed
from typing_extensions import override

from .cache_inputs import CacheInputs, shorten
from .model import Step3p5Model
from .steady_batch import SteadyPipeline, in_same_order, is_constrained, same_requests, takes_the_best
from .steady_replay import SteadyReplays


def goes_on(before: Any, now: Any) -> bool:
    """Whether a step decodes for the requests that the step before decoded for, in the same order."""
    return (
        now.batch_type is BatchType.TG
        and before.batch_type is BatchType.TG
        and in_same_order(before.flat_batch, now.flat_batch)
    )


class FutureTokens:
    """MAX's processor of the tokens that the step before is still drawing, with a short way for an unchanged batch."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def realize_future_tokens(
        self, prev_batch: Any, inputs: Any, model_inputs: Any, draft_tokens_np: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any] | None:
        """Puts the drawn tokens where the step reads its own; the result is MAX's, of drafts."""
        if draft_tokens_np is None and goes_on(prev_batch.inputs, inputs):
            model_inputs.tokens = prev_batch.generated_tokens_device
            return None
        return self._own.realize_future_tokens(
            prev_batch=prev_batch, inputs=inputs, model_inputs=model_inputs, draft_tokens_np=draft_tokens_np
        )


class GreedyDraws:
    """What draws for a step of requests that all take the greatest logit: one launch, where MAX's sampler has several.

    Has what MAX's pipeline uses of its `FusedSamplingProcessor`.

    Args:
        draw: `GreedyDraw`, compiled.
        known_tokens: How many tokens can be drawn, the first ones, `[1]` int64 on the device.
    """

    generated_tokens: Buffer
    """The drawn tokens `[batch, 1]` int64."""

    def __init__(self, draw: Model, known_tokens: Buffer) -> None:
        self._draw, self._known_tokens = draw, known_tokens

    def logits_for_sampling(
        self, *, logits: Buffer, next_token_logits: Buffer | None, logit_offsets: Buffer | None
    ) -> tuple[Buffer, Buffer | None]:
        """The last tokens' logits; no row needs to be told from others."""
        del logit_offsets
        return logits if next_token_logits is None else next_token_logits, None

    def __call__(self, inputs: BatchProcessorInputs) -> None:
        """Draws from logits `[batch, vocab_size]` float32."""
        (tokens,) = self._draw.execute(inputs.logits, self._known_tokens)
        self.generated_tokens = tokens.view(tokens.dtype, (*tokens.shape, 1))


class OverlapPipeline(OverlapTextGenerationPipeline[TextContext]):
    """MAX's overlap pipeline, with less to do for a step and for a draw.

    A captured graph is replayed for the same requests with no more than what differs (`SteadyReplays`). Where all
    requests take the greatest logit, a kernel of ours finds it. Else MAX sends five parameters of every request anew at
    each step; while the batch stays the same, so do these, but for the seed.
    """

    _pipeline_model: Step3p5Model

    _greedy: GreedyDraws | None = None

    _replays: SteadyReplays | None = None

    _sampler_of: tuple[list[TextContext], FusedSamplingProcessor, Buffer] | None = None
    """The requests of the step before, what sampled for them, and the tokens that it started from: none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shorten(self._kv_manager)
        own: Any = self._realize_future_token_processor
        self._realize_future_token_processor: Any = None if own is None else FutureTokens(own)
        model, sampling = self._pipeline_model, self._pipeline_config.sampling
        elsewhere = is_virtual_device_mode() or sampling.enable_variable_logits or self._sampler_device.is_host
        if model.draw is not None and not elsewhere:
            self._greedy = GreedyDraws(model.draw, model.known_tokens(self.vocab_size))

    @override
    def warmup_graph_capture(self) -> None:
        """Captures the graphs of decoding."""
        super().warmup_graph_capture()
        runner, caches = self._graph_capture_runner, self._kv_manager.runtime_inputs
        looks_at_replays = self._pipeline_config.debug_verify_replay or runner._host_input_guard_mode is not None
        if isinstance(caches, CacheInputs) and not looks_at_replays:
            self._replays = runner.replay = SteadyReplays(runner, caches)

    @override
    def _run_forward(
        self, inputs: TextGenerationInputs[TextContext], *drafting: Any, **drafting_by_name: Any
    ) -> ModelOutputs:
        replays, before = self._replays, self._prev_batch
        if replays is not None:
            if before is not None and not before._is_processed and goes_on(before.inputs, inputs):
                outputs = replays.go_on(inputs.batches, before.generated_tokens_device)
                if outputs is not None:
                    return outputs
            replays.forget()
        return super()._run_forward(inputs, *drafting, **drafting_by_name)

    @override
    def _create_sampling_processor(
        self, flat_batch: list[TextContext]
    ) -> tuple[FusedSamplingProcessor, npt.NDArray[Any] | None]:
        """What samples for the batch, and the bitmask of what its grammars allow."""
        if self._greedy is not None and all(takes_the_best(one) and not is_constrained(one) for one in flat_batch):
            return cast(Any, self._greedy), None
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
