"""Which requests of a step go through cycles together, and who joins them or leaves."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from typing import Any, TypeAlias

from max.driver import is_virtual_device_mode
from max.nn.kv_cache.cache_params import spec_decode_cache_slack
from max.pipelines.context import TextContext
from max.pipelines.modeling.types import RequestID
from typing_extensions import override

from ..cache_inputs import shorten
from .acceptance import can_verify_drafts
from .drafted import Drafts
from .kept_rows import Rows
from .padding import padded_size, padding_request
from .policy import DraftPlan
from .steady_cycle import Start, SteadyCycles
from .steady_run import Member, SteadyRun
from .step_plan import StepPlan
from .stepping import SteppingPipeline, is_running
from .trials import CYCLE_TRIALS

Joining: TypeAlias = dict[RequestID, tuple[Member, Start]]
"""Requests that can join a run, and where they stand."""


def forget_drafts(context: TextContext) -> None:
    """Takes back what a cycle on its way had the cache make room for."""
    context.spec_decoding_state.draft_tokens_to_verify = []
    context.spec_decoding_state.maybe_accepted_draft_tokens = []


class ArrangingPipeline(SteppingPipeline):
    """A pipeline with a run of requests that do no more than decode, by the policy's plan.

    Requests join the run and leave it between two cycles, with what they carry from step to step.
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
        if model.depth and not is_virtual_device_mode():
            self.use_cycles(captures=model.stays_on_device)

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
        drafted = run.cycle.drafted() if depth else None
        own_rows: Sequence[Rows] = run.rows.of(places)
        if not run.cycle.leaves_rows:
            kept = run.cycle.kept()
            own_rows = [kept[place] for place in places]
        for place, rows in zip(places, own_rows, strict=True):
            member = run.leave(place)
            member.state.advance(member.end, depth, rows, None if drafted is None else Drafts(drafted, place, depth))
