"""Hidden states go to the host and come back bit by bit, bfloat16 too, which numpy lacks."""

from __future__ import annotations

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType

from step3p5.speculation.host_rows import host_dtype, rows_from_host, rows_to_host


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_bfloat16_rows_come_back_bit_by_bit(rng: np.random.Generator, num_rows: int) -> None:
    bits = rng.integers(0, 1 << 16, size=(num_rows, 8)).astype(np.uint16)
    device = CPU()
    rows = rows_from_host(bits, DType.bfloat16, device)
    assert (rows.dtype, tuple(rows.shape)) == (DType.bfloat16, bits.shape)
    back = rows_to_host(rows)
    assert back.dtype == host_dtype(DType.bfloat16) == np.uint16
    assert np.array_equal(back, bits)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_float32_rows_stay_float32(rng: np.random.Generator, num_rows: int) -> None:
    values = rng.standard_normal((num_rows, 8)).astype(np.float32)
    back = rows_to_host(Buffer.from_numpy(values) if num_rows else Buffer(DType.float32, (0, 8), CPU()))
    assert back.dtype == host_dtype(DType.float32) == np.float32
    assert np.array_equal(back, values)
    assert np.array_equal(rows_to_host(rows_from_host(values, DType.float32, CPU())), values)
