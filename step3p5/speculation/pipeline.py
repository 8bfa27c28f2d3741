"""The speculative loop: verify the drafts of the step before, emit what the target drew, draft anew."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from max.driver import Buffer, DeviceEvent, is_virtual_device_mode
from max.nn.kv_cache import BatchCharacteristics
from max.nn.kv_cache.cache_params import spec_decode_cache_slack
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.context.exceptions import InputError
from max.pipelines.kv_cache import InsufficientBlocksError
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.modeling.types import PipelineOutputsDict, RequestID, TextGenerationInputs
from max.pipelines.sampling import FusedSamplingProcessor, apply_logits_processors
from max.pipelines.speculative.utils import _SpeculativeDecodingMetrics
from max.support.algorithm import flatten2d
from typing_extensions import override

from ..steady_batch import takes_the_best
from .acceptance import can_verify_drafts, commit, contexts_ahead, num_accepted
from .drafted import Drafts
from .model import SpeculativeStep3p5Model
from .padding import Padding, padded_size
from .policy import CYCLE_TRIALS, AdaptiveDepth, DraftPlan, FixedDepth
from .rows import Advance, Int64, draft_rows
from .state import RequestState
from .statistics import Statistics
from .steady_cycle import Sampler, Start, SteadyCycles
from .steady_run import Launched, SteadyRun


def _outputs(contexts: Iterable[TextContext]) -> PipelineOutputsDict[TextGenerationOutput]:
    """What each request has generated since it was last asked, if anything."""
    return {c.request_id: output for c in contexts if (output := c.to_generation_output()).tokens}


class SpeculativePipeline(TextGenerationPipeline[TextContext]):
    """Text generation that emits one to `depth + 1` tokens of a request a step, each drawn by the target.

    MAX's scheduler drives it as it drives the plain pipeline, in whatever batches of prompts, chunks of prompts and
    running requests it makes.
    """

    _pipeline_model: SpeculativeStep3p5Model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: dict[RequestID, RequestState] = {}
        self._step_metrics: _SpeculativeDecodingMetrics | None = None
        self._planned = DraftPlan(0, 0)
        self.statistics = Statistics(self._pipeline_model.depth)
        speculative = self._pipeline_config.speculative
        schedule = speculative.verify_width_schedule if speculative is not None else None
        model = self._pipeline_model
        self.policy: FixedDepth | AdaptiveDepth = (
            AdaptiveDepth(model.depth, model.cycle_bytes) if schedule is None else FixedDepth(schedule, model.depth)
        )

        self.cycles: SteadyCycles | None = None
        self._run: SteadyRun | None = None
        self._padding = Padding(self._kv_manager, max(model.depth - 1, 0))
        self._planned_ahead: DraftPlan | None = None
        self._next_plan: DraftPlan | None = None
        """What the policy said for a cycle that was then not launched ahead."""
        self.launches_ahead = False
        """Whether a cycle is launched as soon as the one before is known, without waiting for its step."""
        if model.depth and model.stays_on_device and not is_virtual_device_mode():
            self.use_cycles(captures=True)

    def use_cycles(self, *, captures: bool) -> None:
        """Lets requests that only decode go through a `SteadyCycle` a step.

        Args:
            captures: Whether its graphs are captured, which takes a GPU.
        """
        manager, model = self._kv_manager, self._pipeline_model
        longest = model.max_seq_len + spec_decode_cache_slack(manager.params)
        longest = min(longest, manager.effective_max_seq_length or longest)
        graphs = model.cycle_graphs(self.vocab_size, longest, captures)
        self.cycles = None if graphs is None else SteadyCycles(graphs)
        self.launches_ahead = captures
        if self.cycles is not None:
            self.policy.try_out_with(CYCLE_TRIALS)

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
        batches = inputs.batches
        if not any(batches):
            return {}
        ahead = self._end_cycle_ahead(flatten2d(batches))
        if ahead:
            batches = [[context for context in batch if not context.is_done] for batch in batches]
        outputs = self._execute_step(batches) if any(batches) else {}
        return outputs | _outputs(context for context in ahead if context.request_id not in outputs)

    def _execute_step(self, batches: Sequence[list[TextContext]]) -> PipelineOutputsDict[TextGenerationOutput]:
        """A step of requests of which none is done."""
        batch = flatten2d(batches)
        self._planned_ahead = None
        if (run := self._run_to_go_on(batch)) is not None:
            return self._execute_cycle(run)
        started = time.perf_counter()
        states = [self._state(context) for context in batch]
        drafts = [self._drafts_to_verify(context, state) for context, state in zip(batch, states, strict=True)]
        pure = all(context.tokens.active_length == 1 and context.tokens.generated_length for context in batch)
        for context, own in zip(batch, drafts, strict=True):
            # The cache makes room for as many; their tokens may be on the device alone.
            context.spec_decoding_state.draft_tokens_to_verify = [0] * len(own)
        kv_cache_inputs = self._kv_manager.runtime_inputs(batches)
        logits, hidden = self._pipeline_model.verify(batch, drafts, kv_cache_inputs)
        drawn = self._sample(logits, batch, drafts)
        first_rows = self._commit(batch, drafts, drawn)
        verified = time.perf_counter()
        if pure and self._planned.num_requests == len(batch) and not self._is_start_of_run(batch):
            self.policy.record_verification(len(batch), self._planned.depth, verified - started)
        if self._pipeline_model.heads is not None:
            self._pipeline_model.heads.see(np.array(drawn))
        self._draft(batch, states, first_rows, hidden, kv_cache_inputs, pure)
        self.statistics.record_times(verified - started, time.perf_counter() - verified)
        outputs = _outputs(batch)
        for context in batch:
            self._kv_manager.step(context)
        return outputs

    def _run_to_go_on(self, batch: list[TextContext]) -> SteadyRun | None:
        """The run that a step of `batch` belongs to, begun here if need be; `None` where there must be none."""
        run, model = self._run, self._pipeline_model
        if run is not None and run.launched is not None:
            return run
        if run is not None and not run.goes_on_in(batch):
            self._end_run()
            run = None
        if self.cycles is None or not self._can_cycle(batch):
            self._end_run()
            return None
        plan, self._next_plan = self._next_plan or self.policy.plan(len(batch), True), None
        if run is None or plan != DraftPlan(run.cycle.depth, len(batch)):
            self._end_run()
            starts = self._starts(batch, plan.depth) if plan.num_requests == len(batch) else None
            if starts is None:
                self._planned_ahead = plan
                return None
            size = padded_size(len(batch), self.max_batch_size)
            padding = self._padding.take(size - len(batch))
            if padding is None:
                size, padding = len(batch), []
            cycle = self.cycles.of_size(size, plan.depth)
            cycle.begin(starts)
            self._run = run = SteadyRun(batch, padding, cycle, model.rows_to_go_on)
        self._planned = plan
        return run

    def _can_cycle(self, batch: Sequence[TextContext]) -> bool:
        """Whether the requests do no more than decode, without penalties, and there is room for their drafts."""
        return all(
            context.tokens.active_length == 1
            and context.tokens.generated_length > 0
            and len(context.tokens) <= self._longest_to_draft
            and not context.sampling_params.needs_penalties
            and can_verify_drafts(context)
            for context in batch
        )

    @property
    def _longest_to_draft(self) -> int:
        """Tokens of a request behind which there is room for its drafts."""
        return self._pipeline_model.max_seq_len - self._pipeline_model.depth

    def _is_start_of_run(self, batch: Sequence[TextContext]) -> bool:
        """Whether a step only leads to cycles, so that its time foretells nothing."""
        return self.cycles is not None and self._can_cycle(batch)

    def _starts(self, batch: Sequence[TextContext], depth: int) -> list[Start] | None:
        """Where the requests stand, if all of them have what a cycle of `depth` drafts begins with."""
        assert self.cycles is not None
        keep = self.cycles.graphs.keep
        starts = []
        for context in batch:
            state, position = self._states.get(context.request_id), context.tokens.processed_length
            if (
                state is None
                or state.position != position
                or len(state.drafts or ()) < depth
                or state.first_unread(depth) < position - keep
            ):
                return None
            kept = state.rows_from(position - keep)
            if sum(map(len, kept)) != keep:
                return None
            drafts = state.drafts.first(depth) if state.drafts is not None else ()
            starts.append(Start(context.tokens.all[position - keep : position + 1], drafts, kept))
        return starts

    def _end_run(self) -> None:
        """Gives the requests of a run back what they carry from step to step."""
        run, self._run, self._next_plan = self._run, None, None
        if run is None:
            return
        alive = [index for index, context in enumerate(run.batch) if run.stands_still(index) and not context.is_done]
        if not alive:
            return
        depth = run.cycle.depth
        drafted, kept = run.cycle.end()
        for index in alive:
            if (state := self._states.get(run.batch[index].request_id)) is not None:
                rows = run.rows.of(index) if run.cycle.leaves_rows else kept[index]
                state.advance(run.ends[index], depth, rows, Drafts(drafted, index, depth) if depth else None)

    def _execute_cycle(self, run: SteadyRun) -> PipelineOutputsDict[TextGenerationOutput]:
        """A step of a run."""
        ahead = run.launched
        advanced = self._end_cycle(run, ahead or self._launch_cycle(run))
        if self.launches_ahead:
            self._launch_ahead(run, has_room=ahead is not None)
        for context in advanced:
            self._kv_manager.step(context)
        return _outputs(run.batch)

    def _launch_cycle(self, run: SteadyRun) -> Launched:
        """Launches the run's next cycle, for which the cache has room."""
        assert self.cycles is not None
        started, model, longest = time.perf_counter(), self._pipeline_model, self.cycles.graphs.longest
        size, depth = run.cycle.batch_size, run.cycle.depth
        for context in run.batch:
            context.spec_decoding_state.draft_tokens_to_verify = [0] * depth
        caches = self._kv_manager.runtime_inputs(
            [[*run.batch, *run.padding]],
            max_cache_length=longest,
            batch_characteristics=BatchCharacteristics(size, depth + 1, longest),
        )
        model.await_inputs()
        return Launched(started, run.cycle.launch(cast(Any, caches), self._sampler_of(run)))

    def _launch_ahead(self, run: SteadyRun, *, has_room: bool) -> None:
        """Launches the next cycle while the depths still draft, if nothing but another batch can come between.

        Should another batch come, the cycle is one of the requests that are left: see `_end_cycle_ahead`.

        Args:
            run: What goes on.
            has_room: Whether the scheduler made room for it: it does for the cycle behind one that was launched ahead.
        """
        if any(context.is_done or len(context.tokens) > self._longest_to_draft for context in run.batch):
            return
        self._next_plan = self.policy.plan(len(run.batch), True)
        if self._next_plan != DraftPlan(run.cycle.depth, len(run.batch)):
            return
        try:
            for context in [] if has_room else run.batch:
                self._kv_manager.alloc(context).synchronize()
        except InsufficientBlocksError:
            return  # the scheduler will make room, or wait
        self._planned, self._next_plan = self._next_plan, None
        run.launched = self._launch_cycle(run)
        for context in run.batch:
            # So many tokens may come before the step that the scheduler makes room for next.
            context.spec_decoding_state.maybe_accepted_draft_tokens = [0] * (run.cycle.depth + 1)

    def _end_cycle_ahead(self, batch: list[TextContext]) -> list[TextContext]:
        """Ends a cycle that was launched for another batch than this one.

        Returns:
            The requests that it advanced; some may be done.
        """
        run = self._run
        if run is None or run.launched is None or run.goes_on_in(batch):
            return []
        advanced = self._end_cycle(run, run.launched)
        for context in advanced:
            self._kv_manager.step(context)
        return advanced

    def _end_cycle(self, run: SteadyRun, launched: Launched) -> list[TextContext]:
        """Waits for a cycle, and advances those of its requests that are where it found them; returns them."""
        result = self._wait(run, launched.ready)
        verified, model, run.launched = time.perf_counter(), self._pipeline_model, None
        advanced = self._commit_cycle(run, result)
        if model.heads is not None:
            model.heads.see(result[:, :-1].ravel())
        if (seconds := run.seconds_of_cycle(verified)) is not None:
            # What the host does goes on beside the drafting, so that the two have no times of their own.
            self.policy.record_verification(len(run.batch), run.cycle.depth, seconds)
            self.policy.record_drafting(len(run.batch), run.cycle.depth, 0.0)
        self.statistics.record_times(verified - launched.at, time.perf_counter() - verified)
        return advanced

    def _sampler_of(self, run: SteadyRun) -> Sampler | None:
        """What draws for a run; `None` where all requests take the greatest logit."""
        if all(map(takes_the_best, run.batch)):
            return None
        # MAX's sampler goes by the widest of a batch's parameters: what fills the batch up takes those of a request.
        contexts = [*run.batch, *[run.batch[0]] * len(run.padding)]
        unread = [0] * run.cycle.depth

        def sample(logits: Buffer) -> Buffer:
            tokens = self._drawn(logits, contexts, [unread] * len(contexts)).new_tokens
            assert tokens is not None
            return tokens.view(tokens.dtype, (tokens.num_elements,))

        return sample

    def _wait(self, run: SteadyRun, ready: DeviceEvent | None) -> Int64:
        """What a cycle drew and accepted, once it is on the host."""
        if ready is not None:
            ready.synchronize()
        return run.cycle.result[: len(run.batch)]

    def _commit_cycle(self, run: SteadyRun, result: Int64) -> list[TextContext]:
        """Appends what a cycle drew to the requests, and counts acceptance; returns those that are still there."""
        depth, counts = run.cycle.depth, []
        if run.cycle.leaves_rows:
            run.rows.add(run.cycle.hidden[: len(run.batch)], result[:, -1] + 1)
        # Since a launch ahead of its step a request may have been hung up or preempted.
        there = [c.request_id in self._states and run.stands_still(index) for index, c in enumerate(run.batch)]
        for context, is_there, (*tokens, accepted) in zip(run.batch, there, result.tolist(), strict=True):
            context.spec_decoding_state.draft_tokens_to_verify = []
            context.spec_decoding_state.maybe_accepted_draft_tokens = []
            if not is_there:
                continue
            commit(context, tokens[: accepted + 1])
            if depth:
                counts.append((depth, accepted))
            if context.is_done:
                self._states.pop(context.request_id, None)
        run.end_cycle()
        self._step_metrics = self.statistics.record_step(counts)
        self.policy.record_acceptance(counts)
        return [context for context, is_there in zip(run.batch, there, strict=True) if is_there]

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

    def _drafts_to_verify(self, context: TextContext, state: RequestState) -> Sequence[int]:
        """The request's drafts, as far as there is room for them before its maximum length."""
        if state.drafts is None or context.tokens.active_length != 1 or not can_verify_drafts(context):
            return []
        return state.drafts.first(context.max_length - len(context.tokens) - 1)

    def _sample(self, logits: Buffer, batch: Sequence[TextContext], drafts: Sequence[Sequence[int]]) -> list[int]:
        """One token for each row of `logits`."""
        tokens: list[int] = self._drawn(logits, batch, drafts).get_new_tokens_numpy().ravel().tolist()
        return tokens

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
        self._step_metrics = self.statistics.record_step(counts)
        self.policy.record_acceptance(counts)
        return first_rows

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
        plan = self._planned_ahead or self.policy.plan(len(running), pure)
        self._planned = plan
        started = time.perf_counter()
        if plan.depth:
            # Those with the least to catch up with: the same ones again in the next step.
            behind = {index: states[index].position - states[index].first_unread(plan.depth) for index in running}
            drafting = sorted(sorted(running, key=behind.__getitem__)[: plan.num_requests])
        else:
            drafting = []
        chosen = set(drafting)
        advances = []
        for index in running:
            end, start = batch[index].tokens.processed_length, states[index].position
            depth = plan.depth if index in chosen else 0
            kept = start - states[index].first_unread(plan.depth) if depth else 0
            wanted, new = states[index].rows_to_keep(end, depth), end - start
            # Rows that an earlier step kept are kept again if that makes all of them lie together.
            keeps_all = wanted <= kept + new
            advances.append(
                Advance(
                    batch[index].tokens.all,
                    start,
                    end,
                    first_rows[index],
                    kept,
                    depth > 0,
                    wanted if keeps_all else new,
                    keeps_all,
                )
            )
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
        measures = pure and plan.num_requests == len(running) and not self._is_start_of_run(batch)
        if plan.depth and measures and rows.max_prompt_length <= 2 * model.depth:
            self.policy.record_drafting(len(running), plan.depth, time.perf_counter() - started)
