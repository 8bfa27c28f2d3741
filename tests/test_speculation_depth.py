"""How deep a checkpoint can draft, by its configuration and its files, and what is said where it cannot."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Runner
from max.pipelines.speculative.config import SpeculativeConfig
from safetensors.numpy import load_file, save_file
from speculation_harness import generate, load, request

from step3p5.checkpoint_files import CheckpointError, StoredTensor
from step3p5.checkpoint_tensors import mtp_layer_tensors
from step3p5.config_fields import ConfigError
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import ModelConfig
from step3p5.pretrained_config import Step3p5PretrainedConfig
from step3p5.speculation.depth import requested_depth, stored_layers


@pytest.fixture(scope="module")
def config(tiny: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def model(config: dict[str, Any]) -> ModelConfig:
    return parse_model_config(config)


@pytest.mark.parametrize(
    ("asked", "depth"), [({}, 3), ({"num_speculative_tokens": 2}, 2), ({"num_speculative_tokens": 9}, 3)]
)
def test_the_flag_is_bounded_by_the_checkpoints_layers(
    config: dict[str, Any], asked: dict[str, int], depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    speculative = SpeculativeConfig(speculative_method="mtp", **asked)
    with caplog.at_level(logging.WARNING, "max.pipelines"):
        assert requested_depth(speculative, Step3p5PretrainedConfig(**config)) == depth
    message = "found 9, but config.json names 3 MTP layers (num_nextn_predict_layers). Drafting 3 deep."
    assert (message in caplog.text) == (asked.get("num_speculative_tokens") == 9)


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"use_relaxed_acceptance_for_thinking": True}, "--use-relaxed-acceptance-for-thinking: found True"),
        ({"synthetic_acceptance_rate": 0.0}, r"--synthetic-acceptance-rate: found 0\.0"),
        ({"draft_proposal": "sampled"}, "--draft-proposal: found sampled"),
    ],
)
def test_what_would_change_the_text_is_refused(config: dict[str, Any], option: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        requested_depth(SpeculativeConfig(speculative_method="mtp", **option), Step3p5PretrainedConfig(**config))


def stored(model: ModelConfig, layers: int) -> dict[str, StoredTensor]:
    specs = [mtp_layer_tensors(model, layer) for layer in model.mtp_layers[:layers]]
    return {name: StoredTensor(spec.shape, "float32") for own in specs for name, spec in own.items()}


@pytest.mark.parametrize("present", [0, 1, 2, 3])
def test_layers_without_tensors_do_not_draft(model: ModelConfig, present: int) -> None:
    assert stored_layers(stored(model, present), model, model.mtp_layers) == model.mtp_layers[:present]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "eh_proj.weight: found none of that name"),
        (lambda tensors, name: tensors.update({name: StoredTensor((4, 4), "float32")}), "found shape"),
    ],
)
def test_a_layer_there_in_part_is_refused(
    model: ModelConfig, damage: Callable[[dict[str, StoredTensor], str], None], message: str
) -> None:
    tensors = stored(model, 3)
    damage(tensors, f"model.layers.{model.mtp_layers[1].index}.eh_proj.weight")
    with pytest.raises(CheckpointError, match=message):
        stored_layers(tensors, model, model.mtp_layers)


def test_a_checkpoint_without_mtp_tensors_runs_without_speculation(
    tiny: Path,
    tiny_model: Runner,
    model: ModelConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rng: np.random.Generator,
) -> None:
    folder = tmp_path / "without"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: array for path in sorted(tiny.glob("*.safetensors")) for name, array in load_file(path).items()}
    mtp = tuple(f"model.layers.{layer.index}." for layer in model.mtp_layers)
    save_file(
        {name: array for name, array in tensors.items() if not name.startswith(mtp)}, folder / "model.safetensors"
    )
    prompt = rng.integers(16, 500, size=30).tolist()
    with caplog.at_level(logging.WARNING, "max.pipelines"), load(folder, depth=3, max_batch_size=3) as plain:
        assert "3, but the checkpoint has 0 MTP layers that could draft. Running without speculation." in caplog.text
        (tokens,) = generate(plain, [request(prompt, 8)])
    (want,), _ = tiny_model.run([prompt], steps=8)
    assert tokens == want
