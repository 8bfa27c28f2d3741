"""The speculative loop: verify the drafts of the step before, emit what the target drew, draft anew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.context.exceptions import InputError
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.modeling.types import PipelineOutputsDict, RequestID, TextGenerationInputs
from max.pipelines.sampling import FusedSamplingProcessor, apply_logits_processors
from max.pipelines.speculative.utils import _SpeculativeDecodingMetrics
from max.support.algorithm import flatten2d
from typing_extensions import override

from .acceptance import can_verify_drafts, commit, contexts_ahead, num_accepted
from .model import SpeculativeStep3p5Model
from .rows import Advance, draft_rows
from .statistics import Statistics


@dataclass(frozen=True)
class DraftState:
    """What a request carries from one step to the next.

    `position` is its processed length then: a request that was preempted since starts over. `kept` are the hidden
    states `[kept, hidden_size]` of the last positions before it.
    """

    position: int
    kept: npt.NDArray[Any]
    drafts: tuple[int, ...]


class SpeculativePipeline(TextGenerationPipeline[TextContext]):
    """Text generation that emits one to `depth + 1` tokens of a request a step, each drawn by the target.

    MAX's scheduler drives it as it drives the plain pipeline, in whatever batches of prompts, chunks of prompts and
    running requests it makes.
    """

    _pipeline_model: SpeculativeStep3p5Model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: dict[RequestID, DraftState] = {}
        self._step_metrics: _SpeculativeDecodingMetrics | None = None
        self.statistics = Statistics(self._pipeline_model.depth)

    def batch_spec_decode_metrics(self) -> _SpeculativeDecodingMetrics | None:
        """Acceptance of the last step, for the scheduler's log and `/metrics`; `None` without speculation."""
        return self._step_metrics

    @override
    def release(self, request_id: RequestID) -> None:
        """Forgets a request, whether it is finished or was hung up."""
        self._states.pop(request_id, None)
        super().release(request_id)

    @override
    def _execute(self, inputs: TextGenerationInputs[TextContext]) -> PipelineOutputsDict[TextGenerationOutput]:
        if not self._pipeline_model.depth:
            return super()._execute(inputs)
        if inputs.enable_log_probs:
            raise InputError(
                "logprobs: found a request for them, expected none with speculation. Run without --speculative-method."
            )
        batch = flatten2d(inputs.batches)
        if not batch:
            return {}
        started = time.perf_counter()
        states = [self._state(context) for context in batch]
        drafts = [self._drafts_to_verify(context, state) for context, state in zip(batch, states, strict=True)]
        ahead = flatten2d([contexts_ahead(context, d) for context, d in zip(batch, drafts, strict=True)])
        bitmask = self.initialize_bitmask(ahead)
        if bitmask is not None:
            for row, context in enumerate(ahead):
                self.update_for_structured_output(context, bitmask, row)
        for context, own in zip(batch, drafts, strict=True):
            context.spec_decoding_state.draft_tokens_to_verify = own
        kv_cache_inputs = self._kv_manager.runtime_inputs(inputs.batches)
        logits, hidden = self._pipeline_model.verify(batch, drafts, kv_cache_inputs)
        drawn = self._sample(logits, ahead, bitmask)
        advances = self._commit(batch, drafts, states, drawn)
        verified = time.perf_counter()
        outputs = {c.request_id: output for c in batch if (output := c.to_generation_output()).tokens}
        if not all(context.is_done for context in batch):
            self._draft(batch, advances, states, hidden, kv_cache_inputs)
        self.statistics.record_times(verified - started, time.perf_counter() - verified)
        for context in batch:
            self._kv_manager.step(context)
        return outputs

    def _state(self, context: TextContext) -> DraftState | None:
        state = self._states.get(context.request_id)
        return state if state is not None and state.position == context.tokens.processed_length else None

    def _drafts_to_verify(self, context: TextContext, state: DraftState | None) -> list[int]:
        """The request's drafts, as far as there is room for them before its maximum length."""
        if state is None or context.tokens.active_length != 1 or not can_verify_drafts(context):
            return []
        return list(state.drafts[: max(0, context.max_length - len(context.tokens) - 1)])

    def _sample(self, logits: Buffer, ahead: list[TextContext], bitmask: npt.NDArray[np.int32] | None) -> list[int]:
        """One token for each row of `logits`, drawn as the plain pipeline would draw it at that position."""
        sampler = self._sampler_without_bitmask if bitmask is None else self._sampler_with_bitmask
        assert sampler is not None
        processor = FusedSamplingProcessor(
            sampler=sampler,
            pipeline_config=self._pipeline_config,
            context_batch=ahead,
            device=self._sampler_device,
            bitmask=bitmask,
            vocab_size=self.vocab_size,
        )
        apply_logits_processors(
            context_batch=ahead, batch_logits=logits, batch_logit_offsets=None, batch_processors=[processor]
        )
        tokens: list[int] = processor.get_new_tokens_numpy().ravel().tolist()
        return tokens

    def _commit(
        self,
        batch: Sequence[TextContext],
        drafts: Sequence[list[int]],
        states: Sequence[DraftState | None],
        drawn: list[int],
    ) -> list[Advance]:
        """Appends to each request what was drawn for it up to the first rejected draft, and counts acceptance."""
        advances = []
        accepted_counts = []
        next_draw = first_row = 0
        for context, own, state in zip(batch, drafts, states, strict=True):
            start, num_rows = context.tokens.processed_length, context.tokens.active_length + len(own)
            tokens = drawn[next_draw : next_draw + len(own) + 1]
            next_draw += len(tokens)
            if context.tokens.actively_chunked:
                context.update(tokens[0])  # moves on to the next chunk; nothing is appended
            else:
                accepted = num_accepted(own, tokens)
                commit(context, tokens[: accepted + 1])
                if own:
                    accepted_counts.append((len(own), accepted))
            advances.append(
                Advance(
                    tokens=context.tokens.all,
                    start=start,
                    end=context.tokens.processed_length,
                    first_row=first_row,
                    kept=0 if state is None else len(state.kept),
                )
            )
            first_row += num_rows
            context.spec_decoding_state.draft_tokens_to_verify = []
        self._step_metrics = self.statistics.record_step(accepted_counts)
        return advances

    def _draft(
        self,
        batch: Sequence[TextContext],
        advances: list[Advance],
        states: Sequence[DraftState | None],
        hidden: Buffer,
        kv_cache_inputs: Any,
    ) -> None:
        model = self._pipeline_model
        plan = draft_rows(advances, int(hidden.shape[0]), model.depth, keep=model.depth - 1)
        empty = np.empty((0, int(hidden.shape[1])), dtype=hidden.dtype.to_numpy())
        kept = np.concatenate([empty, *(state.kept for state in states if state is not None)])
        drafted, keep = model.draft(plan, hidden, kept, kv_cache_inputs)
        splits = np.split(keep, np.cumsum(plan.keep_counts)[:-1])
        for context, row, rows in zip(batch, drafted, splits, strict=True):
            if context.is_done:
                self._states.pop(context.request_id, None)
            else:
                self._states[context.request_id] = DraftState(
                    context.tokens.processed_length, np.array(rows), tuple(row.tolist())
                )
