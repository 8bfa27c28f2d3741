"""The recipes, read by MAX's own loader: options that it knows, and a model that lies on the devices named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from flash_config import flash_config
from max.pipelines.lib import PipelineArgs

from step3p5.checkpoint_tensors import CheckpointDtype, TensorRole, checkpoint_tensors, mtp_tensors
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import ModelConfig, MoEConfig

FOLDER = Path(__file__).resolve().parent.parent / "step3p5" / "recipes"
PUBLISHED = "stepfun-ai/Step-3.5-Flash"
GPUS = {
    "h100x1": (1, 80, 1, 1),
    "h200x4-tp": (4, 141, 1, 1),
    "h200x8-ep": (8, 141, 8, 8),
    "b200x8": (8, 180, 8, 1),
    "mi300x8": (8, 192, 8, 1),
}
"""Devices, memory of each in GB, expert parallel size, data parallel degree."""

EXPERTS = {TensorRole.EXPERT_GATE, TensorRole.EXPERT_UP, TensorRole.EXPERT_DOWN}


def load(path: Path, **flags: Any) -> PipelineArgs:
    """What `--config-file` makes of a recipe."""
    return PipelineArgs.from_flat_kwargs(config_file=str(path), **flags)


def recipe(name: str) -> PipelineArgs:
    return load(FOLDER / f"{name}.yaml")


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"cpu", *GPUS}


@pytest.mark.parametrize("name", ["cpu", *GPUS])
def test_a_recipe_runs_this_package(name: str) -> None:
    args = recipe(name)
    assert args.runtime.custom_architectures == ["pipelines_registry"]
    assert args.model_path == ("" if name in ("cpu", "h100x1") else PUBLISHED)
    assert load(FOLDER / f"{name}.yaml", model_path="mine").model_path == "mine"
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")


def test_the_cpu_recipe() -> None:
    args = recipe("cpu")
    assert [spec.device_type for spec in args.device_specs] == ["cpu"]
    assert (args.quantization_encoding, args.max_length) == ("float32", 4096)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_recipe_names_its_devices_and_how_the_model_lies_on_them(name: str) -> None:
    args = recipe(name)
    count, _, ep_size, data_parallel_degree = GPUS[name]
    assert [(spec.device_type, spec.id) for spec in args.device_specs] == [("gpu", index) for index in range(count)]
    assert args.quantization_encoding == "bfloat16"
    assert (args.runtime.ep_size, args.data_parallel_degree) == (ep_size, data_parallel_degree)


@pytest.mark.parametrize("name", GPUS)
def test_the_model_divides_into_the_parts_that_a_recipe_asks_for(name: str) -> None:
    args = recipe(name)
    count = len(args.device_specs)
    assert args.runtime.ep_size in (1, count)
    assert args.data_parallel_degree in (1, count)
    for layer in model(name).layers:
        if args.data_parallel_degree == 1:
            assert layer.attention.num_key_value_heads % count == 0
        if isinstance(layer.mlp, MoEConfig):
            assert layer.mlp.num_experts % args.runtime.ep_size == 0
            assert layer.mlp.intermediate_size % count == 0


@pytest.mark.parametrize("name", GPUS)
def test_the_weights_fit_and_leave_a_tenth_of_the_memory_for_the_cache(name: str) -> None:
    args = recipe(name)
    count, gigabytes, _, _ = GPUS[name]
    tensors = checkpoint_tensors(model(name)) | mtp_tensors(model(name))
    on_each = 0.0
    for spec in tensors.values():
        whole = args.data_parallel_degree > 1 and spec.role not in EXPERTS
        on_each += spec.num_bytes(CheckpointDtype.BFLOAT16) / (1 if whole else count)
    assert on_each < 0.9 * gigabytes * 1e9 * args.kv_cache.device_memory_utilization


def model(name: str) -> ModelConfig:
    """The released model, or the first six layers of it, which is what the recipe for one GPU is for."""
    if name == "h100x1":
        return parse_model_config(flash_config(num_hidden_layers=6, moe_layers_enum="3,4,5"))
    return parse_model_config(flash_config())


def test_the_released_model_does_not_fit_on_one_gpu_and_the_recipe_says_so() -> None:
    tensors = checkpoint_tensors(parse_model_config(flash_config()))
    gigabytes = sum(spec.num_bytes(CheckpointDtype.BFLOAT16) for spec in tensors.values()) / 1e9
    head = (FOLDER / "h100x1.yaml").read_text().split("model:")[0]
    assert gigabytes == pytest.approx(394, abs=0.5)
    assert "all 45 are 394 GB" in head
    assert "--layers 6" in head


@pytest.mark.parametrize("section", [None, "model", "runtime", "kv_cache", "sampling"])
def test_the_loader_refuses_an_option_that_max_does_not_have(section: str | None, tmp_path: Path) -> None:
    """So that a wrong name in a recipe fails the tests above."""
    content = yaml.safe_load((FOLDER / "h200x8-ep.yaml").read_text())
    if section is None:
        content["none_such"] = 1
    else:
        content.setdefault(section, {})["none_such"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="none_such"):
        load(tmp_path / "recipe.yaml")
