"""What `benchmarks/speculation.py` predicts and makes of its times; no model is compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from max.pipelines.kv_cache import PagedKVCacheManager

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import plot
import report
import speculation
import speculation_moving
from speculation_moving import MovingReport, Phase, PhaseResult, moving_phases
from speculation_profile import watched_calls
from speculation_run import Case
from speculation_tokens import TopTwo, compare, top_two

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.hub_config import hub_config
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.speculation.draft_vocabulary import SIZE_VARIABLE
from step3p5.speculation.model import SpeculativeStep3p5Model
from step3p5.speculation.pipeline import SpeculativePipeline
from step3p5.speculation.policy import FixedDepth
from step3p5.speculation.statistics import Statistics

BF16 = CheckpointDtype.BFLOAT16
FLASH_6 = parse_model_config(hub_config(PRESETS["flash"], 6, BF16))


@pytest.mark.parametrize(("batch", "speedup"), [(1, 1.06), (8, 1.05), (64, 2.2)])
def test_the_speedup_that_bytes_allow(batch: int, speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand for six layers of the released width: 2.95 tokens a cycle at acceptance 0.8."""
    monkeypatch.setenv(SIZE_VARIABLE, str(FLASH_6.vocab_size))
    assert speculation.predicted_speedup(FLASH_6, batch, [0.8] * 3, BF16) == pytest.approx(speedup, rel=0.02)


def test_a_draft_vocabulary_of_an_eighth_allows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head reads 0.13 GB rather than 1.06: 6.1 GB and three drafts of 0.70 for 2.95 tokens of 3.9 GB."""
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    assert speculation.predicted_speedup(FLASH_6, 1, [0.8] * 3, BF16) == pytest.approx(1.41, rel=0.02)


def test_drafts_that_are_never_right_only_cost() -> None:
    assert speculation.predicted_speedup(FLASH_6, 1, [0.0], BF16) < 0.9


def test_the_profile_watches_what_the_pipeline_has() -> None:
    class Pipeline(SpeculativePipeline):
        _pipeline_model: Any = SpeculativeStep3p5Model
        _kv_manager: Any = PagedKVCacheManager

    missing = [(owner, name) for _, owner, name in watched_calls(Pipeline) if not callable(getattr(owner, name, None))]
    assert not missing


def test_a_case_is_compared_with_the_plain_pipeline_round_by_round() -> None:
    plain, drafting = Case(4, 0), Case(4, 2)
    counts = Statistics(2)
    counts.record_drafts([(2, 1), (2, 2)])
    counts.record_times(0.030, 0.010)
    for base, rate in [(10.0, 20.0), (20.0, 30.0), (10.0, 30.0)]:
        plain.keep(base, None)
        drafting.keep(rate, counts)
    alone, result = speculation.evaluate([plain, drafting], FLASH_6, BF16)
    assert alone.speedup == 1.0
    assert (result.speedup, result.verify_ms, result.draft_ms) == (2.0, 30.0, 10.0)
    assert result.acceptance == [1.0, 0.5]
    assert result.predicted_speedup == speculation.predicted_speedup(FLASH_6, 4, [1.0, 0.5], BF16)
    assert result.row()[0] == "4, 2"


def environment() -> report.Environment:
    return report.Environment("now", "python", "a CPU", 2, 1 << 30, "Linux", "3.11", {})


def test_a_report_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [Case(batch, depth) for batch in (1, 8) for depth in (0, 1, 2, None)]
    counts = Statistics(2)
    counts.record_drafts([(2, 1), (2, 2)])
    counts.record_times(0.030, 0.010)
    for case in cases:
        case.keep(10.0, counts if case.depth != 0 else None)
    found = speculation.Report(
        "speculation", environment(), "mid", "cpu", 64, 1, 0.1, speculation.evaluate(cases, FLASH_6, BF16)
    )
    speculation.show(found, tmp_path / "run.json")
    assert "other processes kept 0.1 cores busy" in capsys.readouterr().out
    plot.draw(tmp_path / "run.json", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_moving_run_goes_through_all_batches_at_both_acceptances_and_returns() -> None:
    there = [Phase(batch, "often") for batch in (1, 4, 16)]
    back = [Phase(batch, "rarely") for batch in (16, 4, 1)]
    assert moving_phases((1, 4, 16), "often", "rarely") == [*there, *back, there[0]]


def test_where_one_pipeline_fits_at_a_time_one_policy_goes_through_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    runs: list[tuple[str, int, object]] = []

    @contextmanager
    def load(kind: str, name: str) -> Iterator[SimpleNamespace]:
        loaded.append(f"{kind} {name}")
        pipeline = SimpleNamespace(name=loaded[-1], policy=object(), statistics=Statistics(2))
        yield SimpleNamespace(pipeline=pipeline)

    def run(pipeline: Any, prompts: list[object], new_tokens: int, devices: str) -> SimpleNamespace:
        runs.append((pipeline.name, len(prompts), pipeline.policy))
        return SimpleNamespace(tokens=new_tokens * len(prompts), seconds=len(runs), steps=new_tokens)

    monkeypatch.setattr(speculation_moving, "_run_alone", run)
    phases = moving_phases((1, 4), "often", "rarely")
    loads = partial(load, "plain"), partial(load, "drafting")
    requests = 2, range(16, 99), 8, 100
    results, _ = speculation_moving.run_moving_apart(loads[0], loads[1], phases, *requests, "gpu")
    assert loaded == [*(f"drafting {name}" for name in ("often", "rarely", "often")), "plain often", "plain rarely"]
    assert [(result.batch, result.model) for result in results] == [(phase.batch, phase.model) for phase in phases]
    fixed = [policy for name, _, policy in runs if isinstance(policy, FixedDepth)]
    assert len(fixed) == 3 * (2 + 2 + 1)
    chosen = [(batch, policy) for name, batch, policy in runs if "drafting" in name and policy not in fixed]
    assert [batch for batch, _ in chosen] == [phase.batch for phase in phases]
    assert len({id(policy) for _, policy in chosen}) == 1
    # The run of a phase with the plain pipeline comes after one to warm up.
    seconds = [index + 1 for index, (name, *_) in enumerate(runs) if name == "plain often"][1::2]
    plain = [result.plain for result in results if result.model == "often"]
    assert plain == [100 * batch / time for batch, time in zip((1, 4, 1), seconds, strict=True)]


def test_a_moving_report_shows_costs_and_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = [
        PhaseResult(1, "mid", 10.0, 20.0, -1.0, [0.9, 0.8], 2.5),
        PhaseResult(8, "mid", 50.0, 49.0, 0.02, [0.2, 0.1], 0.1),
    ]
    found = MovingReport("speculation_moving", environment(), "mid", 64, None, phases, -0.25)
    speculation.show(found, tmp_path / "run.json")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines[-4:-2]] == ["-100.0%", "+2.0%"]
    assert lines[-1] == "whole run: -25.0%"
    plot.draw(tmp_path / "run.json", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_more_new_tokens_than_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speculation.parse_arguments(["model", "--new-tokens", "2000"])
    assert "--new-tokens: found 2000, expected at most 960" in capsys.readouterr().err


def test_a_parting_is_explained_where_the_two_best_logits_lie_within_one_step() -> None:
    # A step of bfloat16 is 2^-5 between 4 and 8.
    seen = {
        (0, 1): TopTwo((7, 3), (5.0, 5.0 - 2**-5)),
        (1, 0): TopTwo((7, 3), (5.0, 5.0 - 2**-4)),
        (2, 2): TopTwo((7, 4), (5.0, 5.0)),
    }
    found = compare(
        [[1, 3, 9], [3, 3, 3], [2, 2, 3], [5, 5, 5]], [[1, 7, 8], [7, 3, 3], [2, 2, 7], [5, 5, 5]], seen, 4, BF16
    )
    assert (found.prompts, found.tokens, found.near_ties, found.steps_apart) == (4, 1 + 0 + 2 + 3, 1, [1.0, 2.0, 0.0])
    assert [(parting.position, parting.plain) for parting in found.unexplained] == [(0, 3), (2, 3)]


def test_the_two_best_logits_are_found(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(300).astype(np.float32)
    second, first = np.argsort(logits)[-2:].tolist()
    assert top_two(logits.copy()) == TopTwo((first, second), (float(logits[first]), float(logits[second])))
