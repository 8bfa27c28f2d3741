"""Every op and every graph of the model compiles for the GPUs that the project names, on a machine without one.

Graphs compiled together share their kernels. For more devices and for other GPUs: `test_gpu_compile_long.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpu_compilation import HOPPER, TARGETS, Compilation, ops


@pytest.mark.parametrize("target", [target for target in TARGETS if target != HOPPER])
def test_every_op_compiles(target: str) -> None:
    ops(target).finish(timeout=900)


def test_every_op_and_the_model_compile_for_hopper(
    hopper_models: Compilation, record_property: Callable[[str, object], None]
) -> None:
    """The model on one GPU, with its drafts, and in every mode on two."""
    record_property("seconds", hopper_models.finish(timeout=3000))
