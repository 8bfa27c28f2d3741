"""Speculation in steps: verify the drafts of the step before, emit what the target drew, draft anew."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from max.driver import CPU, Buffer
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.context.exceptions import InputError
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.modeling.types import PipelineOutputsDict, RequestID, TextGenerationInputs
from max.pipelines.sampling import FusedSamplingProcessor, apply_logits_processors
from max.pipelines.speculative.utils import _SpeculativeDecodingMetrics
from max.support.algorithm import flatten2d
from typing_extensions import override

from ..steady_batch import is_constrained, takes_the_best
from .acceptance import can_verify_drafts, commit, contexts_ahead, num_accepted
from .drafted import Drafts
from .model import SpeculativeStep3p5Model
from .policy import AdaptiveDepth, DraftPlan, FixedDepth
from .rows import draft_rows
from .state import RequestState
from .statistics import Statistics, step_metrics

MANY_UNREAD = 32
"""Positions that a request has left unread, on average, from which on the time of a pass is that of reading them."""


def outputs_of(contexts: Iterable[TextContext]) -> PipelineOutputsDict[TextGenerationOutput]:
    """What each request has generated since it was last asked, if anything."""
    return {c.request_id: output for c in contexts if (output := c.to_generation_output()).tokens}


def is_running(context: TextContext) -> bool:
    """Whether a request is past its prompt."""
    return bool(context.tokens.active_length == 1 and context.tokens.generated_length)


class SteppingPipeline(TextGenerationPipeline[TextContext]):
    """Text generation that emits one to `depth + 1` tokens of a request a step, each drawn by the target.

    The host stands between verifying and drafting, so that batches may be of any kind.
    """

    _pipeline_model: SpeculativeStep3p5Model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: dict[RequestID, RequestState] = {}
        self._step_metrics: _SpeculativeDecodingMetrics | None = None
        self._counts_of_step: list[tuple[int, int]] = []
        self._stepped = time.perf_counter()
        """When the last step ended."""
        self._planned = DraftPlan(0, 0)
        self._planned_ahead: DraftPlan | None = None
        """What the policy has said already for the drafts of this step."""
        self.statistics = Statistics(self._pipeline_model.depth)
        speculative = self._pipeline_config.speculative
        schedule = speculative.verify_width_schedule if speculative is not None else None
        model = self._pipeline_model
        self.policy: FixedDepth | AdaptiveDepth = (
            AdaptiveDepth(model.depth, model.cycle_bytes) if schedule is None else FixedDepth(schedule, model.depth)
        )

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
        self._counts_of_step = []
        if not any(inputs.batches):
            return {}
        pure, before = all(map(is_running, flatten2d(inputs.batches))), self._stepped
        outputs = self._execute_batches(inputs.batches)
        self._stepped = time.perf_counter()
        if pure:
            self.policy.record_step(sum(len(output.tokens) for output in outputs.values()), self._stepped - before)
        return outputs

    def _execute_batches(self, batches: Sequence[list[TextContext]]) -> PipelineOutputsDict[TextGenerationOutput]:
        """A step of requests of which none is done."""
        batch = flatten2d(batches)
        started = time.perf_counter()
        states = [self._state(context) for context in batch]
        drafts = [self._drafts_to_verify(context, state) for context, state in zip(batch, states, strict=True)]
        pure = all(map(is_running, batch))
        for context, own in zip(batch, drafts, strict=True):
            # The cache makes room for as many; their tokens may be on the device alone.
            context.spec_decoding_state.draft_tokens_to_verify = [0] * len(own)
        kv_cache_inputs = self._kv_manager.runtime_inputs(batches)
        logits, hidden = self._pipeline_model.verify(batch, drafts, kv_cache_inputs)
        drawn = self._sample(logits, batch, drafts)
        first_rows = self._commit(batch, drafts, drawn)
        verified = time.perf_counter()
        if pure and self._planned.num_requests == len(batch) and not self._foretells_nothing(batch):
            self.policy.record_verification(len(batch), self._planned.depth, verified - started)
        if self._pipeline_model.heads is not None:
            self._pipeline_model.heads.see(np.array(drawn))
        self._draft(batch, states, first_rows, hidden, kv_cache_inputs, pure)
        self.statistics.record_times(verified - started, time.perf_counter() - verified)
        outputs = outputs_of(batch)
        for context in batch:
            self._kv_manager.step(context)
        return outputs

    def _foretells_nothing(self, batch: Sequence[TextContext]) -> bool:
        """Whether a step's time says nothing about those to come: it leads to another kind, or had one beside it."""
        del batch
        return False

    def _state(self, context: TextContext) -> RequestState:
        """The request's state; a new one where it is new, or was preempted."""
        state = self._states.get(context.request_id)
        if state is None or state.position != context.tokens.processed_length:
            model = self._pipeline_model
            state = RequestState(context.tokens.processed_length, model.depth, model.rows_to_go_on)
            self._states[context.request_id] = state
            if model.heads is not None:
                model.heads.see(context.tokens.all)
        return state

    def _unread(self, batch: Sequence[TextContext], depth: int) -> int:
        """Positions of the requests that the first `depth` depths have not read, but for those of a cycle."""
        states = [(context, self._states.get(context.request_id)) for context in batch]
        unread = [c.tokens.processed_length - s.first_unread(depth) for c, s in states if s is not None]
        return sum(positions for positions in unread if positions > MANY_UNREAD)

    def _drafts_to_verify(self, context: TextContext, state: RequestState) -> Sequence[int]:
        """The request's drafts, as far as there is room for them before its maximum length."""
        if state.drafts is None or context.tokens.active_length != 1 or not can_verify_drafts(context):
            return []
        return state.drafts.first(context.max_length - len(context.tokens) - 1)

    def _sample(self, logits: Buffer, batch: Sequence[TextContext], drafts: Sequence[Sequence[int]]) -> list[int]:
        """One token for each row of `logits`; where all are to be the greatest, a kernel of ours finds them."""
        draw = self._pipeline_model.draw
        if draw is not None and all(takes_the_best(context) and not is_constrained(context) for context in batch):
            (drawn,) = draw.execute(logits, self._known_tokens)
            tokens = drawn.to(CPU()).to_numpy()
        else:
            tokens = self._drawn(logits, batch, drafts).get_new_tokens_numpy()
        own: list[int] = tokens.ravel().tolist()
        return own

    @cached_property
    def _known_tokens(self) -> Buffer:
        return self._pipeline_model.known_tokens(self.vocab_size)

    def _drawn(
        self, logits: Buffer, batch: Sequence[TextContext], drafts: Sequence[Sequence[int]]
    ) -> FusedSamplingProcessor:
        """Draws for each row of `logits` as the plain pipeline would at that position."""
        ahead = flatten2d([contexts_ahead(context, own) for context, own in zip(batch, drafts, strict=True)])
        bitmask = self.initialize_bitmask(ahead)
        if bitmask is not None:
            for row, context in enumerate(ahead):
                self.update_for_structured_output(context, bitmask, row)
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
        return processor

    def _commit(self, batch: Sequence[TextContext], drafts: Sequence[Sequence[int]], drawn: list[int]) -> list[int]:
        """Appends to each request what was drawn for it up to the first rejected draft, and counts acceptance.

        Returns:
            Each request's first row in the step's ragged batch.
        """
        first_rows, counts = [], []
        next_draw = next_row = 0
        for context, own in zip(batch, drafts, strict=True):
            first_rows.append(next_row)
            next_row += context.tokens.active_length + len(own)
            tokens = drawn[next_draw : next_draw + len(own) + 1]
            next_draw += len(tokens)
            if context.tokens.actively_chunked:
                context.advance_token_buffer(tokens[0])  # moves on to the next chunk; nothing is appended
            else:
                accepted = num_accepted(own, tokens)
                commit(context, tokens[: accepted + 1])
                if len(own):
                    counts.append((len(own), accepted))
            context.spec_decoding_state.draft_tokens_to_verify = []
        self._count_acceptance(counts)
        return first_rows

    def _count_acceptance(self, requests: Sequence[tuple[int, int]]) -> None:
        """Counts the drafts of some of a step's requests, each as (drafts verified, drafts accepted)."""
        self._counts_of_step += requests
        self._step_metrics = step_metrics(self._counts_of_step)
        self.statistics.record_drafts(requests)
        self.policy.record_acceptance(requests)

    def _draft(
        self,
        batch: Sequence[TextContext],
        states: Sequence[RequestState],
        first_rows: Sequence[int],
        hidden: Buffer,
        kv_cache_inputs: Any,
        pure: bool,
    ) -> None:
        """Lets the depths read what the step verified and draft, for the requests that the policy names."""
        model = self._pipeline_model
        running = [index for index, context in enumerate(batch) if not context.is_done]
        for context in batch:
            if context.is_done:
                self._states.pop(context.request_id, None)
        if not running:
            return
        plan = self._planned_ahead or self.policy.plan(
            len(running), pure, partial(self._unread, [batch[i] for i in running])
        )
        self._planned = plan
        started = time.perf_counter()
        if plan.depth:
            # Those with the least to catch up with: the same ones again in the next step.
            behind = {index: states[index].position - states[index].first_unread(plan.depth) for index in running}
            drafting = sorted(sorted(running, key=behind.__getitem__)[: plan.num_requests])
        else:
            drafting = []
        chosen = set(drafting)
        advances = [
            states[index].next_advance(batch[index].tokens, first_rows[index], plan.depth if index in chosen else 0)
            for index in running
        ]
        rows = draft_rows(advances, int(hidden.shape[0]), plan.depth)
        pieces = [p for i, a in zip(running, advances, strict=True) for p in states[i].rows_from(a.start - a.kept)]
        drafted, kept_rows = model.draft(rows, hidden, pieces, kv_cache_inputs, drafting)
        places = {index: place for place, index in enumerate(drafting)}
        for index, advance, own_rows in zip(running, advances, kept_rows, strict=True):
            depth = plan.depth if advance.drafts else 0
            # Amid a prompt the next tokens are known: what was drafted stands for none.
            amid_prompt = advance.end + 1 < len(advance.tokens)
            drafts = None if amid_prompt or not depth else Drafts(drafted, places[index], depth)
            states[index].advance(advance.end, depth, own_rows, drafts)
        caught_up = sum(advance.kept for advance in advances)
        if caught_up > MANY_UNREAD * len(drafting):
            self.policy.record_catching_up(caught_up, time.perf_counter() - started)
        measures = pure and plan.num_requests == len(running) and not self._foretells_nothing(batch)
        if plan.depth and measures and rows.max_prompt_length <= 2 * model.depth:
            self.policy.record_drafting(len(running), plan.depth, time.perf_counter() - started)
