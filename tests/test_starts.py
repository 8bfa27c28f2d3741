"""What `first_token.py` and `starts.py` make of a process's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import starts
from first_token import by_kind

from step3p5.memory_maps import Mapping


def mapping(permissions: str, path: str, resident: int, own: int) -> Mapping:
    return Mapping(0, 0, permissions, path, path.startswith("/"), resident, own)


def test_memory_by_kind() -> None:
    maps = [
        mapping("r--p", "/model.safetensors", 1000, 0),
        mapping("r-xp", "/library.so", 100, 0),
        mapping("r--p", "/library.so", 30, 20),
        mapping("rw-p", "/library.so", 7, 4),
        mapping("rw-p", "[heap]", 5000, 5000),
        mapping("r--p", "/other", 40000, 0),
    ]
    assert by_kind(maps) == {"mapped_weights_bytes": 1000, "libraries_bytes": 113, "own_bytes": 5024}


def test_a_row_has_medians_of_the_rounds_and_the_share_of_the_weights() -> None:
    names = ("first_token_seconds", "resident_bytes", "mapped_weights_bytes", "libraries_bytes", "own_bytes")
    rounds = [dict.fromkeys(names, value) for value in (1e6, 9e6, 3e6)]
    row = starts.Start("mid", "bfloat16", weight_bytes=2_000_000, figures=starts.medians(rounds)).row()
    assert row == ("mid", "bfloat16", "3000000.0", "2", "3", "1.50", "3", "3", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none"], "MODEL: found no {folder}/none/config.json, expected a checkpoint's folder"),
        (["{folder}", "--encodings", "q8_0"], "argument --encodings: found 'q8_0', expected float32 or"),
    ],
)
def test_an_unusable_argument_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as exit_info:
        starts.parse_arguments([argument.format(folder=tmp_path) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert line.startswith("starts.py: error: " + message.format(folder=tmp_path))
