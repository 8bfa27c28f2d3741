"""The speculative pipeline: cycles for requests that only decode, steps for all others."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
from max.driver import Buffer, is_virtual_device_mode
from max.nn.kv_cache import BatchCharacteristics
from max.nn.kv_cache.cache_params import spec_decode_cache_slack
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.kv_cache import InsufficientBlocksError
from max.pipelines.modeling.types import PipelineOutputsDict, RequestID
from max.support.algorithm import flatten2d
from typing_extensions import override

from ..cache_inputs import shorten
from .acceptance import can_verify_drafts, commit
from .drafted import Drafts
from .kept_rows import Rows
from .padding import padded_size, padding_request
from .policy import DraftPlan
from .rows import Int64
from .steady_cycle import Caches, Outcome, Sampler, Start, SteadyCycles
from .steady_run import Advanced, Launched, Member, SteadyRun
from .step_plan import StepPlan
from .stepping import SteppingPipeline, is_running, outputs_of
from .trials import CYCLE_TRIALS

Joining: TypeAlias = dict[RequestID, tuple[Member, Start]]
"""Requests that can join a run, and where they stand."""


def forget_drafts(context: TextContext) -> None:
    """Takes back what a cycle on its way had the cache make room for."""
    context.spec_decoding_state.draft_tokens_to_verify = []
    context.spec_decoding_state.maybe_accepted_draft_tokens = []


class SpeculativePipeline(SteppingPipeline):
    """A pipeline whose requests go through a `SteadyCycle` a step where all that they do is decode.

    MAX's scheduler drives it as it drives the plain pipeline, in whatever batches of prompts, chunks of prompts and
    running requests it makes. In a step the requests of the run go through a cycle; the rest of the batch, if any,
    takes a step of the other kind beside it: prompts, and what is to draft anew or on trial. Requests join the run and
    leave it between two cycles.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shorten(self._kv_manager)
        model = self._pipeline_model
        self.cycles: SteadyCycles | None = None
        self._run: SteadyRun | None = None
        self._padding: TextContext | None = None
        self._plan = StepPlan(0, 0, 0)
        """By which the last cycle was launched."""
        self._next_plan: StepPlan | None = None
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
        if self.cycles is None:
            return super()._execute_batches(batches)
        batch = flatten2d(batches)
        self._forget_gone()
        advanced = self._end_run_without(batch)
        batch = [context for context in batch if not context.is_done]
        run, joining = self._run, Joining()
        if run is not None and run.launched is not None and any(context in run for context in batch):
            joining = self._joining(run, batch)
            rest = [c for c in batch if c not in run and c.request_id not in joining]
            self._planned_ahead = DraftPlan(self._plan.depth, len(rest)) if any(map(is_running, rest)) else None
        else:
            run, rest = self._arrange(batch)
        if run is not None:
            advanced += self._execute_cycle(run, joining, rest)
        outputs = super()._execute_batches([rest]) if rest else {}
        return outputs_of(context for context, _ in advanced if context.request_id not in outputs) | outputs

    def _forget_gone(self) -> None:
        """Frees the places of requests that were hung up or preempted since the last step."""
        run = self._run
        if run is None:
            return
        for place, member in list(run):
            if self._states.get(member.context.request_id) is not member.state or not member.stands_still:
                forget_drafts(run.leave(place).context)
        if not len(run):
            self._run = None

    def _end_run_without(self, batch: Sequence[TextContext]) -> list[Advanced]:
        """Ends the run if requests of it are left out of a step that is not one of prompts alone.

        Returns:
            The requests that a cycle on its way advanced; some may be done.
        """
        run = self._run
        if run is None or not any(map(is_running, batch)):
            return []
        there = {context.request_id for context in batch}
        if all(member.context.request_id in there for _, member in run):
            return []
        advanced = [] if run.launched is None else self._end_cycle(run, run.launched)
        self._publish(advanced)
        self._end_run()
        return advanced

    def _arrange(self, batch: Sequence[TextContext]) -> tuple[SteadyRun | None, list[TextContext]]:
        """Lets requests of `batch` go through cycles from now on, where no cycle is on its way.

        Returns:
            The run that is to go through a cycle now, if any, and who takes a step of the other kind.
        """
        self._planned_ahead = None
        cycling = [context for context in batch if self._can_cycle(context)]
        if not cycling:
            return None, list(batch)
        plan, self._next_plan = self._next_plan or self._ask_policy(cycling), None
        if plan.requests != len(cycling):
            plan = StepPlan(plan.depth, len(cycling), len(cycling))
        self._plan = plan
        tried = self._tried(cycling)
        staying = [context for context in cycling if context.request_id not in tried]
        run = self._run_for(staying, tried)
        joining = self._starts([c for c in staying if run is None or c not in run], plan.run_depth)
        if run is None and len(joining) > len(staying) // 2:
            cycle = self._steady_cycles.of_size(padded_size(len(staying), self.max_batch_size), plan.run_depth)
            self._run = run = SteadyRun(cycle, self._padding_request, self._pipeline_model.rows_to_go_on)
        if run is None:
            self._planned_ahead = DraftPlan(plan.depth, plan.drafting if plan.is_trial else len(batch))
            return None, list(batch)
        run.join(list(joining.values()))
        rest = [context for context in batch if context not in run]
        if any(map(is_running, rest)):
            self._planned_ahead = DraftPlan(plan.depth, len(rest))
        return run, rest

    def _run_for(self, staying: Sequence[TextContext], tried: Container[RequestID]) -> SteadyRun | None:
        """The run, if it can go on by the plan with those of `staying` that are in it; else it ends here."""
        run = self._run
        if run is None:
            return None
        if run.cycle.depth != self._plan.run_depth or not run.fits(len(staying)):
            self._end_run()
            return None
        self._give_back(run, [place for place, member in run if member.context.request_id in tried])
        return run

    def _ask_policy(self, contexts: Sequence[TextContext]) -> StepPlan:
        """What the policy says for a step of requests that decode."""
        return StepPlan.of(self.policy.plan(len(contexts), True, partial(self._unread, contexts)), len(contexts))

    def _tried(self, cycling: Sequence[TextContext]) -> set[RequestID]:
        """The requests of a trial: those with the least to catch up with, the same ones again in the next step."""
        plan = self._plan
        if not plan.is_trial:
            return set()

        def behind(context: TextContext) -> int:
            state = self._states.get(context.request_id)
            return context.tokens.processed_length - (0 if state is None else state.first_unread(plan.depth))

        return {context.request_id for context in sorted(cycling, key=behind)[: plan.drafting]}

    @property
    def _steady_cycles(self) -> SteadyCycles:
        assert self.cycles is not None
        return self.cycles

    @property
    def _padding_request(self) -> TextContext:
        if self._padding is None:
            self._padding = padding_request(self._kv_manager, self._steady_cycles.graphs.keep)
        return self._padding

    def _can_cycle(self, context: TextContext) -> bool:
        """Whether a request does no more than decode, without penalties, and there is room for its drafts."""
        return (
            is_running(context)
            and len(context.tokens) <= self._longest_to_draft
            and not context.sampling_params.needs_penalties
            and can_verify_drafts(context)
        )

    @property
    def _longest_to_draft(self) -> int:
        """Tokens of a request behind which there is room for its drafts."""
        return self._pipeline_model.max_seq_len - self._pipeline_model.depth

    @override
    def _foretells_nothing(self, batch: Sequence[TextContext]) -> bool:
        return self.cycles is not None and (self._run is not None or all(map(self._can_cycle, batch)))

    def _joining(self, run: SteadyRun, batch: Sequence[TextContext]) -> Joining:
        """Which requests of `batch` can join a run whose cycle is on its way, as soon as that has ended."""
        newcomers = [context for context in batch if context not in run and self._can_cycle(context)]
        if self._plan.is_trial or not run.fits(len(run) + len(newcomers)):
            return {}
        return self._starts(newcomers, run.cycle.depth)

    def _starts(self, contexts: Sequence[TextContext], depth: int) -> Joining:
        """Where requests stand, of those that have what a cycle of `depth` drafts begins with."""
        keep, joining = self._steady_cycles.graphs.keep, Joining()
        for context in contexts:
            state, position = self._states.get(context.request_id), context.tokens.processed_length
            if (
                state is None
                or state.position != position
                or len(state.drafts or ()) < depth
                or state.first_unread(depth) < position - keep
            ):
                continue
            kept = state.rows_from(position - keep)
            if sum(map(len, kept)) != keep:
                continue
            drafts = state.drafts.first(depth) if state.drafts is not None else ()
            start = Start(context.tokens.all[position - keep : position + 1], drafts, kept)
            joining[context.request_id] = Member(context, state, position), start
        return joining

    def _end_run(self) -> None:
        """Gives the requests of a run back what they carry from step to step; no cycle is on its way."""
        run, self._run, self._next_plan = self._run, None, None
        if run is not None:
            self._give_back(run, [place for place, _ in run])

    def _give_back(self, run: SteadyRun, places: Sequence[int]) -> None:
        """Lets requests leave a run with what they carry from step to step."""
        if not places:
            return
        depth = run.cycle.depth
        drafted, kept = run.cycle.end()
        rows: Sequence[Rows] = run.rows.of(places) if run.cycle.leaves_rows else [kept[place] for place in places]
        for place, own_rows in zip(places, rows, strict=True):
            member = run.leave(place)
            member.state.advance(member.end, depth, own_rows, Drafts(drafted, place, depth) if depth else None)

    def _execute_cycle(self, run: SteadyRun, joining: Joining, rest: Sequence[TextContext]) -> list[Advanced]:
        """Ends a cycle of a run, the one on its way if there is one; launches the next one where that goes ahead.

        Args:
            run: What goes through it.
            joining: Who joins the run before the next one.
            rest: Who takes a step of the other kind meanwhile.

        Returns:
            The requests that were advanced.
        """
        ahead = run.launched
        launched = ahead or self._launch_cycle(run, self._cache_inputs(run))
        following = None
        if joining or rest:
            run.interrupt()
        elif ahead is not None and self._surely_goes_on(run):
            # Made while the device works, so that nothing but the lengths is left to do when the result is there.
            following = self._cache_inputs(run)
        advanced = self._end_cycle(run, launched, following)
        if self.launches_ahead and run.launched is None:
            self._launch_ahead(run, joining, rest, has_room=ahead is not None)
        self._publish(advanced)
        if not len(run):
            self._run = None
        return advanced

    def _publish(self, advanced: Sequence[Advanced]) -> None:
        """Lets the cache go on behind requests that have filled a page: nothing changes in it before."""
        page_size = self._kv_manager.params.page_size
        for context, before in advanced:
            if context.tokens.processed_length // page_size > before // page_size:
                self._kv_manager.step(context)

    def _surely_goes_on(self, run: SteadyRun) -> bool:
        """Whether after the cycle that is launched another one follows, if no text ends in it."""
        longest = self._longest_to_draft - run.cycle.depth - 1
        return run.takes_the_best and all(
            len(context.tokens) <= longest and len(context.tokens) + run.cycle.depth + 1 < context.max_length
            for context in run.contexts
        )

    def _cache_inputs(self, run: SteadyRun) -> Caches:
        """The cache as the run's next cycle takes it; the cache has room for that.

        With a cycle on its way the lengths are the most that they can be after it.
        """
        size, depth, longest = run.cycle.batch_size, run.cycle.depth, self._steady_cycles.graphs.longest
        for context in run.contexts:
            context.spec_decoding_state.draft_tokens_to_verify = [0] * depth
        caches = self._kv_manager.runtime_inputs(
            [run.all_contexts],
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
            accepted: How many drafts that cycle accepts, by place, or one number for all.
            caches: What `_cache_inputs` gave while that cycle was on its way.

        Returns:
            The cycle; `None` if the run cannot go on by the policy's plan.
        """
        self._next_plan = self._ask_policy(run.contexts)
        if self._next_plan != StepPlan(run.cycle.depth, len(run), len(run)) or not run.fits(len(run)):
            return None
        self._plan, self._next_plan = self._next_plan, None
        return self._launch_cycle(run, run.cycle.at_lengths(caches, run.lengths_after(accepted)))

    def _launch_ahead(self, run: SteadyRun, joining: Joining, rest: Sequence[TextContext], *, has_room: bool) -> None:
        """Launches the next cycle while the depths still draft, if the run can go on without another arrangement.

        Args:
            run: What goes on.
            joining: Who joins it first.
            rest: Who takes a step of the other kind meanwhile.
            has_room: Whether the scheduler made room for those in the run: it does for the cycle behind one that was
                launched ahead.
        """
        contexts = [*run.contexts, *(member.context for member, _ in joining.values())]
        if not contexts or any(len(context.tokens) > self._longest_to_draft for context in run.contexts):
            return
        plan = self._next_plan = self._next_plan or self._ask_policy([*contexts, *filter(self._can_cycle, rest)])
        begins_trial = plan.is_trial and not self._plan.is_trial
        if begins_trial or plan.run_depth != run.cycle.depth or not run.fits(len(contexts)):
            return
        try:
            for context in contexts[len(run) if has_room else 0 :]:
                self._kv_manager.alloc(context).synchronize()
        except InsufficientBlocksError:
            return  # the scheduler will make room, or wait
        run.join(list(joining.values()))
        self._plan, self._next_plan = plan, None
        self._note_ahead(run, self._launch_cycle(run, self._cache_inputs(run)))

    def _note_ahead(self, run: SteadyRun, launched: Launched) -> None:
        """Takes note of a cycle that was launched ahead of its step."""
        run.launched = launched
        for context in run.contexts:
            context.spec_decoding_state.draft_tokens_to_verify = [0] * run.cycle.depth
            # So many tokens may come before the step that the scheduler makes room for next.
            context.spec_decoding_state.maybe_accepted_draft_tokens = [0] * (run.cycle.depth + 1)

    def _end_cycle(self, run: SteadyRun, launched: Launched, following: Caches | None = None) -> list[Advanced]:
        """Waits for a cycle, and advances the run's requests; returns them.

        Args:
            run: What the cycle belongs to.
            launched: The cycle.
            following: The cache for the next one, if that can be launched as soon as it is known what is accepted.
        """
        ahead = None
        if following is not None and not run.cycle.depth:
            # Nothing is to be accepted. Should a text end, the next cycle is for the others.
            ahead = self._launch_at_once(run, np.zeros(1, dtype=np.int64), following)
        launched.outcome.wait()
        verified, model, run.launched = time.perf_counter(), self._pipeline_model, None
        seconds = run.seconds_of_cycle(verified)
        outcome = launched.outcome
        drawn = outcome.drawn[[place for place, _ in run]]
        if model.heads is not None:
            model.heads.see(drawn.ravel())
        if following is not None and run.cycle.depth and not run.ends_a_text(drawn):
            ahead = self._launch_at_once(run, outcome.accepted, following)
        advanced = self._commit_cycle(run, outcome)
        if ahead is not None:
            self._note_ahead(run, ahead)
        if seconds is not None:
            # What the host does goes on beside the drafting, so that the two have no times of their own.
            self.policy.record_verification(run.cycle.batch_size, run.cycle.depth, seconds)
            self.policy.record_drafting(run.cycle.batch_size, run.cycle.depth, 0.0)
        self.statistics.record_times(verified - launched.at, time.perf_counter() - verified)
        return advanced

    def _sampler_of(self, run: SteadyRun) -> Sampler | None:
        """What draws for a run; `None` where all requests take the greatest logit."""
        if run.takes_the_best:
            return None
        # MAX's sampler goes by the widest of a batch's parameters: what fills the batch up takes those of a request.
        some = run.contexts[0]
        contexts = [some if member is None else member.context for member in run.places]
        unread = [0] * run.cycle.depth

        def sample(logits: Buffer) -> Buffer:
            tokens = self._drawn(logits, contexts, [unread] * len(contexts)).new_tokens
            assert tokens is not None
            return tokens.view(tokens.dtype, (tokens.num_elements,))

        return sample

    def _commit_cycle(self, run: SteadyRun, outcome: Outcome) -> list[Advanced]:
        """Appends what a cycle drew to the requests, and counts acceptance; returns the requests."""
        depth, counts, advanced = run.cycle.depth, [], []
        gained = np.zeros(run.cycle.batch_size, dtype=np.int64)
        drawn, accepted_by_place = outcome.drawn.tolist(), outcome.accepted.tolist()
        for place, member in list(run):
            context = member.context
            forget_drafts(context)
            accepted = accepted_by_place[place]
            advanced.append(Advanced(context, member.end))
            commit(context, drawn[place][: accepted + 1])
            if depth:
                counts.append((depth, accepted))
            if context.is_done:
                self._states.pop(context.request_id, None)
                run.leave(place)
            else:
                gained[place] = accepted + 1
            member.end = context.tokens.processed_length
        run.end_cycle(outcome.hidden, gained)
        self._count_acceptance(counts)
        return advanced
