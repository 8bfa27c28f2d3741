"""How the benchmarks read the steps of an overlapped pipeline."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flash_config import flash_config
from max.driver import Buffer
from max.dtype import DType

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from device import DeviceMemory, as_passes, bytes_in_use, cache_bytes, max_settings, planned_bytes

from step3p5.config_parser import parse_model_config
from step3p5.parallel_plan import parallel_plan


def test_a_cpu_returns_tokens_in_the_step_that_makes_them() -> None:
    assert as_passes([3.0, 1.0, 1.5], 2) == [3.0, 1.0, 1.5]
    assert max_settings("cpu", None) == {}


def test_a_gpu_returns_them_one_step_later() -> None:
    assert as_passes([0.5, 2.5, 1.0, 1.5], 2) == [3.0, 1.0, 1.5]
    assert as_passes([0.5, 2.5], 0) == [3.0]


def test_a_prompt_read_in_pieces_is_one_pass() -> None:
    assert as_passes([1.0, 1.0, 1.0, 0.5, 0.25], 2) == [3.0, 0.5, 0.25]


@pytest.mark.parametrize("folder", [None, "mefs"])
def test_artifacts_are_named_only_where_there_are_some(folder: str | None) -> None:
    settings = max_settings("gpu", folder)
    assert settings.get("precompiled_mefs") == folder
    assert settings["device_graph_capture"] is settings["enable_overlap_scheduler"] is True


def test_the_caches_are_taken_off_what_the_process_has() -> None:
    memory = DeviceMemory(
        before_loading=10**9, after_loading=50 * 10**9, after_rounds=70 * 10**9, caches=30 * 10**9, planned=38.5e9
    )
    assert memory.without_caches == 39 * 10**9
    assert memory.line() == "on the GPU 39.00 GB after the rounds, 38.50 planned; and 30.00 GB of caches"
    assert bytes_in_use("cpu") == 0


def test_caches_are_the_bytes_of_their_pools() -> None:
    buffers = [Buffer.from_numpy(np.zeros((3, 5), dtype)) for dtype in (np.float32, np.uint8)]
    views = [buffers[0].view(DType.float32, (5, 3)), *buffers]
    manager = SimpleNamespace(get_device_buffer=lambda replica: SimpleNamespace(all_buffers=views))
    assert cache_bytes(SimpleNamespace(kv_manager=manager)) == 3 * 5 * 4 + 3 * 5


def test_what_is_planned_grows_by_the_weights_of_a_layer() -> None:
    flash = parse_model_config(flash_config())
    less, more = (
        planned_bytes(parallel_plan(replace(flash, layers=flash.layers[:n]), 1), "bfloat16", 8, 1024) for n in (6, 7)
    )
    # 288 experts and the shared one, three matrices each; attention; router.
    assert more - less == pytest.approx(2 * (289 * 3 * 4096 * 1280 + 4096 * (2 * 96 + 16) * 128), rel=2e-3)
