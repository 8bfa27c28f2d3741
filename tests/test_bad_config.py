"""A `config.json` that transformers cannot read, which MAX asks before it imports this package: our message ends it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import CONFIG_ERROR, CORRECT, PER_LAYER, change_config, replace
from fresh_process import UNHOOK, FreshProcesses, last_line_of_generate
from max.pipelines.lib import PipelineArgs, PipelineConfig

from step3p5.config_fields import ConfigError


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcesses]:
    """Processes that load a model."""
    with FreshProcesses() as processes:
        yield processes


EARLY_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "mistyped vocab_size": (
        dict(vocab_size="512"),
        f"vocab_size: found '512' (str), expected a positive integer. {CORRECT}",
    ),
    "mistyped num_hidden_layers": (
        dict(num_hidden_layers="6"),
        f"num_hidden_layers: found '6' (str), expected a positive integer. {CORRECT}",
    ),
    "mistyped layer_types": (
        dict(layer_types="full_attention"),
        f"layer_types: found 'full_attention' (str), expected a list. {CORRECT}",
    ),
    "short layer_types": (
        dict(layer_types=["full_attention"] * 4),
        f"layer_types: found 4 entries, {PER_LAYER}",
    ),
    "unknown layer type": (
        dict(layer_types=["full_attention"] * 5 + ["linear"] * 4),
        f"layer_types[5]: found 'linear' (str), expected 'full_attention' or 'sliding_attention'. {CORRECT}",
    ),
    "mistyped quantization_config": (
        dict(quantization_config="fp8"),
        f"quantization_config: found 'fp8' (str), expected an object. {CORRECT}",
    ),
    "mistyped architectures": (
        dict(architectures="Step3p5ForCausalLM"),
        f"architectures: found 'Step3p5ForCausalLM' (str), expected a list. {CORRECT}",
    ),
    "no architectures": (
        dict(architectures=...),
        "architectures: found no such field, expected ['Step3p5ForCausalLM']. Add it to config.json.",
    ),
    "no model_type": (
        dict(model_type=...),
        "model_type: found no such field, expected 'step3p5'. Add it to config.json.",
    ),
    "unknown model_type": (
        dict(model_type="step3p6"),
        f"model_type: found 'step3p6' (str), expected 'step3p5'. {CORRECT}",
    ),
}


@pytest.mark.parametrize("fault", EARLY_FAULTS)
def test_configuration(fresh: FreshProcesses, copy: Path, fault: str) -> None:
    changes, message = EARLY_FAULTS[fault]
    change_config(copy, **changes)
    assert fresh.last_line_of_loading(copy) == CONFIG_ERROR + message


@pytest.mark.parametrize(
    "fault", ["mistyped vocab_size", "mistyped num_hidden_layers", "unknown layer type", "no model_type"]
)
def test_the_command_ends_with_our_message(copy: Path, fault: str) -> None:
    changes, message = EARLY_FAULTS[fault]
    change_config(copy, **changes)
    assert last_line_of_generate(copy) == CONFIG_ERROR + message


def test_the_command_ends_with_our_message_where_there_is_no_json(copy: Path) -> None:
    replace(copy / "config.json", b"{")
    assert last_line_of_generate(copy).startswith(f"{CONFIG_ERROR}{copy / 'config.json'}: found no JSON (Expecting ")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "no JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{"model_type": "step3p5"', "no JSON (Expecting ',' delimiter: line 1 column 25 (char 24))"),
        (b"\xff{}", "no JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"[]", "[] (list)"),
        (None, "no such file or directory"),
    ],
)
def test_a_file_that_is_no_configuration(fresh: FreshProcesses, copy: Path, content: bytes | None, found: str) -> None:
    file = copy / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert fresh.last_line_of_loading(copy) == (
        f"{CONFIG_ERROR}{file}: found {found}, expected a JSON object. Download the file, or check --model."
    )


@pytest.mark.parametrize("fault", ["mistyped vocab_size", "mistyped architectures"])
def test_a_file_that_says_what_it_is_needs_no_flag(fresh: FreshProcesses, copy: Path, fault: str) -> None:
    changes, message = EARLY_FAULTS[fault]
    change_config(copy, **changes)
    assert fresh.last_line_of_loading(copy, custom_architectures=[]) == CONFIG_ERROR + message


def test_a_recipe_asks_for_this_package_too(copy: Path, tmp_path: Path) -> None:
    replace(copy / "config.json", b"{}")
    recipe = tmp_path / "recipe.yaml"
    sections = {"model": {"model_path": str(copy)}, "runtime": {"custom_architectures": ["pipelines_registry"]}}
    recipe.write_text(json.dumps(sections))
    with pytest.raises(ConfigError, match="model_type: found no such field, expected 'step3p5'"):
        PipelineConfig.from_args(PipelineArgs.from_flat_kwargs(config_file=str(recipe)))


def test_another_model_keeps_its_messages(fresh: FreshProcesses, tmp_path: Path) -> None:
    with FreshProcesses(UNHOOK) as unhooked:
        for content in ('{"model_type": "llama", "vocab_size": "x"}', '{"model_type": "none such"}', "{", "{}"):
            (tmp_path / "config.json").write_text(content)
            line = unhooked.last_line_of_loading(tmp_path, custom_architectures=[])
            assert fresh.last_line_of_loading(tmp_path, custom_architectures=[]) == line
            assert "ConfigError" not in line
