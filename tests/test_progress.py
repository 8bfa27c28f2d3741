"""Progress of a load: shown when it takes long, and only then."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_bad_input import adapted

from step3p5 import progress
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.progress import with_progress
from step3p5.random_checkpoint.writer import write_random_checkpoint


def take(seconds: float) -> list[int]:
    """Goes through ten items of 100 bytes, in `seconds` altogether."""
    taken = []
    for item in with_progress(range(10), lambda _: 100, "Reading"):
        time.sleep(seconds / 10)
        taken.append(item)
    return taken


def test_what_takes_long_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    assert take(seconds=0.5) == list(range(10))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Reading: 100%" in shown.err
    assert "1.00k/1.00k" in shown.err


def test_what_is_done_at_once_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert take(seconds=0) == list(range(10))
    assert capsys.readouterr().err == ""


def test_casting_a_checkpoint_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0)
    write_random_checkpoint(tmp_path / "bf16", "tiny", None, CheckpointDtype.BFLOAT16)
    capsys.readouterr()
    adapted(tmp_path / "bf16", quantization_encoding="float32")
    assert "Casting to float32: 100%" in capsys.readouterr().err


def test_a_load_without_casts_shows_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0)
    capsys.readouterr()
    adapted(tiny)
    assert "Casting" not in capsys.readouterr().err
