"""How deep to draft: the depth that pays is found and kept, and looking for it costs little."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import pytest

from step3p5.speculation.cycle_times import FIRST_SAMPLES, CycleTimes
from step3p5.speculation.kept_rows import concatenated
from step3p5.speculation.policy import AdaptiveDepth, FixedDepth, tokens_per_cycle
from step3p5.speculation.state import RequestState
from step3p5.speculation.trials import COST, CYCLE_TRIALS, PERIOD, TrialClock, TrialKind

DEPTH = 3

FEW, MANY = 3, 20
"""Machines that are watched: what one believes rests on the luck of a few draws."""

MOST = 0.8
"""The share of many that must do the right thing; 99 of 100 do."""


def any_bytes(batch: int, depth: int) -> float:
    """Bytes of a cycle that say nothing of the times below."""
    return 1.0 + 0.1 * depth + 0.01 * batch


class Machine:
    """Requests that draft under a policy, on a machine that takes the times it is given."""

    def __init__(
        self,
        policy: AdaptiveDepth,
        rng: np.random.Generator,
        verify_seconds: Callable[[int, float], float],
        draft_seconds: Callable[[int], float],
        switch_seconds: float = 0.0,
    ) -> None:
        self.policy, self.rng, self.switch_seconds = policy, rng, switch_seconds
        self.verify_seconds, self.draft_seconds = verify_seconds, draft_seconds
        self.planned = policy.plan(1, pure=False)

    def run(self, batch: int, acceptance: float, cycles: int) -> float:
        """Tokens a second over `cycles` cycles."""
        all_tokens, all_seconds = 0, 0.0
        for _ in range(cycles):
            before = self.planned
            drafts = self.planned.depth * min(1.0, self.planned.num_requests / batch)
            verify = self._noisy(self.verify_seconds(batch, drafts))
            draws = self.rng.random((min(batch, self.planned.num_requests), self.planned.depth)) < acceptance
            accepted = np.cumprod(draws, axis=1).sum(axis=1) if self.planned.depth else np.zeros(0, dtype=int)
            tokens = batch + int(accepted.sum())
            self.policy.record_acceptance([(self.planned.depth, int(count)) for count in accepted])
            if self.planned.num_requests == batch:
                self.policy.record_verification(batch, self.planned.depth, verify)
            self.planned = self.policy.plan(batch, pure=True)
            draft = self._noisy(self.planned.depth * self.draft_seconds(self.planned.num_requests))
            if self.planned.num_requests == batch:
                self.policy.record_drafting(batch, self.planned.depth, draft)
            seconds = verify + draft + (self.switch_seconds if self.planned != before else 0.0)
            self.policy.record_step(tokens, seconds)
            all_tokens += tokens
            all_seconds += seconds
        return all_tokens / all_seconds

    def _noisy(self, seconds: float) -> float:
        return float(seconds * self.rng.uniform(0.9, 1.1))


@pytest.mark.parametrize(("batch", "acceptance"), [(1, 0.95), (1, 0.2), (16, 0.8), (128, 0.95), (128, 0.2)])
@pytest.mark.parametrize("growth", [0.02, 0.25, 1.0])
def test_the_depth_that_pays_is_used(rng: np.random.Generator, batch: int, acceptance: float, growth: float) -> None:
    """`growth`: what one more token a request adds to a forward, as a share of it."""
    verify = lambda _, depth: 1.0 + growth * depth  # noqa: E731
    machines = [Machine(AdaptiveDepth(DEPTH, any_bytes), rng, verify, lambda _: 0.1) for _ in range(FEW)]
    reached = []
    for machine in machines:
        machine.run(batch, acceptance, 300)
        reached.append(machine.run(batch, acceptance, 2048))
    best = max(
        batch * tokens_per_cycle([acceptance] * depth) / (verify(batch, depth) + 0.1 * depth)
        for depth in range(DEPTH + 1)
    )
    assert statistics.fmean(reached) > 0.95 * best


@pytest.mark.parametrize(
    "cycle_bytes",
    [lambda _, depth: 1.0, lambda _, depth: 1.0 + 2.0 * depth, lambda batch, depth: 1.1 + depth * min(batch, 8) / 8],
    ids=["drafts for nothing", "drafts too dear", "true"],
)
def test_speculation_costs_at_most_three_percent_while_everything_changes(
    rng: np.random.Generator, cycle_bytes: Callable[[int, int], float]
) -> None:
    """From batch 1 to 128 and from acceptance 0.95 to 0.2, where verifying costs as much as decoding from 8 on."""
    verify = lambda batch, depth: 1.0 + depth * min(batch, 8) / 8  # noqa: E731
    machine = Machine(AdaptiveDepth(DEPTH, cycle_bytes), rng, verify, lambda _: 0.1)
    for batch, acceptance in [(1, 0.95), (8, 0.7), (128, 0.95), (128, 0.2), (16, 0.2), (1, 0.2)]:
        assert machine.run(batch, acceptance, 2048) > 0.97 * batch


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("batch", [1, 8, 128])
def test_what_it_costs_to_change_the_depth_counts(rng: np.random.Generator, batch: int, drafts: bool) -> None:
    """As much as twenty cycles; the first trial is on trust, by which the next ones are spaced."""
    verify = lambda _, depth: 1.0 + (0.05 if drafts else 0.5) * depth  # noqa: E731
    policy = AdaptiveDepth(DEPTH, any_bytes)
    policy.try_out_with(CYCLE_TRIALS)
    machine = Machine(policy, rng, verify, lambda _: 0.05, switch_seconds=20.0)
    acceptance = 0.9 if drafts else 0.2
    machine.run(batch, acceptance, 4000)
    best = batch * tokens_per_cycle([acceptance] * DEPTH) / (verify(batch, DEPTH) + 0.05 * DEPTH) if drafts else batch
    assert machine.run(batch, acceptance, 40_000) > 0.97 * best


def test_the_bytes_decide_before_anything_is_measured() -> None:
    dear = AdaptiveDepth(DEPTH, lambda _, depth: 1.0 + 2.0 * depth)
    cheap = AdaptiveDepth(DEPTH, lambda _, depth: 1.0)
    one = AdaptiveDepth(DEPTH, lambda _, depth: [1.0, 1.0, 3.0, 9.0][depth])
    for pure in (False, True):
        assert [policy.plan(8, pure).depth for policy in (dear, cheap, one)] == [0, DEPTH, 1]


def test_a_new_batch_size_is_judged_by_what_was_measured_of_others_and_by_the_bytes() -> None:
    """Verification for nothing at batch 64; what does not pay by far is not tried at all."""
    policy = AdaptiveDepth(DEPTH, lambda batch, depth: 1.0 + depth * (0.0 if batch > 32 else 3.0))
    tried = {batch: set[int]() for batch in (1, 64)}
    for batch, depths in tried.items():
        for _ in range(12):
            depth = policy.plan(batch, pure=True).depth
            depths.add(depth)
            policy.record_verification(batch, depth, 1.0 + depth * (0.0 if batch > 32 else 3.0))
            policy.record_drafting(batch, depth, 0.01)
    assert tried == {1: {0}, 64: {0, 2, 3}}
    assert policy.plan(64, pure=True).depth == DEPTH


def test_a_depth_between_two_that_were_measured_takes_a_time_between_theirs() -> None:
    """Bytes that hardly grow with the depth do not make a draft cheap where the measured times grow."""
    for bytes_of, expected in ((lambda _, depth: 30.0 + [0, 1, 3, 4][depth], [9.5, 12.5]), (lambda *_: 1.0, [10, 12])):
        times = CycleTimes(bytes_of)
        for depth, seconds in ((0, 8.0), (3, 14.0)):
            for _ in range(FIRST_SAMPLES):
                times.record_verification(128, depth, seconds)
                times.record_drafting(128, depth, 0.0)
        assert [times.seconds(128, depth) for depth in (1, 2)] == pytest.approx(expected)
        assert times.seconds(64, 0) == pytest.approx(8.0)


@pytest.mark.parametrize(("batch", "cycles"), [(1, 60), (32, 2)])
def test_acceptance_that_falls_is_noticed_at_once(rng: np.random.Generator, batch: int, cycles: int) -> None:
    verify = lambda _, depth: 1.0 + 0.5 * depth  # noqa: E731
    before, after = [], []
    for _ in range(MANY):
        machine = Machine(AdaptiveDepth(DEPTH, any_bytes), rng, verify, lambda _: 0.1)
        machine.run(batch, 0.95, 600)
        before.append(machine.planned.depth)
        machine.run(batch, 0.1, cycles)
        after.append(machine.planned.depth)
    assert np.mean(np.array(before) >= 2) >= MOST
    assert np.mean(np.array(after) == 0) >= MOST


def test_what_was_left_unread_has_to_pay_before_drafting_begins_again() -> None:
    """It takes a second a position, and a cycle's time to go deeper."""
    rested = []
    for positions in (0, 200):
        policy = AdaptiveDepth(DEPTH, any_bytes)
        policy.record_catching_up(10, 10.0)
        for depth in range(DEPTH + 1):
            for _ in range(FIRST_SAMPLES):
                policy.record_verification(8, depth, 1.0 + 0.5 * depth)
                policy.record_drafting(8, depth, 0.0)
        policy.record_acceptance([(DEPTH, 0)] * 400)
        for _ in range(10):
            policy.plan(8, pure=True)
        assert policy.plan(8, pure=True).depth == 0
        policy.record_acceptance([(DEPTH, DEPTH)] * 4000)
        gain = tokens_per_cycle(policy.acceptance) / 2.5 - 1
        depths = [policy.plan(8, pure=True, unread=lambda _, p=positions: p).depth for _ in range(500)]  # type: ignore[misc]
        rested.append(depths.index(DEPTH))
        assert set(depths[rested[-1] :]) == {DEPTH}
        assert rested[-1] == pytest.approx((1 + positions) / gain, abs=2)
    assert rested[1] > 100 > rested[0]


def depths_asked(policy: AdaptiveDepth, batch: int, *, measures: bool = True) -> list[int]:
    """What a policy wants in 100 steps, drafts being right and costing nothing."""
    depths = []
    for _ in range(100):
        depth = policy.plan(batch, pure=True).depth
        depths.append(depth)
        policy.record_acceptance([(depth, depth)] * batch if depth else [])
        if measures:
            policy.record_verification(batch, depth, 1.0)
            policy.record_drafting(batch, depth, 0.0)
    return depths


def test_a_batch_about_as_large_as_one_that_is_known_is_not_measured() -> None:
    policy = AdaptiveDepth(DEPTH, any_bytes)
    assert 0 in depths_asked(policy, 16)
    assert [0 in depths_asked(policy, batch) for batch in (17, 12, 32, 8, 128)] == [False] * 4 + [True]


def test_what_cannot_be_measured_is_given_up() -> None:
    depths = depths_asked(AdaptiveDepth(DEPTH, any_bytes), 16, measures=False)
    assert 0 < depths.count(0) < 20
    assert set(depths[-50:]) == {DEPTH}


def test_acceptance_that_comes_back_is_noticed(rng: np.random.Generator) -> None:
    verify = lambda _, depth: 1.0 + 0.02 * depth  # noqa: E731
    before, after = [], []
    for _ in range(FEW):
        machine = Machine(AdaptiveDepth(DEPTH, any_bytes), rng, verify, lambda _: 0.4)
        machine.run(64, 0.05, 600)
        before.append(machine.planned.depth)
        machine.run(64, 0.95, 1200)
        after.append(machine.planned.depth)
    assert statistics.median(before) == 0
    assert statistics.median(after) == DEPTH


def test_a_schedule_is_followed() -> None:
    fixed = FixedDepth([(1, 4, 3), (8, 16, 1)], max_depth=2)
    assert [fixed.plan(batch, pure=True).depth for batch in (1, 4, 7, 8, 100)] == [2, 2, 2, 1, 1]


def test_rows_of_unread_positions_are_kept_and_no_more() -> None:
    state = RequestState(position=10, depth=3, limit=6)
    state.advance(14, 3, rows(10, 14), drafts=None)
    assert state.first_unread(3) == 12
    assert state.first_unread(1) == 14
    state.advance(15, 0, rows(14, 15), drafts=None)
    assert stored(state, 12) == [12, 13, 14]
    assert stored(state, 14) == [14]
    state.advance(17, 1, rows(15, 17), drafts=None)
    assert state.first_unread(1) == 17
    assert stored(state, state.first_unread(3)) == [12, 13, 14, 15, 16]
    for end in range(18, 25):
        state.advance(end, 0, rows(end - 1, end), drafts=None)
    assert stored(state, state.first_unread(3)) == [18, 19, 20, 21, 22, 23]
    state.advance(40, 0, rows(34, 40), drafts=None)
    assert stored(state, state.first_unread(3)) == [34, 35, 36, 37, 38, 39]
    state.advance(41, 3, rows(40, 41), drafts=None)
    assert stored(state, state.first_unread(3)) == [39, 40]


def rows(start: int, end: int) -> np.ndarray:
    return np.arange(start, end, dtype=np.float32)[:, None]


def stored(state: RequestState, position: int) -> list[int]:
    return concatenated(state.rows_from(position), 1, np.float32)[:, 0].astype(int).tolist()


def test_the_time_with_one_batch_size_pays_for_no_trial_with_another() -> None:
    clock, large, small = TrialClock(), TrialKind(8, drafts=False), TrialKind(2, drafts=False)
    for _ in range(PERIOD):
        clock.tick(large)
        clock.record(64, 1.0)
    clock.tick(small)
    clock.record(1, 0.01)
    assert clock.is_due(large, expected_cost=COST * PERIOD)
    assert not clock.is_due(small, expected_cost=COST)
