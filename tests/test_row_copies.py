"""Rows come to their places from wherever they are: a device's memory, the host's, what cycles have stored."""

from __future__ import annotations

import numpy as np
from max.driver import CPU, Buffer, batch_inplace_copy

from step3p5.speculation.kept_rows import CycleRows, DeviceRows, KeptRows, Rows
from step3p5.speculation.row_copies import copies_of_rows

WIDTH = 3


def test_rows_from_everywhere_come_to_their_places(rng: np.random.Generator) -> None:
    kept = [rng.standard_normal((8, WIDTH), dtype=np.float32) for _ in range(2)]
    on_device = [KeptRows(Buffer.from_numpy(rows.copy())) for rows in kept]
    cycle = rng.standard_normal((2, 1, WIDTH), dtype=np.float32)
    stored = CycleRows(2, 10)
    stored.add(cycle, np.ones(2, dtype=np.int64))
    host = rng.standard_normal((2, WIDTH), dtype=np.float32)
    pieces: list[Rows] = [DeviceRows(1, 3, on_device[0]), host, DeviceRows(3, 5, on_device[0]), *stored.of([1])]
    pieces += [DeviceRows(0, 0, on_device[1]), DeviceRows(7, 8, on_device[1])]
    want = np.concatenate([kept[0][1:3], host, kept[0][3:5], cycle[1], kept[1][7:8]])
    places = sorted(rng.choice(12, size=len(want), replace=False).tolist())
    to = Buffer.from_numpy(np.full((12, WIDTH), np.nan, dtype=np.float32))
    targets, sources = zip(*copies_of_rows(to, places, pieces), strict=True)
    batch_inplace_copy(targets, sources)
    CPU().synchronize()
    found = to.to_numpy()
    np.testing.assert_array_equal(found[places], want)
    assert np.isnan(np.delete(found, places, axis=0)).all()
