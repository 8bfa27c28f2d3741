"""The speculative pipeline: cycles for requests that only decode, steps for all others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import numpy as np
from max.driver import Buffer
from max.nn.kv_cache import BatchCharacteristics
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.kv_cache import InsufficientBlocksError
from max.pipelines.modeling.types import PipelineOutputsDict
from max.support.algorithm import flatten2d
from typing_extensions import override

from ..steady_batch import in_same_order
from .acceptance import commit
from .arrangement import ArrangingPipeline, Joining, forget_drafts
from .policy import DraftPlan
from .rows import Int64
from .steady_cycle import Caches, Outcome, Sampler
from .steady_run import Launched, SteadyRun
from .step_plan import StepPlan
from .stepping import is_running, outputs_of


class SpeculativePipeline(ArrangingPipeline):
    """A pipeline whose requests go through a `SteadyCycle` a step where all that they do is decode.

    MAX's scheduler drives it as it drives the plain pipeline, in whatever batches of prompts, chunks of prompts and
    running requests it makes. In a step the requests of the run go through a cycle; the rest of the batch, if any,
    takes a step of the other kind beside it: prompts, and what is to draft anew or on trial.
    """

    @override
    def _execute_batches(self, batches: Sequence[list[TextContext]]) -> PipelineOutputsDict[TextGenerationOutput]:
        if self.cycles is None:
            return super()._execute_batches(batches)
        batch = flatten2d(batches)
        self._forget_gone()
        run, joining, rest = self._run, Joining(), list[TextContext]()
        advanced: list[TextContext] = []
        if run is None or run.launched is None or not in_same_order(run.contexts, batch):
            advanced = self._end_run_without(batch)
            batch = [context for context in batch if not context.is_done]
            run, joining, rest = self._run_and_rest(batch)
        if run is not None:
            advanced += self._execute_cycle(run, joining, rest)
        outputs = super()._execute_batches([rest]) if rest else {}
        return outputs_of(context for context in advanced if context.request_id not in outputs) | outputs

    def _run_and_rest(self, batch: Sequence[TextContext]) -> tuple[SteadyRun | None, Joining, list[TextContext]]:
        """What goes through a cycle now, if anything, who joins it behind that, and who takes another kind of step."""
        run = self._run
        if run is None or run.launched is None or not any(context in run for context in batch):
            run, rest = self._arrange(batch)
            return run, Joining(), rest
        joining = self._joining(run, batch)
        rest = [context for context in batch if context not in run and context.request_id not in joining]
        self._planned_ahead = DraftPlan(self._plan.depth, len(rest)) if any(map(is_running, rest)) else None
        return run, joining, rest

    def _end_run_without(self, batch: Sequence[TextContext]) -> list[TextContext]:
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
        for context in advanced:
            self._kv_manager.step(context)
        self._end_run()
        return advanced

    def _execute_cycle(self, run: SteadyRun, joining: Joining, rest: Sequence[TextContext]) -> list[TextContext]:
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
        for context in advanced:
            self._kv_manager.step(context)
        if not len(run):
            self._run = None
        return advanced

    def _surely_goes_on(self, run: SteadyRun) -> bool:
        """Whether after the cycle that is launched another one follows, if no text ends in it."""
        gain = run.cycle.depth + 1
        return run.takes_the_best and all(
            member.end + 1 + gain <= self._longest_to_draft and member.end + 1 + gain < member.context.max_length
            for _, member in run
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

    def _end_cycle(self, run: SteadyRun, launched: Launched, following: Caches | None = None) -> list[TextContext]:
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

    def _commit_cycle(self, run: SteadyRun, outcome: Outcome) -> list[TextContext]:
        """Appends what a cycle drew to the requests, and counts acceptance; returns the requests."""
        depth, counts, advanced = run.cycle.depth, [], list(run.contexts)
        gained = np.zeros(run.cycle.batch_size, dtype=np.int64)
        drawn, accepted_by_place = outcome.drawn.tolist(), outcome.accepted.tolist()
        for place, member in list(run):
            context = member.context
            forget_drafts(context)
            accepted = accepted_by_place[place]
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
