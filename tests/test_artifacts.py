"""Artifacts compiled ahead: the record beside them, and compiling without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from step3p5.aot import warm_cache_command, write_stand_in
from step3p5.artifacts import RECORD_NAME, ArtifactError, check
from step3p5.checkpoint_files import check_tensors, decoder_tensors, read_headers
from step3p5.config_parser import parse_model_config
from step3p5.speculation.depth import stored_layers

SETTINGS: dict[str, Any] = {"--quantization-encoding": "bfloat16", "--devices (their number)": 1, "--ep-size": 1}


def test_artifacts_of_the_same_settings_fit(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(json.dumps(SETTINGS))
    check(tmp_path, dict(SETTINGS))


@pytest.mark.parametrize(("name", "value"), [("--quantization-encoding", "float32"), ("--devices (their number)", 8)])
def test_the_setting_that_differs_is_named(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / RECORD_NAME).write_text(json.dumps(SETTINGS))
    with pytest.raises(ArtifactError) as error:
        check(tmp_path, SETTINGS | {name: value})
    assert f"compiled with {name} {SETTINGS[name]!r}, expected {value!r}" in str(error.value)
    assert str(error.value).endswith("compile again: python -m step3p5.aot.")


def test_a_stand_in_has_every_tensor_and_takes_no_space(tiny: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, source)
    write_stand_in(source, out)
    model = parse_model_config(json.loads((out / "config.json").read_text()))
    tensors = read_headers(sorted(out.glob("*.safetensors")))
    check_tensors(decoder_tensors(tensors, model), model)
    assert stored_layers(tensors, model, model.mtp_layers) == model.mtp_layers
    on_disk = sum(file.stat().st_blocks * 512 for file in out.glob("*.safetensors"))
    assert on_disk < sum(file.stat().st_size for file in out.glob("*.safetensors")) / 10


def test_flags_of_the_caller_come_last(tmp_path: Path) -> None:
    command = warm_cache_command(tmp_path, tmp_path, "cuda:sm_90a", ["--devices", "gpu:0,1"])
    assert command[-2:] == ["--devices", "gpu:0,1"]
    assert command.index("--devices") < len(command) - 2
