"""A `config.json` that transformers cannot read: its message ends the run, or ours in an enabled environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import CONFIG_ERROR, CORRECT, PER_LAYER, change_config
from fresh_process import FreshProcesses

from step3p5.enable import START_UP_LINE


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcesses]:
    """Processes that load a model."""
    with FreshProcesses() as processes:
        yield processes


EARLY_FAULTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "mistyped vocab_size": (
        dict(vocab_size="512"),
        f"vocab_size: found '512' (str), expected a positive integer. {CORRECT}",
        ["'<' not supported between instances of 'int' and 'str'"],
    ),
    "mistyped num_hidden_layers": (
        dict(num_hidden_layers="6"),
        f"num_hidden_layers: found '6' (str), expected a positive integer. {CORRECT}",
        ["`num_hidden_layers` (6)", "`layer_types` (9)"],
    ),
    "mistyped layer_types": (
        dict(layer_types="full_attention"),
        f"layer_types: found 'full_attention' (str), expected a list. {CORRECT}",
        ["`layer_types` entries must be in", "'sliding_attention'"],
    ),
    "short layer_types": (
        dict(layer_types=["full_attention"] * 4),
        f"layer_types: found 4 entries, {PER_LAYER}",
        ["`num_hidden_layers` (6)", "`layer_types` (4)"],
    ),
    "unknown layer type": (
        dict(layer_types=["full_attention"] * 5 + ["linear"] * 4),
        f"layer_types[5]: found 'linear' (str), expected 'full_attention' or 'sliding_attention'. {CORRECT}",
        ["`layer_types` entries must be in", "'sliding_attention'", "but got", "'linear'"],
    ),
    "mistyped quantization_config": (
        dict(quantization_config="fp8"),
        f"quantization_config: found 'fp8' (str), expected an object. {CORRECT}",
        ["'str' object has no attribute 'to_dict'"],
    ),
    "mistyped architectures": (
        dict(architectures="Step3p5ForCausalLM"),
        f"architectures: found 'Step3p5ForCausalLM' (str), expected a list. {CORRECT}",
        ["'architectures'", "expected a list, got str", "'Step3p5ForCausalLM'"],
    ),
    "no architectures": (
        dict(architectures=...),
        "architectures: found no such field, expected ['Step3p5ForCausalLM']. Add it to config.json.",
        ["has no 'architectures' field"],
    ),
    "no model_type": (
        dict(model_type=...),
        "model_type: found no such field, expected 'step3p5'. Add it to config.json.",
        ["no attribute 'max_position_embeddings'"],
    ),
    "unknown model_type": (
        dict(model_type="step3p6"),
        f"model_type: found 'step3p6' (str), expected 'step3p5'. {CORRECT}",
        ["pip install --upgrade transformers"],
    ),
}
"""MAX reads `config.json` before it imports this package: there, transformers has the say on these.

Each with our message, which an enabled environment ends with, and what transformers' or MAX's has in it.
"""


@pytest.mark.parametrize("fault", EARLY_FAULTS)
def test_configuration_that_transformers_refuses(fresh: FreshProcesses, copy: Path, fault: str) -> None:
    changes, _, fragments = EARLY_FAULTS[fault]
    change_config(copy, **changes)
    line = fresh.last_line_of_loading(copy)
    assert all(fragment in line for fragment in fragments), line


@pytest.fixture(scope="module")
def enabled() -> Iterator[FreshProcesses]:
    """Processes that load a model in an environment that `python -m step3p5.enable` has been run in."""
    with FreshProcesses(START_UP_LINE) as processes:
        yield processes


@pytest.mark.parametrize("fault", EARLY_FAULTS)
def test_configuration_in_an_enabled_environment(enabled: FreshProcesses, copy: Path, fault: str) -> None:
    changes, message, _ = EARLY_FAULTS[fault]
    change_config(copy, **changes)
    assert enabled.last_line_of_loading(copy) == CONFIG_ERROR + message


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
def test_a_file_that_is_no_configuration(
    enabled: FreshProcesses, copy: Path, content: bytes | None, found: str
) -> None:
    file = copy / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert enabled.last_line_of_loading(copy) == (
        f"{CONFIG_ERROR}{file}: found {found}, expected a JSON object. Download the file, or check --model."
    )


@pytest.mark.parametrize("fault", ["mistyped vocab_size", "mistyped architectures"])
def test_a_file_that_says_what_it_is_needs_no_flag(enabled: FreshProcesses, copy: Path, fault: str) -> None:
    changes, message, _ = EARLY_FAULTS[fault]
    change_config(copy, **changes)
    assert enabled.last_line_of_loading(copy, custom_architectures=[]) == CONFIG_ERROR + message


def test_another_model_keeps_its_messages(fresh: FreshProcesses, enabled: FreshProcesses, tmp_path: Path) -> None:
    for content in ('{"model_type": "llama", "vocab_size": "x"}', '{"model_type": "none such"}', "{", "{}"):
        (tmp_path / "config.json").write_text(content)
        line = fresh.last_line_of_loading(tmp_path, custom_architectures=[])
        assert enabled.last_line_of_loading(tmp_path, custom_architectures=[]) == line
        assert "ConfigError" not in line
