"""What `busy.py` makes of a device's kernels; no device is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import busy
import plot
from busy import Kernel, KernelSum, Result, Timeline
from report import Environment, write_json


def test_kernels_at_the_same_time_keep_the_device_busy_once() -> None:
    kernels = [Kernel(30.0, 10.0, "b"), Kernel(0.0, 20.0, "a"), Kernel(5.0, 10.0, "b"), Kernel(15.0, 8.0, "a")]
    timeline = Timeline.of(kernels, passes=2)
    assert timeline.busy == pytest.approx((23 + 10) / 2 / 1e3)
    assert timeline.gaps == pytest.approx(7 / 2 / 1e3)
    assert timeline.kernels == [KernelSum("a", 1.0, 0.0115), KernelSum("b", 1.0, 0.005)]
    assert sum(kernel.milliseconds for kernel in timeline.kernels) == pytest.approx(timeline.busy)


def test_no_kernel_is_no_timeline() -> None:
    with pytest.raises(ValueError, match="kernels: found none"):
        Timeline.of([], passes=1)


def test_a_report_is_shown_and_drawn(tmp_path: Path) -> None:
    timeline = Timeline.of([Kernel(0.0, 1e3, "gemm"), Kernel(1.5e3, 1e3, "gemm")], passes=1)
    result = Result("decode, batch 1", 2.75, timeline, 3e9, 1.25)
    report = busy.Report("busy", Environment.of_this_process(2), "flash6", "gpu", 3e12, [result])
    assert result.row() == ("decode, batch 1", "2.750", "2.000", "0.500", "3.00", "1.25")
    assert report.text().splitlines()[-1].split() == ["gemm", "2.0", "2.0000"]
    write_json(tmp_path / "busy.json", report)
    assert json.loads((tmp_path / "busy.json").read_text())["results"][0]["timeline"]["busy"] == 2.0
    plot.draw(tmp_path / "busy.json", tmp_path / "busy.png")
    assert (tmp_path / "busy.png").read_bytes().startswith(b"\x89PNG")


def test_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        busy.parse_arguments(["flash6", "--precompiled-mefs", "artifacts", "--devices", "cpu"])
    assert capsys.readouterr().err == "busy.py: error: --devices: found cpu, expected a GPU\n"
