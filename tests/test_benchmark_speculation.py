"""What `benchmarks/speculation.py` predicts and makes of its times; no model is compiled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import speculation

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.hub_config import hub_config
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.speculation.statistics import Statistics

BF16 = CheckpointDtype.BFLOAT16
FLASH_6 = parse_model_config(hub_config(PRESETS["flash"], 6, BF16))


@pytest.mark.parametrize(("batch", "speedup"), [(1, 1.06), (8, 1.05), (64, 2.2)])
def test_the_speedup_that_bytes_allow(batch: int, speedup: float) -> None:
    """Counted by hand for six layers of the released width: 2.95 tokens a cycle at acceptance 0.8."""
    assert speculation.predicted_speedup(FLASH_6, batch, [0.8] * 3, BF16) == pytest.approx(speedup, rel=0.02)


def test_drafts_that_are_never_right_only_cost() -> None:
    assert speculation.predicted_speedup(FLASH_6, 1, [0.0], BF16) < 0.9


def test_a_case_is_compared_with_the_plain_pipeline_round_by_round() -> None:
    plain, drafting = speculation.Case(4, 0), speculation.Case(4, 2)
    counts = Statistics(2)
    counts.record_step([(2, 1), (2, 2)])
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


def test_more_new_tokens_than_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speculation.parse_arguments(["model", "--new-tokens", "2000"])
    assert "--new-tokens: found 2000, expected at most 960" in capsys.readouterr().err
