"""How the benchmarks read the steps of an overlapped pipeline."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from device import as_passes, max_settings


def test_a_cpu_returns_tokens_in_the_step_that_makes_them() -> None:
    assert as_passes("cpu", [3.0, 1.0, 1.5]) == [3.0, 1.0, 1.5]
    assert max_settings("cpu", None) == {}


def test_a_gpu_returns_them_one_step_later() -> None:
    assert as_passes("gpu", [0.5, 2.5, 1.0, 1.5]) == [3.0, 1.0, 1.5]
    assert as_passes("gpu:0", [0.5, 2.5]) == [3.0]


@pytest.mark.parametrize("folder", [None, "mefs"])
def test_artifacts_are_named_only_where_there_are_some(folder: str | None) -> None:
    settings = max_settings("gpu", folder)
    assert settings.get("precompiled_mefs") == folder
    assert settings["device_graph_capture"] is settings["enable_overlap_scheduler"] is True
