"""What `host.py` looks at; its run needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from max.pipelines.kv_cache.paged_kv_cache.jenga_cache_manager import JengaKVCacheManager
from max.pipelines.lib.graph_capture import ServeGraphCaptureRunner

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from host import Result, parse_arguments, watched_calls
from report import Spread

from step3p5.model import Step3p5Model
from step3p5.pipelines import FutureTokens, OverlapPipeline


def test_the_stages_of_a_step_are_where_the_stopwatch_looks_for_them() -> None:
    class Pipeline(OverlapPipeline):
        _pipeline_model: Any = Step3p5Model
        _kv_manager: Any = JengaKVCacheManager
        _realize_future_token_processor: Any = FutureTokens
        _graph_capture_runner: Any = ServeGraphCaptureRunner

    missing = [(owner, name) for _, owner, name in watched_calls(Pipeline) if not callable(getattr(owner, name, None))]
    assert not missing


def test_only_gpus_have_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["model", "--precompiled-mefs", "artifacts", "--devices", "cpu"])
    assert "--devices: found cpu, expected GPUs" in capsys.readouterr().err


def test_a_result_shows_every_stage() -> None:
    text = Result(8, Spread.of([1.0, 2.0, 3.0]), {"wait": 0.25, "rest": 0.5}).text()
    assert "batch 8: 2.000 (" in text
    assert "0.750 with the stopwatch" in text
    assert "0.2500" in text
