"""bfloat16 weights on a CPU: held as they are stored, multiplied in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SEED
from fresh_process import FreshProcesses
from harness import Runner, clear_prompt
from max.driver import Buffer
from max.dtype import DType
from max.graph.weights import SafetensorWeights, WeightData
from reference import Reference
from test_bad_input import pipeline_config
from test_model import check_requests

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint
from step3p5.weight_adapters import convert_safetensor_state_dict

FLOAT32_SUFFIXES = ("norm.weight", "layernorm.weight", "moe.gate.weight", "router_bias")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bf16"
    write_random_checkpoint(folder, "tiny", None, CheckpointDtype.BFLOAT16, SEED)
    return folder


def test_logits_are_those_of_the_stored_weights(checkpoint: Path, rng: np.random.Generator) -> None:
    runner, reference = Runner(checkpoint), Reference.from_checkpoint(checkpoint)
    prompts = [clear_prompt(reference, rng, length) for length in (300, 1, 129)]
    check_requests(runner, reference, prompts, steps=4)


def test_weights_stay_as_stored_but_for_the_small_ones(checkpoint: Path) -> None:
    stored, graph = adapted(checkpoint)
    for name, data in graph.items():
        source = stored[name if name == "lm_head.weight" else f"model.{name}"]
        if name.endswith(FLOAT32_SUFFIXES):
            assert data.dtype == DType.float32, name
        else:
            assert data.data is source.data, f"{name} is a copy"


def test_a_float32_checkpoint_is_rounded_where_asked_for(tiny: Path) -> None:
    stored, graph = adapted(tiny, quantization_encoding="bfloat16")
    for name, data in graph.items():
        exact = np.from_dlpack(stored[name if name == "lm_head.weight" else f"model.{name}"].data)
        if name.endswith(FLOAT32_SUFFIXES):
            np.testing.assert_array_equal(np.from_dlpack(data.data), exact)
        else:
            assert data.dtype == DType.bfloat16, name
            halves = Buffer.from_dlpack(data.data).view(DType.uint16).to_numpy()
            rounded = (halves.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(rounded, exact, rtol=2**-8, atol=0)


def test_another_cache_format_is_refused(checkpoint: Path) -> None:
    with FreshProcesses() as fresh:
        line = fresh.last_line_of_loading(checkpoint, kv_cache_format="bfloat16")
    assert line.endswith(
        "--kv-cache-format: found bfloat16, expected float32 on a CPU, which attends in it. Leave the flag out."
    )


def adapted(folder: Path, **options: str) -> tuple[dict[str, WeightData], dict[str, WeightData]]:
    """The stored tensors by hub name, and the graph's weights."""
    config = pipeline_config(folder, **options)
    weights = SafetensorWeights(sorted(folder.glob("*.safetensors")))
    graph = convert_safetensor_state_dict(dict(weights.items()), config.model.huggingface_config, config)
    return {name: weight.data() for name, weight in weights.items()}, graph
