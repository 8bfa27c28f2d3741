"""Every mode compiles for 2 and 8 GPUs of each kind that the project names, on a machine without one; many minutes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from gpu_compilation import HOPPER, TARGETS, models
from test_parallel_plan import MODES

pytestmark = pytest.mark.skipif("STEP3P5_LONG_TESTS" not in os.environ, reason="many minutes: make test-long")

SHORT = (2, HOPPER)
"""What `test_gpu_compile.py` compiles in every run of the tests."""

CASES = [(num_devices, target) for num_devices in (2, 8) for target in TARGETS if (num_devices, target) != SHORT]


@pytest.mark.parametrize(("num_devices", "target"), CASES)
def test_every_mode_compiles(num_devices: int, target: str, record_property: Callable[[str, object], None]) -> None:
    record_property("seconds", models(target, num_devices, MODES).finish(timeout=7200))
