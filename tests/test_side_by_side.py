"""The benchmark of processes side by side, with workers that only count."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import plot
import side_by_side

WORKER = """
import json, sys
print(json.dumps({}), flush=True)
for steps, line in zip((10, 9, 100, 40, 50, 30), sys.stdin):
    print(json.dumps({"steps": steps, "seconds": float(line)}), flush=True)
"""
"""Steps of the first process: alone and together, in the round that warms up and in two more."""


def test_each_share_is_the_median_over_rounds_of_the_rate_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(side_by_side, "WORKER", tmp_path / "worker.py")
    file = tmp_path / "run.json"
    side_by_side.main([str(tmp_path), "--seconds", "2", "--rounds", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert (result["alone"]["minimum"], result["alone"]["maximum"]) == (25.0, 50.0)
    assert result["shares"][0]["median"] == pytest.approx((40 / 100 + 30 / 50) / 2)
    # The second process is asked only when all decode.
    assert result["shares"][1]["median"] == pytest.approx((9 / 100 + 100 / 50) / 2)
    assert "process 1 of 2" in capsys.readouterr().out
    plot.draw(file, file.with_suffix(".png"))
    assert file.with_suffix(".png").stat().st_size > 0


def test_a_worker_that_ends_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(side_by_side, "WORKER", tmp_path / "worker.py")
    with pytest.raises(RuntimeError, match=r"worker.py ended with status 3"):
        side_by_side.Decoder(tmp_path, "float32")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.parse_arguments([str(tmp_path)])
    assert f"MODEL: found no {tmp_path / 'config.json'}" in capsys.readouterr().err
