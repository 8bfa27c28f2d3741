"""The speculative pipeline: cycles for requests that only decode, steps for all others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, is_virtual_device_mode
from max.nn.kv_cache import BatchCharacteristics
from max.nn.kv_cache.cache_params import spec_decode_cache_slack
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.kv_cache import InsufficientBlocksError
from max.pipelines.modeling.types import PipelineOutputsDict
from max.support.algorithm import flatten2d
from typing_extensions import override

from ..steady_batch import takes_the_best
from .acceptance import can_verify_drafts, commit
from .drafted import Drafts
from .padding import Padding, padded_size
from .policy import CYCLE_TRIALS, DraftPlan
from .rows import Int64
from .steady_cycle import Caches, Outcome, Sampler, Start, SteadyCycles
from .steady_run import Launched, SteadyRun
from .stepping import SteppingPipeline, outputs_of


class SpeculativePipeline(SteppingPipeline):
    """A pipeline whose requests go through a `SteadyCycle` a step where all that they do is decode.

    MAX's scheduler drives it as it drives the plain pipeline, in whatever batches of prompts, chunks of prompts and
    running requests it makes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self._pipeline_model
        self.cycles: SteadyCycles | None = None
        self._run: SteadyRun | None = None
        self._padding = Padding(self._kv_manager, max(model.depth - 1, 0))
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

    @override
    def _execute_batches(self, batches: Sequence[list[TextContext]]) -> PipelineOutputsDict[TextGenerationOutput]:
        ahead = self._end_cycle_ahead(flatten2d(batches))
        if ahead:
            batches = [[context for context in batch if not context.is_done] for batch in batches]
        outputs = self._execute_running(batches) if any(batches) else {}
        return outputs | outputs_of(context for context in ahead if context.request_id not in outputs)

    def _execute_running(self, batches: Sequence[list[TextContext]]) -> PipelineOutputsDict[TextGenerationOutput]:
        """A step of requests of which none is done."""
        self._planned_ahead = None
        run = self._run_to_go_on(flatten2d(batches))
        return super()._execute_batches(batches) if run is None else self._execute_cycle(run)

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

    @override
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
        launched = ahead or self._launch_cycle(run, self._cache_inputs(run))
        # Made while the device works, so that nothing but the lengths is left to do when the result is there.
        following = self._cache_inputs(run) if ahead is not None and self._surely_goes_on(run) else None
        advanced = self._end_cycle(run, launched, following)
        if self.launches_ahead and run.launched is None:
            self._launch_ahead(run, has_room=ahead is not None)
        for context in advanced:
            self._kv_manager.step(context)
        return outputs_of(run.batch)

    def _surely_goes_on(self, run: SteadyRun) -> bool:
        """Whether after the cycle that is launched another one follows, if no text ends in it."""
        longest = self._longest_to_draft - run.cycle.depth - 1
        return self._takes_the_best(run) and all(
            len(context.tokens) <= longest and len(context.tokens) + run.cycle.depth + 1 < context.max_length
            for context in run.batch
        )

    def _cache_inputs(self, run: SteadyRun) -> Caches:
        """The cache as the run's next cycle takes it; the cache has room for that.

        With a cycle on its way the lengths are the most that they can be after it.
        """
        assert self.cycles is not None
        size, depth, longest = run.cycle.batch_size, run.cycle.depth, self.cycles.graphs.longest
        for context in run.batch:
            context.spec_decoding_state.draft_tokens_to_verify = [0] * depth
        caches = self._kv_manager.runtime_inputs(
            [[*run.batch, *run.padding]],
            max_cache_length=longest,
            batch_characteristics=BatchCharacteristics(size, depth + 1, longest),
        )
        return cast(Caches, caches)

    def _launch_cycle(self, run: SteadyRun, caches: Caches) -> Launched:
        """Launches the run's next cycle."""
        started = time.perf_counter()
        self._pipeline_model.await_inputs()
        return Launched(started, run.cycle.launch(caches, self._sampler_of(run)))

    def _launch_at_once(self, run: SteadyRun, accepted: Int64, caches: Caches) -> Launched | None:
        """Launches the cycle after one before anything is done with that one's tokens.

        Args:
            run: What goes on.
            accepted: How many drafts of each request that cycle accepts.
            caches: What `_cache_inputs` gave while that cycle was on its way.

        Returns:
            The cycle; `None` if a request has left, or the policy wants another depth.
        """
        if not all(self._are_there(run)):
            return None
        self._next_plan = self.policy.plan(len(run.batch), True)
        if self._next_plan != DraftPlan(run.cycle.depth, len(run.batch)):
            return None
        self._planned, self._next_plan = self._next_plan, None
        return self._launch_cycle(run, run.cycle.at_lengths(caches, run.lengths_after(accepted)))

    def _launch_ahead(self, run: SteadyRun, *, has_room: bool) -> None:
        """Launches the next cycle while the depths still draft, if nothing but another batch can come between.

        Should another batch come, the cycle is one of the requests that are left: see `_end_cycle_ahead`.

        Args:
            run: What goes on.
            has_room: Whether the scheduler made room for it: it does for the cycle behind one that was launched ahead.
        """
        if any(context.is_done or len(context.tokens) > self._longest_to_draft for context in run.batch):
            return
        self._next_plan = self._next_plan or self.policy.plan(len(run.batch), True)
        if self._next_plan != DraftPlan(run.cycle.depth, len(run.batch)):
            return
        try:
            for context in [] if has_room else run.batch:
                self._kv_manager.alloc(context).synchronize()
        except InsufficientBlocksError:
            return  # the scheduler will make room, or wait
        self._planned, self._next_plan = self._next_plan, None
        self._note_ahead(run, self._launch_cycle(run, self._cache_inputs(run)))

    def _note_ahead(self, run: SteadyRun, launched: Launched) -> None:
        """Takes note of a cycle that was launched ahead of its step."""
        run.launched = launched
        for context in run.batch:
            context.spec_decoding_state.draft_tokens_to_verify = [0] * run.cycle.depth
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

    def _end_cycle(self, run: SteadyRun, launched: Launched, following: Caches | None = None) -> list[TextContext]:
        """Waits for a cycle, and advances those of its requests that are where it found them; returns them.

        Args:
            run: What the cycle belongs to.
            launched: The cycle.
            following: The cache for the next one, if that can be launched as soon as it is known what is accepted.
        """
        ahead = None
        if following is not None and not run.cycle.depth:
            # Nothing is to be accepted. Should a text end, the next cycle is for the others.
            ahead = self._launch_at_once(run, np.zeros(1, dtype=np.int64), following)
        result, hidden = self._wait(run, launched.outcome)
        verified, model, run.launched = time.perf_counter(), self._pipeline_model, None
        seconds = run.seconds_of_cycle(verified)
        if model.heads is not None:
            model.heads.see(result[:, :-1].ravel())
        if following is not None and run.cycle.depth and not run.ends_a_text(result):
            ahead = self._launch_at_once(run, result[:, -1], following)
        advanced = self._commit_cycle(run, result, hidden)
        if ahead is not None:
            self._note_ahead(run, ahead)
        if seconds is not None:
            # What the host does goes on beside the drafting, so that the two have no times of their own.
            self.policy.record_verification(len(run.batch), run.cycle.depth, seconds)
            self.policy.record_drafting(len(run.batch), run.cycle.depth, 0.0)
        self.statistics.record_times(verified - launched.at, time.perf_counter() - verified)
        return advanced

    def _takes_the_best(self, run: SteadyRun) -> bool:
        """Whether all requests of a run take the greatest logit."""
        return all(map(takes_the_best, run.batch))

    def _sampler_of(self, run: SteadyRun) -> Sampler | None:
        """What draws for a run; `None` where all requests take the greatest logit."""
        if self._takes_the_best(run):
            return None
        # MAX's sampler goes by the widest of a batch's parameters: what fills the batch up takes those of a request.
        contexts = [*run.batch, *[run.batch[0]] * len(run.padding)]
        unread = [0] * run.cycle.depth

        def sample(logits: Buffer) -> Buffer:
            tokens = self._drawn(logits, contexts, [unread] * len(contexts)).new_tokens
            assert tokens is not None
            return tokens.view(tokens.dtype, (tokens.num_elements,))

        return sample

    def _wait(self, run: SteadyRun, outcome: Outcome) -> tuple[Int64, npt.NDArray[Any] | None]:
        """What a cycle drew and accepted for the requests, and their hidden states, once they are on the host."""
        if outcome.ready is not None:
            outcome.ready.synchronize()
        count = len(run.batch)
        return outcome.result[:count], None if outcome.hidden is None else outcome.hidden[:count]

    def _are_there(self, run: SteadyRun) -> list[bool]:
        """Which requests were neither hung up nor preempted since their cycle was launched ahead of its step."""
        return [c.request_id in self._states and run.stands_still(index) for index, c in enumerate(run.batch)]

    def _commit_cycle(self, run: SteadyRun, result: Int64, hidden: npt.NDArray[Any] | None) -> list[TextContext]:
        """Appends what a cycle drew to the requests, and counts acceptance; returns those that are still there."""
        depth, counts = run.cycle.depth, []
        if hidden is not None:
            run.rows.add(hidden.copy(), result[:, -1] + 1)
        there = self._are_there(run)
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
