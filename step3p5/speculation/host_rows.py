"""Hidden states on the host between two steps. numpy has no bfloat16, so there they are its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device
from max.dtype import DType


def host_dtype(dtype: DType) -> np.dtype[Any]:
    """The type of the host's copy of rows of `dtype`."""
    return np.dtype(np.uint16) if dtype == DType.bfloat16 else np.dtype(dtype.to_numpy())


def rows_to_host(rows: Buffer) -> npt.NDArray[Any]:
    """Rows `[n, hidden_size]` in `host_dtype`; they share the buffer's memory where that is the host's."""
    if not rows.num_elements:
        return np.empty(tuple(rows.shape), dtype=host_dtype(rows.dtype))
    return (rows.view(DType.uint16, rows.shape) if rows.dtype == DType.bfloat16 else rows).to_numpy()


def rows_from_host(rows: npt.NDArray[Any], dtype: DType, device: Device) -> Buffer:
    """The reverse: rows `[n, hidden_size]` of `dtype` on `device`."""
    if not rows.size:
        return Buffer(shape=rows.shape, dtype=dtype, device=device)
    buffer = Buffer.from_numpy(np.ascontiguousarray(rows)).to(device)
    return buffer if buffer.dtype == dtype else buffer.view(dtype, rows.shape)
